"""The journal: observed calls that wait to be recorded in batches.

During the model's call, only input and output are copied and the weights are compared. All other
work (sequences, numbers, rows, records, gates) is done when the journal is drained. That happens
when the journal is full, when its first call has waited for `MAX_SECONDS`, when a recording block
ends, when annotations are added, and when the trace is read or flushed.

Calls are recorded in order. A call between two comparisons of its weights (see `weight_versions`)
used the version that was known then, if that is still the current version when the journal is
drained.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from grutrace.capture.kernel_calls.arriving_gradients import collect_gradients
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.torch_context import isolated_context, isolated_copy_context
from grutrace.capture.logged_values import LoggedValues
from grutrace.capture.recording.annotations import RecordedBatches, recorded_call
from grutrace.capture.recording.guarded_sink import GuardedSink
from grutrace.capture.recording.journal_entry import CheckedWeights, JournalEntry
from grutrace.capture.recording.module_recorder import ModuleRecorder
from grutrace.capture.recording.series_buffer import (
    PreparedBatch,
    SeriesGroup,
    Streak,
    can_join_series,
)
from grutrace.capture.recording.tensor_copy import CopyBuffer
from grutrace.errors import UnsupportedError
from grutrace.gru.residual import ResidualViolation
from grutrace.records import CallBatch, Origin

logger = logging.getLogger(__name__)

#: Seconds since the first waiting call after which the model's thread drains the journal.
MAX_SECONDS = 0.3

#: Maximum bytes of calls that wait for a backward pass. The oldest calls beyond it are stored
#: without gradients.
MAX_WAITING_BYTES = 256 * 1024 * 1024

#: Unused memory kept for copies, as a multiple of the largest journal. A drain and the queue of a
#: writer thread use this much at a time.
SPARE = 3

#: Seconds without a drain after which the writer thread drains the journal, because the model is
#: busy with other work. Earlier, the two threads would compete for the GIL and slow the model.
IDLE_SECONDS = 0.4

#: A call with more bytes to copy is recorded at once.
LARGE_CALL = 1024 * 1024


class SkippedCallNotice(NamedTuple):
    """A call that could not be recorded.

    Attributes:
        module: Index of its module in the header.
        reason: Why it was not recorded.
    """

    module: int
    reason: str


class MarkedSequences(NamedTuple):
    """Sequences that start with a mark.

    Attributes:
        module: Index of their module in the header.
        origins: Their marks.
    """

    module: int
    origins: Sequence[Origin]


#: A finding to report to the user. A text describes a loss of precision.
Finding: TypeAlias = SkippedCallNotice | MarkedSequences | ResidualViolation | str


#: A call, with the batches of its recording block.
_Entry: TypeAlias = tuple[JournalEntry, RecordedBatches | None]


class Journal:
    """Observed calls that are not recorded yet. Safe to use from any thread.

    It holds no reference to the tracer, so it can be drained after the tracer was
    garbage-collected.

    Args:
        recorders: The recorders of the modules.
        guarded_sink: The sink to which they append records.
        max_bytes: Bytes above which the model's thread drains the journal.
        can_wait: Whether calls may wait.

    Attributes:
        lock: Held while calls are recorded.
        findings: Findings to report to the user, oldest first.
    """

    def __init__(
        self,
        recorders: Sequence[ModuleRecorder],
        guarded_sink: GuardedSink,
        max_bytes: int,
        *,
        can_wait: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        self.findings: deque[Finding] = deque()
        self._recorders, self._guarded_sink, self._can_wait = recorders, guarded_sink, can_wait
        # A call that does not wait is copied only if its weights are not known yet.
        self._largest = LARGE_CALL if can_wait else -1
        self._max_bytes, self._buffer = max_bytes, CopyBuffer(SPARE * max_bytes)
        guarded_sink.sink.collect_from(self.collect)
        # Each call, with the batches of its recording block.
        self._entries: deque[_Entry | SeriesGroup] = deque()
        # Held while a call is added. New calls join the group. The streak of each module counts
        # similar calls in a row.
        self._adding = threading.RLock()
        self._group: SeriesGroup | None = None
        self._streaks = [Streak() for _ in recorders]
        # By module and thread, what takes the logged values of the last call; None if that call is
        # not recorded.
        self._logged: dict[tuple[int, int], LoggedValues | None] = {}
        self._bytes = 0
        self._since = 0.0
        # Whether the journal is being drained outside the model's forward.
        self._is_outside = False

    def __len__(self) -> int:
        """Number of waiting calls."""
        return sum(
            len(entry) if isinstance(entry, SeriesGroup) else 1 for entry in tuple(self._entries)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the waiting calls."""
        return self._bytes

    def add(
        self,
        module: int,
        run: KernelRun,
        tag: str | None,
        names: Sequence[Hashable] | None,
        batches: RecordedBatches | None,
    ) -> bool:
        """Add a call that has just run.

        Args:
            module: Index of its module in the header.
            run: The call.
            tag: The user's name for this part of the run.
            names: (B,) the user's names of the sequences; None to identify them by their states.
            batches: The batches of its recording block; None without one.

        Returns:
            Whether the journal must be drained now.
        """
        recorder, kind, now = self._recorders[module], run.device, time.time()
        gradients = None
        if recorder.records_gradients:
            path, scaler = recorder.description.path, recorder.grad_scaler
            gradients = collect_gradients(run, path, scaler, self.findings.append)
        logged = self._new_logged(module, run)
        waits = gradients is not None or logged is not None or run.nbytes <= self._largest
        autocast = None
        if torch.is_autocast_enabled(kind):
            autocast = kind, torch.get_autocast_dtype(kind)
        if not self._entries:
            self._since = now
        with isolated_copy_context():
            checked = recorder.check_weights(run, waits=waits)
            is_alike = waits and names is None and autocast is None and recorder.joins_series
            is_alike = is_alike and run.gates_as_set is None
            if not (is_alike and self._add_to_series(module, run, checked, tag, batches, now)):
                entry = recorder.copy(run, checked, self._buffer, waits=waits)
                entry.tag, entry.names, entry.time, entry.autocast = tag, names, now, autocast
                if gradients is not None:
                    entry.gradients = gradients
                    entry.nbytes += gradients.nbytes
                entry.logged = logged
                with self._adding:
                    self._close_group()
                    self._entries.append((entry, batches))
                    self._bytes += entry.nbytes
                waits = waits and entry.is_copied
        if not (self._can_wait and waits) or self._guarded_sink.sink.has_failed:
            return True
        return self._bytes > self._max_bytes or not 0 <= now - self._since <= MAX_SECONDS

    def _new_logged(self, module: int, run: KernelRun) -> LoggedValues | None:
        """Return what takes the logged values of a call. The call before it takes no more."""
        logged = self._recorders[module].logged_values(run)
        if logged is not None:
            key = module, threading.get_ident()
            earlier = self._logged.get(key)
            if earlier is not None:
                earlier.stop_waiting()
            self._logged[key] = logged
        return logged

    def latest_logged(self, module: int) -> LoggedValues | None:
        """Return what takes the logged values of this thread's last call of a module.

        None if there is no such call, or if it is not recorded.
        """
        return self._logged.get((module, threading.get_ident()))

    def skip_logged(self, module: int) -> None:
        """Note that this thread's last call of a module is not recorded."""
        key = module, threading.get_ident()
        earlier = self._logged.get(key)
        if earlier is not None:
            earlier.stop_waiting()
        self._logged[key] = None

    def end_logging(self) -> None:
        """Let no more values be logged for the calls so far."""
        for logged in tuple(self._logged.values()):
            if logged is not None:
                logged.stop_waiting()

    def was_called(self, module: int) -> bool:
        """Return whether this thread has called a module, recorded or not."""
        return (module, threading.get_ident()) in self._logged

    def _add_to_series(
        self,
        module: int,
        run: KernelRun,
        checked: CheckedWeights,
        tag: str | None,
        batches: RecordedBatches | None,
        now: float,
    ) -> bool:
        """Add a call to a series, or start one with it. Return False if neither is possible."""
        with self._adding:
            group = self._group or SeriesGroup()
            series = group.series.get(module)
            if series is None or not series.takes(run, checked.version, tag, batches):
                if not can_join_series(run):
                    return False
                if series is not None:
                    self._close_group()
                    group = SeriesGroup()
                capacity = self._streaks[module].capacity(run)
                if not capacity:
                    return False
                arguments = run, checked, tag, batches, capacity, self._buffer
                series = self._recorders[module].new_series(*arguments)
                group.series[module] = series
                self._bytes += series.nbytes
                if group is not self._group:
                    self._group = group
                    self._entries.append(group)
            group.add(series, run, now, is_certain=checked.is_certain)
            self._bytes += series.call_nbytes
            return True

    def _close_group(self) -> None:
        """Close the current group to further calls. The caller must hold `_adding`."""
        group, self._group = self._group, None
        if group is not None:
            for module, series in group.series.items():
                self._streaks[module].end(series)

    def is_due(self, *, keep_waiting: bool) -> bool:
        """Whether there are calls to record.

        Args:
            keep_waiting: Whether to leave out calls that wait for a backward pass, and all calls
                after the first of them.
        """
        return bool(self._due_entries(keep_waiting=True) if keep_waiting else self._entries)

    def _due_entries(self, *, keep_waiting: bool) -> tuple[_Entry | SeriesGroup, ...]:
        entries = tuple(self._entries)
        if not keep_waiting:
            return entries
        waiting = (
            number
            for number, entry in enumerate(entries)
            if not isinstance(entry, SeriesGroup) and entry[0].is_waiting
        )
        first = next(waiting, len(entries))
        # Record the oldest waiting calls until the others fit.
        excess = self._bytes - MAX_WAITING_BYTES
        while first < len(entries) and excess > 0:
            entry = entries[first]
            excess -= entry.nbytes if isinstance(entry, SeriesGroup) else entry[0].nbytes
            first += 1
        return entries[:first]

    def drain(self, *, keep_waiting: bool = False) -> None:
        """Record the calls of the journal, and append them to the sink.

        Args:
            keep_waiting: As for `is_due`.

        Raises:
            LimitExceeded: A call exceeds the limits of the recording.
            SinkError: The sink cannot store a call. This call is lost; later calls still wait.
        """
        with self.lock:
            with self._adding:
                # A snapshot, because other threads keep adding calls.
                self._close_group()
                waiting = self._due_entries(keep_waiting=keep_waiting)
            if not waiting:
                return
            singles = [entry[0] for entry in waiting if not isinstance(entry, SeriesGroup)]
            uncertain = {entry.module for entry in singles if not entry.is_certain}
            for group in waiting:
                if isinstance(group, SeriesGroup):
                    uncertain |= group.uncertain_modules()
            with isolated_context(), self._guarded_sink.sink.gather():
                for module in uncertain:
                    self._recorders[module].recheck()
                by_module = defaultdict[int, list[JournalEntry]](list)
                for entry in singles:
                    by_module[entry.module].append(entry)
                for module, entries in by_module.items():
                    self._recorders[module].gather(entries)
                remaining = len(waiting)
                while remaining:
                    remaining += self._record_first() - 1

    def _record_first(self) -> int:
        """Record the first entry, or split it into single calls.

        Returns:
            Number of entries that replace it: 0 if it is recorded.
        """
        first = self._entries[0]
        if not isinstance(first, SeriesGroup):
            self._entries.popleft()
            self._record_entry(*first)
            return 0
        # An interruption can come at any time, so a group stays first until its calls are stored.
        # The group is empty if an interruption came while its first call was being copied.
        if len(first) and not (first.commitment.is_done or self._record_group(first)):
            entries = self._divide(first)
            self._entries.extendleft(reversed(entries))
            first.is_divided = True
            return 1 + len(entries)
        self._entries.popleft()
        self._bytes = self._bytes - first.nbytes if self._entries else 0
        return 0

    def _divide(self, group: SeriesGroup) -> list[_Entry]:
        """Return the calls of a group as entries of their own."""
        entries = []
        for series, call in group.calls():
            is_certain = series.are_certain[call]
            checked = CheckedWeights(series.versions, series.version, is_certain, False)
            entry = JournalEntry(series.module, series.single_run(call), checked)
            entry.tag, entry.time, entry.is_copied = series.tag, series.times[call], True
            entries.append((entry, series.batches))
        for module in group.series:
            self._recorders[module].gather(
                [entry for entry, _ in entries if entry.module == module]
            )
        return entries

    def _record_group(self, group: SeriesGroup) -> bool:
        """Record the calls of a group at once. Return False if they must be recorded singly."""
        calls_before = self._guarded_sink.calls
        try:
            if group.prepared is None:
                group.prepared = self._prepare(group)
            if group.prepared is None:
                return False
            number = self._append_group(group, group.prepared.record)
        except Exception:
            if not self._is_outside:
                # The calls are lost. Calls whose weights could not be stored are not counted yet.
                self._entries.popleft()
                self._bytes = self._bytes - group.nbytes if self._entries else 0
                missing = calls_before + len(group) - self._guarded_sink.calls
                self._guarded_sink.count_calls(max(0, missing))
            raise
        self._report(group, group.prepared, number)
        return True

    def _prepare(self, group: SeriesGroup) -> PreparedBatch | None:
        """Return the rows and sequences of a group; None if it must be recorded call by call."""
        prepared = []
        for series in group.filled():
            recorder = self._recorders[series.module]
            rows = recorder.series_rows(series) if recorder.can_record_series(series) else None
            if rows is None:
                return None
            prepared.append((recorder, series, rows))
        parts = [
            recorder.assign_series(series, rows, group.commitment)
            for recorder, series, rows in prepared
        ]
        index_of = {series: index for index, series in enumerate(group.filled())}
        order = np.array([index_of[series] for series, _ in group.calls()])
        record = CallBatch(tuple(series for series, _ in parts), order)
        return PreparedBatch(record, [assignment for _, assignment in parts])

    def _append_group(self, group: SeriesGroup, record: CallBatch) -> int:
        for series in record.series:
            self._recorders[series.module].append_weights(series)
        number = self._guarded_sink.append(record, group.commitment)
        assert number is not None
        return number

    def _report(self, group: SeriesGroup, prepared: PreparedBatch, first: int) -> None:
        """Add the findings about appended calls."""
        record = prepared.record
        for index, (series, waited, assignment) in enumerate(
            zip(record.series, group.filled(), prepared.assignments, strict=True)
        ):
            recorder = self._recorders[series.module]
            if waited.batches is not None:
                for call in range(len(series)):
                    waited.batches.add(recorded_call(series.module, assignment[call]))
            for origins in series.origins.values():
                self.findings.append(MarkedSequences(series.module, origins))
            numbers = (first + np.flatnonzero(record.order == index)).tolist()
            self.findings.extend(recorder.pop_precision_losses())
            self.findings.extend(recorder.series_violations(series, numbers))

    def collect(self, wait: bool) -> None:
        """Drain the journal outside the model's forward, up to the first error.

        The call that causes an error stays for the model's thread, which raises the error.

        Args:
            wait: Whether to wait for another thread that is draining. If False, the journal is
                drained only if the model is busy with other work.
        """
        is_due = wait or not 0 <= time.time() - self._since <= IDLE_SECONDS
        if self._entries and is_due and self.lock.acquire(blocking=wait):
            try:
                self._is_outside = True
                self.drain(keep_waiting=not wait)
            except Exception:
                logger.debug("waiting calls are left to the model's thread", exc_info=True)
            finally:
                self._is_outside = False
                self.lock.release()

    def _record_entry(self, entry: JournalEntry, batches: RecordedBatches | None) -> None:
        self._bytes = self._bytes - entry.nbytes if self._entries else 0
        try:
            with _autocast_of(entry):
                recorded = self._recorders[entry.module].record(entry)
        except UnsupportedError as error:
            self.findings.append(SkippedCallNotice(entry.module, str(error)))
            if batches is not None:
                batches.note_skipped_call(entry.module)
            return
        except BaseException as error:
            # An interruption does not concern the call.
            is_about_it = isinstance(error, Exception) and not self._is_outside
            if not (is_about_it or entry.commitment.is_done):
                self._entries.appendleft((entry, batches))
                self._bytes += entry.nbytes
            raise
        if entry.gradients is not None:
            entry.gradients.store()
        if entry.logged is not None:
            entry.logged.store()
        if recorded is None:
            return
        if batches is not None:
            batches.add(recorded)
        if recorded.assignment.origins:
            self.findings.append(MarkedSequences(entry.module, recorded.assignment.origins))
        self.findings.extend((*recorded.precision_losses, *recorded.violations))

    def clear(self) -> None:
        """Drop all calls. The caller must hold `lock`."""
        with self._adding:
            self._close_group()
            self._entries.clear()
            self._bytes = 0
            self._logged.clear()
        for recorder in self._recorders:
            recorder.reset()


def _autocast_of(entry: JournalEntry) -> AbstractContextManager[object]:
    """Return a context with the autocast settings of the call."""
    recorded = entry.autocast
    kind = entry.run.device
    if recorded is None and not torch.is_autocast_enabled(kind):
        return nullcontext()
    dtype = None if recorded is None else recorded[1]
    return torch.autocast(kind, dtype, enabled=recorded is not None)
