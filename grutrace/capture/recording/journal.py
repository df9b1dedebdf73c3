"""The journal: calls that were heard, and are worked out later, many at once.

While the model waits, only that is done which cannot be done later: what the call read and made is
copied, and its weights are looked at. Everything else (which sequences it goes on with, numbers,
rows, blocks, gates) is worked out when the journal is drained: when much is in it or the first call
has waited for long, when a recording block ends or annotations are given, and at once when somebody
looks at the trace or flushes it.

Calls are worked out in their order. A call between two comparisons of its weights (see
`weight_versions`) is known to have used the version that was known then, if that is still the
present one when the journal is drained.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
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

#: What may be in a journal before the model's thread drains it: bytes, and seconds since the first
#: call.
MAX_BYTES, MAX_SECONDS = 8 * 1024 * 1024, 0.3

#: After so long the model is busy with something else, and a writer's thread drains it. Sooner, the
#: two would wait for each other: gates that another thread makes cost the model more than its own.
#: Seconds.
IDLE_SECONDS = 0.4

#: A call of which more would be copied is worked out at once. Bytes.
LARGE_CALL = 1024 * 1024


class SkippedCallNotice(NamedTuple):
    """A call that could not be recorded.

    Attributes:
        module: Place of its module in the header.
        reason: Why.
    """

    module: int
    reason: str


class MarkedSequences(NamedTuple):
    """Sequences that began with a mark.

    Attributes:
        module: Place of their module in the header.
        origins: The marks.
    """

    module: int
    origins: Sequence[Origin]


#: What the user may have to be told; a text is what the type of the rows has lost.
Finding: TypeAlias = SkippedCallNotice | MarkedSequences | ResidualViolation | str


class Journal:
    """The calls that were heard and not worked out yet. From any thread.

    It knows nothing of the tracer, so that it can be drained once that is gone.

    Args:
        recorders: Of each module.
        outlet: Where they hand records on to.
        keeps: Whether calls may wait at all.

    Attributes:
        lock: Held while calls are worked out.
        news: What was found that the user may have to be told, the oldest first.
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
        # A call that does not wait is copied only where its weights are not known yet.
        self._largest = LARGE_CALL if can_wait else -1
        self._buffer = CopyBuffer(MAX_BYTES)
        guarded_sink.sink.collect_from(self.collect)
        # With each, the batches of the recording block that it belongs to.
        self._entries: deque[tuple[JournalEntry, RecordedBatches | None]] = deque()
        self._bytes = 0
        self._since = 0.0
        # Whether it is drained outside the model's forward.
        self._is_outside = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of what is in it."""
        return self._bytes

    def add(
        self,
        module: int,
        run: KernelRun,
        tag: str | None,
        names: Sequence[Hashable] | None,
        batches: RecordedBatches | None,
    ) -> bool:
        """Note a call that has just run.

        Args:
            module: Place of its module in the header.
            run: The call.
            tag: The user's name for this part of the run.
            names: (B,) the user's names of the sequences; None to go by the states.
            batches: Of the recording block that it belongs to, if there is one.

        Returns:
            Whether the journal is to be drained now.
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
        """Work out all calls, and hand them on to the sink.

        Raises:
            LimitReached: A call goes beyond what the trace may become.
            SinkError: The sink cannot take a call, which is lost; those behind it still wait.
        """
        with self.lock:
            # In one step: other threads go on noting calls.
            waiting = tuple(self._entries)
            if not waiting:
                return
            uncertain = {each.module for each, _ in waiting if not each.is_certain}
            with isolated_context(), self._guarded_sink.sink.gather():
                for module in uncertain:
                    self._recorders[module].recheck()
                for module in {each.module for each, _ in waiting}:
                    own = [each for each, _ in waiting if each.module == module]
                    self._recorders[module].gather(own)
                for _ in waiting:
                    self._record_entry(*self._entries.popleft())

    def collect(self, wait: bool) -> None:
        """Drain it, outside the model's forward, as far as that can be done without an error.

        What cannot be worked out is left to the model's thread, where the error is raised.

        Args:
            wait: Whether to wait for another thread that drains it. If not, it is drained only
                where the model is busy with something else.
        """
        is_due = wait or not 0 <= time.time() - self._since <= IDLE_SECONDS
        if self._entries and is_due and self.lock.acquire(blocking=wait):
            try:
                self._is_outside = True
                self.drain()
            except Exception:
                logger.debug("calls that wait are left to the model's thread", exc_info=True)
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
            # An interruption is about something else.
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
        """Forget all calls. For whoever holds `lock`."""
        self._entries.clear()
        self._bytes = 0
        for recorder in self._recorders:
            recorder.reset()


def _autocast_of(entry: JournalEntry) -> AbstractContextManager[object]:
    """Compute in the precision in which the call ran."""
    wanted = entry.autocast
    kind = entry.run.device
    if wanted is None and not torch.is_autocast_enabled(kind):
        return nullcontext()
    dtype = None if wanted is None else wanted[1]
    return torch.autocast(kind, dtype, enabled=wanted is not None)
