"""The journal: observed calls that wait to be recorded, many at a time.

During the model's call only the work is done that cannot wait: input and output are copied, and the
weights are compared. The rest (sequences, numbers, rows, records, gates) is done when the journal
is drained: when it holds much data or the first call has waited for long, when a recording block
ends or annotations are given, and at once when the trace is read or flushed.

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

import torch

from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.torch_context import isolated_context, isolated_copy_context
from grutrace.capture.recording.annotations import RecordedBatches
from grutrace.capture.recording.guarded_sink import GuardedSink
from grutrace.capture.recording.module_recorder import JournalEntry, ModuleRecorder
from grutrace.capture.recording.tensor_copy import CopyBuffer
from grutrace.errors import UnsupportedError
from grutrace.gru.residual import ResidualViolation
from grutrace.records import Origin

logger = logging.getLogger(__name__)

#: Limits at which the model's thread drains the journal: bytes, and seconds since the first call.
MAX_BYTES, MAX_SECONDS = 8 * 1024 * 1024, 0.3

#: After this time without a drain, the model is busy with other work, and the writer thread drains
#: the journal. Earlier, the two threads would compete for the GIL, which slows the model. Seconds.
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


class Journal:
    """Observed calls that are not recorded yet. Safe to use from any thread.

    It holds no reference to the tracer, so it can be drained after the tracer was
    garbage-collected.

    Args:
        recorders: The recorders of the modules.
        guarded_sink: The sink to which they append records.
        can_wait: Whether calls may wait.

    Attributes:
        lock: Held while calls are recorded.
        findings: Findings to report to the user, oldest first.
    """

    def __init__(
        self,
        recorders: Sequence[ModuleRecorder],
        guarded_sink: GuardedSink,
        *,
        can_wait: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        self.findings: deque[Finding] = deque()
        self._recorders, self._guarded_sink, self._can_wait = recorders, guarded_sink, can_wait
        # A call that does not wait is copied only if its weights are not known yet.
        self._largest = LARGE_CALL if can_wait else -1
        self._buffer = CopyBuffer(MAX_BYTES)
        guarded_sink.sink.collect_from(self.collect)
        # Each call, with the batches of its recording block.
        self._entries: deque[tuple[JournalEntry, RecordedBatches | None]] = deque()
        self._bytes = 0
        self._since = 0.0
        # Whether it is being drained outside the model's forward.
        self._is_outside = False

    def __len__(self) -> int:
        return len(self._entries)

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
        with isolated_copy_context():
            entry = self._recorders[module].observe(run, self._buffer, self._largest)
        entry.tag, entry.names = tag, names
        entry.time = now = time.time()
        kind = run.device
        if torch.is_autocast_enabled(kind):
            entry.autocast = kind, torch.get_autocast_dtype(kind)
        if not self._entries:
            self._since = now
        self._entries.append((entry, batches))
        self._bytes += entry.nbytes
        if not (self._can_wait and entry.is_copied) or self._guarded_sink.sink.has_failed:
            return True
        return self._bytes > MAX_BYTES or not 0 <= now - self._since <= MAX_SECONDS

    def drain(self) -> None:
        """Record all waiting calls, and append them to the sink.

        Raises:
            LimitExceeded: A call exceeds the limits of the recording.
            SinkError: The sink cannot store a call, which is lost. Later calls still wait.
        """
        with self.lock:
            # A snapshot, because other threads go on adding calls.
            waiting = tuple(self._entries)
            if not waiting:
                return
            uncertain = {each.module for each, _ in waiting if not each.is_certain}
            with isolated_context(), self._guarded_sink.sink.gather():
                for module in uncertain:
                    self._recorders[module].recheck()
                by_module = defaultdict[int, list[JournalEntry]](list)
                for entry, _ in waiting:
                    by_module[entry.module].append(entry)
                for module, entries in by_module.items():
                    self._recorders[module].gather(entries)
                for _ in waiting:
                    self._record_entry(*self._entries.popleft())

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
                self.drain()
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
            if not (is_about_it or entry.is_appended):
                self._entries.appendleft((entry, batches))
                self._bytes += entry.nbytes
            raise
        if recorded is None:
            return
        if batches is not None:
            batches.add(recorded)
        if recorded.assignment.origins:
            self.findings.append(MarkedSequences(entry.module, recorded.assignment.origins))
        self.findings.extend((*recorded.precision_losses, *recorded.violations))

    def clear(self) -> None:
        """Drop all calls. The caller must hold `lock`."""
        self._entries.clear()
        self._bytes = 0
        for recorder in self._recorders:
            recorder.reset()


def _autocast_of(entry: JournalEntry) -> AbstractContextManager[object]:
    """Return a context with the autocast settings of the call."""
    wanted = entry.autocast
    kind = entry.run.device
    if wanted is None and not torch.is_autocast_enabled(kind):
        return nullcontext()
    dtype = None if wanted is None else wanted[1]
    return torch.autocast(kind, dtype, enabled=wanted is not None)
