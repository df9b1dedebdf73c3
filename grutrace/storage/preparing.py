"""Records on their way to a writer, some at a time through a function that finishes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from grutrace.record import Record
from grutrace.storage.pump import Consumer

#: Returns records as they are to be stored, as many, in the same order.
Prepare: TypeAlias = Callable[[Sequence[Record]], list[Record]]

#: Records are gathered up to this much, so that small calls are finished many at a time. Bytes.
GATHERED = 1024 * 1024


class Preparing:
    """A consumer in front of another.

    Args:
        consumer: Gets the finished records.
        prepare: Finishes them.
    """

    def __init__(self, consumer: Consumer, prepare: Prepare) -> None:
        self._consumer, self._prepare = consumer, prepare
        self._waiting: list[Record] = []
        self._bytes = 0

    @property
    def name(self) -> str:
        """What errors call it."""
        return self._consumer.name

    def write(self, record: Record) -> None:
        """Take a record."""
        self._waiting.append(record)
        self._bytes += record.nbytes
        if self._bytes >= GATHERED:
            self._pass_on()

    def commit(self) -> None:
        """Make everything taken so far count."""
        self._pass_on()
        self._consumer.commit()

    def close(self) -> None:
        """Commit, and release everything."""
        self._pass_on()
        self._consumer.close()

    def abandon(self) -> None:
        """Release everything without a commit."""
        self._waiting = []
        self._consumer.abandon()

    def _pass_on(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for record in self._prepare(waiting) if waiting else ():
            self._consumer.write(record)
