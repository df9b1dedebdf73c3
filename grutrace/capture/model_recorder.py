"""Record the calls of a model's GRUs, from the kernel call to the sink.

A `ModelRecorder` decides which calls are recorded, adds them to the journal, drains the journal,
and handles limits and a failing sink. It does not read the trace. A `Tracer` and a part of
`grutrace run` each have one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from torch import nn

from grutrace.annotation_values import match_modules
from grutrace.capture.attachment import Attachment
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.torch_context import SkippedCall
from grutrace.capture.logged_values import as_numbers, set_logged
from grutrace.capture.options import Options
from grutrace.capture.recording.annotations import AnnotationValues, RecordedBatches
from grutrace.capture.recording.guarded_sink import GuardedSink, LimitExceeded, RecordingLimits
from grutrace.capture.recording.journal import Journal
from grutrace.capture.recording.module_recorder import ModuleRecorder
from grutrace.capture.recording.recording_block import (
    Recording,
    RecordingBlock,
    SequenceNames,
    SequenceNamesLike,
)
from grutrace.capture.selection import SelectedModule
from grutrace.capture.trace_output import TraceOutput
from grutrace.capture.tracer_warnings import (
    LARGE_TRACE_BYTES,
    TracerWarnings,
    warn_of_garbage_collection,
)
from grutrace.errors import OptionError, SinkError, StateError, join_names, short_repr


class ModelRecorder:
    """Records the calls of the selected modules of one model, between `start` and `stop`.

    Nothing else keeps a reference to it, so it goes when its owner goes. A recorder that is
    garbage-collected without having been closed is closed then, with a warning.

    Args:
        model: The model.
        selections: The modules to record, with the options applied.
        options: Options of the tracer.
        output: The trace to write to.
        limits: Limits of the recording, if it shares them with others; else those of the options.
        warnings: Shows the warnings of the recording.

    Attributes:
        output: The same output.
        journal: Observed calls that are not recorded yet.
        module_recorders: The recorders of the modules.
    """

    def __init__(
        self,
        model: nn.Module,
        selections: Sequence[SelectedModule],
        options: Options,
        output: TraceOutput,
        limits: RecordingLimits | None = None,
        warnings: TracerWarnings | None = None,
    ) -> None:
        self.output, self._options, self._guarded_sink = output, options, output.guarded_sink
        self._modules = [selection.description for selection in selections]
        self._limits = limits or RecordingLimits(options.max_calls, options.max_bytes)
        self._warnings = warnings or TracerWarnings(selections, options.check)
        self.module_recorders = [
            ModuleRecorder(
                index,
                selection,
                self._guarded_sink.append,
                options,
                self._limits,
                options.state_memory // len(selections),
            )
            for index, selection in enumerate(selections)
        ]
        # Limits and check="raise" must take effect during the call itself.
        is_limited = options.max_calls is not None or options.max_bytes is not None
        can_wait = not (is_limited or options.check == "raise")
        self.journal = Journal(
            self.module_recorders, self._guarded_sink, options.buffer, can_wait=can_wait
        )
        self._call_counters = [count() for _ in selections]
        self._tag: str | None = None
        # Identifies this recorder in the recording blocks of a thread without keeping it alive.
        self._owner = object()
        # Whether `start` was called, and not only a recording block was entered.
        self._is_started = False
        self._blocks: set[RecordingBlock] = set()
        # Batches that can still be annotated: `clear` empties them, too.
        self._all_batches: weakref.WeakSet[RecordedBatches] = weakref.WeakSet()
        self._called: set[int] = set()
        self._has_recorded = self._is_closed = self._is_paused = False
        self._process = os.getpid()
        self._attachment = Attachment(
            model,
            selections,
            [recorder.requested_gates for recorder in self.module_recorders],
            options.stacks,
            options.compiled,
            self.receive,
            self.should_record,
            self._warnings,
        )
        self._lock = self._attachment.lock
        self._finalizer = weakref.finalize(
            self,
            _close_unreferenced,
            weakref.ref(self),
            self._attachment,
            self.journal,
            self._guarded_sink,
            self._process,
        )

    @property
    def is_recording(self) -> bool:
        """Whether calls of the model are being recorded."""
        return self._attachment.is_active and not (self._has_stopped or self._is_paused)

    @property
    def _has_stopped(self) -> bool:
        """Whether a limit or a failed sink has stopped the recording."""
        return self._limits.reached or self._guarded_sink.error is not None

    def require_open(self) -> None:
        """Require that the recorder is not closed.

        Raises:
            StateError: It is closed.
        """
        if self._is_closed:
            raise StateError("the tracer is closed: create a new one to record again")

    def start(self, tag: str | None = None) -> None:
        """Start recording. Does nothing once a limit is reached.

        Args:
            tag: A name for the calls from now on; inside a recording block, until its end.

        Raises:
            OptionError: The tag is not a text.
            StateError: The recorder is closed.
        """
        _require_tag(tag)
        with self._lock:
            self.require_open()
            block = RecordingBlock.current(self._owner)
            if block is None:
                self._tag = tag
            else:
                block.tag = tag
            self._is_started = True
            self._attach()

    def pause(self) -> None:
        """Leave out calls until `resume`. Nothing is drained, and the subscriptions stay."""
        self._is_paused = True

    def resume(self, tag: str | None = None) -> None:
        """Record calls again after `pause`, or start.

        Args:
            tag: A name for the calls from now on.

        Raises:
            OptionError: The tag is not a text.
            StateError: The recorder is closed.
        """
        if not self._attachment.is_active:
            self.start(tag)
            return
        _require_tag(tag)
        with self._lock:
            self._tag, self._is_paused = tag, False

    def stop(self) -> None:
        """Stop recording, in all recording blocks."""
        with self._lock:
            self._is_started = self._is_paused = False
            self._blocks.clear()
            self._attachment.stop()
            self.journal.end_logging()
            # A sink error is reported on flushing or closing.
            with suppress(SinkError):
                self.drain(keep_waiting=True)

    @contextmanager
    def record_block(
        self,
        tag: str | None,
        tokens: AnnotationValues | None,
        labels: Mapping[str, AnnotationValues] | None,
        sequences: SequenceNamesLike | None,
    ) -> Iterator[Recording]:
        """Record within a ``with`` block; see `Tracer.recording`."""
        _require_tag(tag)
        names = None if sequences is None else SequenceNames(sequences, self._modules)
        # Annotations go to all batches that they fit, when the block ends.
        keeps_all = tokens is not None or bool(labels)
        batches = RecordedBatches(self._modules, keep_all=keeps_all)
        recording = Recording(self._annotate, batches)
        self._all_batches.add(batches)
        block = RecordingBlock(self._owner, tag, batches, names)
        with self._lock:
            self.require_open()
            self._blocks.add(block)
        try:
            with self._lock:
                self._attach()
            with block.activate():
                yield recording
                recording.annotate(tokens=tokens, labels=labels)
            if names is not None and (unused := names.unused_message()):
                self._warnings.warn_once("unused names", unused)
        finally:
            with self._lock:
                is_open = block in self._blocks
                self._blocks.discard(block)
                if is_open and not self._blocks and not self._is_started:
                    self.stop()
                else:
                    with suppress(SinkError):
                        self.drain(keep_waiting=True)
                    self._expect_changes()
        # Last, because warnings may be configured to raise.
        self.report_findings()

    def _attach(self) -> None:
        """Subscribe to the calls of all recorded modules, whose weights may have changed."""
        self.drain(keep_waiting=True)
        self._expect_changes()
        self._is_paused = False
        # Reaching the limit never stops the user's run.
        if self._attachment.is_active or self._limits.reached:
            return
        self._has_recorded = True
        try:
            self._attachment.start()
        except BaseException:
            self.stop()
            raise

    def _expect_changes(self) -> None:
        for recorder in self.module_recorders:
            recorder.expect_changes()

    def should_record(self, index: int) -> bool:
        """Whether to record the current call of a module. Called once per call."""
        if self._is_paused:
            self._note_skipped_call(index)
            return False
        if not self._limits.reached:
            is_chosen = next(self._call_counters[index]) % self._options.every == 0
            if not is_chosen:
                self._note_skipped_call(index)
            elif self._guarded_sink.error is not None and os.getpid() == self._process:
                self._guarded_sink.count_calls(1)
                return False
            return is_chosen
        # Another thread, or another part of the run, reached the limit. In a forked child no thread
        # may be left to release the lock.
        if os.getpid() == self._process:
            self.stop()
        return False

    def receive(self, index: int, run: KernelRun | SkippedCall) -> None:
        """Add a call of a module to the journal, and drain the journal if it is due."""
        if os.getpid() != self._process:
            self._warnings.forked_child()
            return
        self._called.add(index)
        if isinstance(run, SkippedCall):
            self._warnings.skipped_call(index, run.reason)
            self._note_skipped_call(index)
            return
        block = RecordingBlock.current(self._owner)
        tag, names, batches = self._tag, None, None
        if block is not None:
            tag, batches = block.tag, block.batches
            if block.names is not None:
                names = self._sequence_names(block.names, index, run.batch)
        if not self.journal.add(index, run, tag, names, batches):
            return
        self.drain(keep_waiting=True)
        if self._limits.reached:
            self.stop()
        self.report_findings()
        self.warn_if_large()

    def _note_skipped_call(self, index: int) -> None:
        """Note that the current call of a module is not recorded, for tokens and labels."""
        if self._options.log:
            self.journal.skip_logged(index)
        # Without the lock: in a forked child no thread may be left to release it.
        block = RecordingBlock.current(self._owner)
        if block is not None and block.batches is not None:
            block.batches.note_skipped_call(index)

    def _sequence_names(
        self, names: SequenceNames, index: int, batch: int
    ) -> tuple[Hashable, ...] | None:
        """Return the names of the sequences of a call. Warns if the given names do not fit."""
        fitting = names.names_for(index, batch)
        if fitting is None and (message := names.mismatch_message(index, batch)):
            self._warnings.sequence_names(index, message)
        return fitting

    def drain(self, *, keep_waiting: bool = False) -> None:
        """Record the calls that wait in the journal. `report_findings` reports the findings.

        Args:
            keep_waiting: Leave out calls that wait for a backward pass, and those after them.

        Raises:
            SinkError: The sink cannot store them, and ``on_error`` is ``raise``.
        """
        while self.journal.is_due(keep_waiting=keep_waiting) and os.getpid() == self._process:
            try:
                self.journal.drain(keep_waiting=keep_waiting)
            except LimitExceeded:
                self.stop()
            except SinkError as error:
                if not self.continue_untraced(error):
                    raise

    def flush(self) -> None:
        """Record all waiting calls, and flush the sink.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
        """
        try:
            self.drain()
            self._guarded_sink.sink.flush()
        except SinkError as error:
            if not self.continue_untraced(error):
                raise

    def log(self, name: str, values: Any, module: str | None) -> None:
        """Record values beside the gates of the latest calls; see `Tracer.log`."""
        names = [name for name, _ in self._options.log]
        if name not in names:
            raise OptionError(
                f"log: {short_repr(name)} was not declared when the tracer was made: pass "
                f"log=({name!r},); declared: {join_names(names)}"
            )
        array = as_numbers(name, values)
        indices = match_modules([info.path for info in self._modules], module)
        if not self.is_recording:
            if self._has_stopped:
                # What a limit or a failed sink leaves out has no values either.
                return
            raise StateError(
                f"log: {name!r} can be logged only while calls are recorded: within the block that "
                "records the call, after the call"
            )
        with self.journal.lock:
            called = [index for index in indices if self.journal.was_called(index)]
            open_calls = {
                self._modules[index].path: logged
                for index in called
                if (logged := self.journal.latest_logged(index)) is not None
            }
            if len(called) > len(open_calls) and not open_calls:
                # The options leave these calls out.
                return
            set_logged(name, array, open_calls)

    def clear(self, clear_rows: Callable[[], None]) -> None:
        """Drop all waiting calls and recorded batches, and count from 0 again.

        Args:
            clear_rows: Removes the rows of the trace.
        """
        with self._lock, self.journal.lock:
            self.journal.clear()
            clear_rows()
            self.output.restart_counts()
            for batches in self._all_batches:
                batches.clear()
            self._limits.clear()

    def close(self) -> bool:
        """Stop recording and close the sink. Return whether it was open.

        Raises:
            SinkError: Rows could not be stored, and ``on_error`` is ``raise``.
        """
        if self._attachment.is_active:
            self._attachment.warn_of_unobserved_code()
        self.stop()
        was_open, self._is_closed = not self._is_closed, True
        if was_open:
            self._finalizer.detach()
            if self.output.memory is None:
                # In memory, calls may wait for their gradients until they are read.
                with suppress(SinkError):
                    self.drain()
            try:
                self._guarded_sink.sink.close()
            except SinkError as error:
                if not self.continue_untraced(error):
                    raise
            if self._guarded_sink.error is not None:
                self._warnings.lost_calls(self.output.source.name, *self.output.count_calls())
        return was_open

    def continue_untraced(self, error: SinkError) -> bool:
        """Return whether the run continues although the sink has failed. Warns the first time."""
        if self._options.on_error == "raise":
            return False
        if self._guarded_sink.mark_failed(error):
            with suppress(SinkError):
                self._guarded_sink.sink.close()
            self._warnings.failed_sink(error)
        return True

    def report_findings(self) -> None:
        """Report the findings since the last report.

        Raises:
            ResidualError: A residual exceeds the tolerance, and ``check`` is ``raise``.
        """
        if self.journal.findings:
            self._warnings.report_findings(self.journal.findings, self.output.calls_before)
        if self.output.background is not None:
            self._warnings.report_violations(self.output.background.pop_violations())

    def warn_if_large(self) -> None:
        """Warn if the trace in memory has become large."""
        memory = self.output.memory
        if memory is not None and memory.nbytes > LARGE_TRACE_BYTES:
            self._warnings.large_trace()

    def warn_of_uncalled_modules(self) -> None:
        """Warn of modules that were never called while recording."""
        uncalled = [index for index in range(len(self._modules)) if index not in self._called]
        if self._has_recorded and uncalled and not self._has_stopped:
            self._warnings.uncalled_modules(uncalled)

    def _annotate(
        self, batches: RecordedBatches, name: str, values: AnnotationValues, module: str | None
    ) -> None:
        if self._has_stopped:
            # Calls since then were not observed.
            for index in range(len(self._modules)):
                batches.note_skipped_call(index)
        try:
            self.drain()
            # All under the lock, so that `clear` cannot come between.
            with self.journal.lock:
                for annotation in batches.annotations(name, values, module):
                    self._guarded_sink.append(annotation)
        except SinkError as error:
            if not self.continue_untraced(error):
                raise


def _close_unreferenced(
    recorder: weakref.ref[ModelRecorder],
    attachment: Attachment,
    journal: Journal,
    guarded_sink: GuardedSink,
    process: int,
) -> None:
    """Close a recorder that was garbage-collected, or that is open when the process ends."""
    if os.getpid() != process:
        return
    was_recording = attachment.is_active
    attachment.stop()
    journal.collect(wait=True)
    with suppress(SinkError):
        guarded_sink.sink.close()
    if recorder() is None and was_recording:
        warn_of_garbage_collection()


def _require_tag(tag: object) -> None:
    if not isinstance(tag, str | None):
        raise OptionError(f"tag: expected a str or None, found {short_repr(tag)}")
