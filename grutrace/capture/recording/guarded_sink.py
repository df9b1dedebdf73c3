"""The sink of a tracer with counts of records and lost calls, and the limits of a recording."""

from __future__ import annotations

import threading
from collections.abc import Callable

from grutrace.capture.sequences.assignment import Commitment
from grutrace.errors import SinkError
from grutrace.records import CallBatch, CallRecord, Record, Sink, WeightsRecord


class GuardedSink:
    """The sink of a tracer, with counts of its records. Safe to use from any thread.

    It holds no reference to the tracer. Without a reference cycle, a tracer that goes out of scope
    is freed at once, together with its rows.

    Args:
        sink: The sink that stores the records.

    Attributes:
        sink: The same sink.
        error: The error with which the sink failed; None if it has not failed.
        records: Number of records that the sink has stored.
        call_records: Number of these records that are calls.
        calls: Number of calls to store, including the calls after a failure.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.error: SinkError | None = None
        self.records = self.call_records = self.calls = 0
        self._lock = threading.Lock()

    def append(self, record: Record, commitment: Commitment | None = None) -> int | None:
        """Append a record to the sink.

        Args:
            record: The record.
            commitment: Is marked as done once the sink has the record, even if an interruption
                follows.

        Returns:
            For a call or a batch of calls, the number of calls before it.

        Raises:
            SinkError: The sink cannot store the record.
        """
        calls = 1 if isinstance(record, CallRecord) else 0
        if isinstance(record, CallBatch):
            calls = len(record)
        appended = self.sink.appended
        try:
            self.sink.append(record)
        except SinkError:
            # The call that needs these weights is not appended.
            self.count_calls(1 if isinstance(record, WeightsRecord) else calls)
            raise
        finally:
            # An interruption can come before or after the sink takes the record.
            is_taken = self.sink.appended > appended
            if commitment is not None:
                commitment.is_done = is_taken
            with self._lock:
                self.records += is_taken
                self.call_records += calls * is_taken
                self.calls += calls * is_taken
        return self.call_records - calls if calls else None

    def count_calls(self, calls: int) -> None:
        """Count calls to store."""
        with self._lock:
            self.calls += calls

    def mark_failed(self, error: SinkError) -> bool:
        """Note that the sink has failed. Return whether this is its first failure."""
        with self._lock:
            is_news = self.error is None
            self.error = self.error or error
        return is_news


class LimitExceeded(Exception):
    """A call exceeds the limits of the recording. Internal: users never see it."""


class RecordingLimits:
    """The limits of a recording, with its calls and bytes so far. Safe to use from any thread.

    Args:
        max_calls: Maximum number of calls of all modules together; None for no limit.
        max_bytes: Maximum number of bytes of rows, initial states, weights and the labels of
            interventions; None for no limit.

    Attributes:
        reached: Whether a limit is reached, so that no further call is recorded.
    """

    def __init__(self, max_calls: int | None = None, max_bytes: int | None = None) -> None:
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0
        self._lock = threading.Lock()
        self.reached = False

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return not (self._max_calls is None and self._max_bytes is None)

    def clear(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._calls = self._bytes = 0
            self.reached = False

    def charge(self, size: Callable[[], int]) -> None:
        """Count a call.

        Args:
            size: Returns the bytes of the call and of the new weights stored with it.

        Raises:
            LimitExceeded: The call exceeds a limit. No later call is accepted, even a smaller one.
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
