"""Where the records of a tracer go, and what a run loses where it goes on after that has failed.

How much a trace may become.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from grutrace.errors import SinkError
from grutrace.records import CallRecord, Record, Sink, WeightsRecord


class GuardedSink:
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
        self.records = self.call_records = self.calls = 0
        self._lock = threading.Lock()

    def append(self, record: Record) -> int | None:
        """Give the sink a record.

        Returns:
            If it is a call, how many calls came before it.

        Raises:
            SinkError: It cannot take it.
        """
        # Before the sink has it: after that, an interruption could take back what is in there.
        is_call = isinstance(record, CallRecord)
        if is_call:
            self.count_call()
        try:
            self.sink.append(record)
        except SinkError:
            if isinstance(record, WeightsRecord):
                # The call that they were announced for does not get here.
                self.count_call()
            raise
        with self._lock:
            self.records += 1
            self.call_records += is_call
            return self.call_records - 1 if is_call else None

    def count_call(self) -> None:
        """Count a call."""
        with self._lock:
            self.calls += 1

    def mark_failed(self, error: SinkError) -> bool:
        """Note that the sink has failed; whether that is news."""
        with self._lock:
            is_news = self.error is None
            self.error = self.error or error
        return is_news


class LimitExceeded(Exception):
    """The call goes beyond what the trace may become. Never seen by a user."""


class RecordingLimits:
    """Counts what is recorded, from any thread.

    Args:
        max_calls: How many calls there may be, of all modules together; None for any number.
        max_bytes: Likewise of rows, initial states and weights.

    Attributes:
        reached: Whether no more may come.
    """

    def __init__(self, max_calls: int | None = None, max_bytes: int | None = None) -> None:
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0
        self._lock = threading.Lock()
        self.reached = False

    def clear(self) -> None:
        """Count anew from 0."""
        with self._lock:
            self._calls = self._bytes = 0
            self.reached = False

    def charge(self, size: Callable[[], int]) -> None:
        """Count a call.

        Args:
            size: Returns its bytes, with those of the weights that it announces.

        Raises:
            LimitReached: It goes beyond. Then nothing more may come, be it smaller.
        """
        nbytes = 0
        if self._max_bytes is not None:
            nbytes = size()
        with self._lock:
            too_large = self._max_bytes is not None and self._bytes + nbytes > self._max_bytes
            if self.reached or too_large:
                self.reached = True
                raise LimitExceeded
            self._calls += 1
            self._bytes += nbytes
            self.reached = self._calls == self._max_calls
