"""Where the records of a tracer go, and what a run loses where it goes on after that has failed."""

from __future__ import annotations

import threading

from grutrace.errors import SinkError
from grutrace.record import Block, Record, Sink, Weights


class Outlet:
    """The sink of a tracer, and counts of what it was given. From any thread.

    It knows nothing of the tracer: one that is forgotten is gone at once, and its rows with it,
    and does not wait until Python looks for cycles.

    Args:
        sink: Where records go.

    Attributes:
        sink: See there.
        error: Why the sink failed; None while it has not.
        records: How many the sink has taken.
        blocks: How many of those are calls.
        calls: Calls that were given to the sink, and those that came after it had failed.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.error: SinkError | None = None
        self.records = self.blocks = self.calls = 0
        self._lock = threading.Lock()

    def append(self, record: Record) -> int | None:
        """Give the sink a record.

        Returns:
            If it is a call, how many calls came before it.

        Raises:
            SinkError: It cannot take it.
        """
        # Before the sink has it: after that, an interruption could take back what is in there.
        is_call = isinstance(record, Block)
        if is_call:
            self.count()
        try:
            self.sink.append(record)
        except SinkError:
            if isinstance(record, Weights):
                # The call that they were announced for does not get here.
                self.count()
            raise
        with self._lock:
            self.records += 1
            self.blocks += is_call
            return self.blocks - 1 if is_call else None

    def count(self) -> None:
        """Count a call."""
        with self._lock:
            self.calls += 1

    def fail(self, error: SinkError) -> bool:
        """Note that the sink has failed; whether that is news."""
        with self._lock:
            is_news = self.error is None
            self.error = self.error or error
        return is_news
