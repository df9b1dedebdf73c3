"""Calls that wait until it is known which weights they used, and what came after them.

Records go to the sink in the order of the calls. Mostly they go at once. A call whose weights were
not compared waits, with everything behind it, until they are: see `versions`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from grutrace.record import Block, Record

#: What may wait before the weights are compared all the same: bytes, calls, and seconds. A writer
#: commits as often.
MOST_BYTES, MOST_CALLS, MOST_SECONDS = 8 * 1024 * 1024, 256, 0.5


class HeldCall:
    """A call that waits.

    Args:
        block: The call, with the version of the weights that was known when it ran.

    Attributes:
        block: Likewise; replaced once the version is known.
        is_settled: Whether it is known.
        number: Of the call, once it was handed on.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.is_settled = False
        self.number: int | None = None


class PendingRecords:
    """Hands records on in order. From any thread.

    Args:
        append: Takes a record; returns the number of the call if it is one.
    """

    def __init__(self, append: Callable[[Record], int | None]) -> None:
        self._append = append
        self._waiting: deque[Record | HeldCall] = deque()
        self._bytes = self._calls = 0
        self._since = 0.0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether so much waits, or for so long, that the weights should be compared now."""
        if not self._waiting:
            return False
        has_waited = time.monotonic() - self._since > MOST_SECONDS
        return has_waited or self._bytes > MOST_BYTES or self._calls > MOST_CALLS

    def append(self, record: Record) -> int | None:
        """Hand a record on, at once if nothing waits.

        Returns:
            The number of the call, where it is known.

        Raises:
            SinkError: The sink cannot take it.
        """
        with self._lock:
            if not self._waiting:
                return self._append(record)
            self._waiting.append(record)
            self._bytes += record.nbytes
            self._calls += isinstance(record, Block)
        self.drain()
        return None

    def append_now(self, record: Record) -> None:
        """Hand a record on before all that waits: weights, which a waiting call may have used.

        Raises:
            SinkError: The sink cannot take it.
        """
        with self._lock:
            self._append(record)

    def clear(self) -> None:
        """Forget what waits."""
        with self._lock:
            self._waiting.clear()
            self._bytes = self._calls = 0

    def hold(self, call: HeldCall) -> None:
        """Have a call wait, and all records that come after it."""
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting.append(call)
            self._bytes += call.block.nbytes
            self._calls += 1

    def drain(self) -> None:
        """Hand on what need not wait any more.

        Raises:
            SinkError: The sink cannot take a record, which is lost; those behind it still wait.
        """
        with self._lock:
            while self._waiting:
                first = self._waiting[0]
                if isinstance(first, HeldCall) and not first.is_settled:
                    return
                record = first.block if isinstance(first, HeldCall) else first
                self._waiting.popleft()
                self._calls -= isinstance(record, Block)
                self._bytes = self._bytes - record.nbytes if self._waiting else 0
                number = self._append(record)
                if isinstance(first, HeldCall):
                    first.number = number
