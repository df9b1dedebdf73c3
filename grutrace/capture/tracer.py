"""`Tracer`: attach to a model, start and stop recording, and read the trace."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType, TracebackType
from typing import Any, Self

from torch import nn

from grutrace.capture.kernel_calls import compiled_graphs
from grutrace.capture.kernel_calls.model_changes import locate_module
from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.subscription import Subscription, UnknownModuleWatch
from grutrace.capture.kernel_calls.torch_context import SkippedCall, dynamo_loaded
from grutrace.capture.options import (
    DTypeLike,
    Options,
    Units,
    collect_versions,
)
from grutrace.capture.recording.annotations import AnnotationValues, RecordedBatches
from grutrace.capture.recording.background import BackgroundReplay
from grutrace.capture.recording.guarded_sink import GuardedSink, LimitExceeded, RecordingLimits
from grutrace.capture.recording.journal import Journal, MarkedSequences, SkippedCallNotice
from grutrace.capture.recording.module_recorder import ModuleRecorder
from grutrace.capture.recording.recording_block import (
    Recording,
    RecordingBlock,
    SequenceNames,
    SequenceNamesLike,
)
from grutrace.capture.selection import SelectedModule, apply_options, find_grus, select
from grutrace.distributed import ShardOption, resolve_shard, shard_path
from grutrace.errors import (
    GrutraceWarning,
    OptionError,
    ResidualError,
    ResidualWarning,
    SinkError,
    StateError,
    TraceFileError,
    as_path,
    reject_unknown_options,
    short_repr,
)
from grutrace.gru.residual import ResidualViolation
from grutrace.options import (
    DEFAULT_STATE_MEMORY,
    Check,
    CompiledCode,
    Compression,
    Gates,
    Mode,
    OnError,
    Stacks,
    WeightChecks,
)
from grutrace.records import DEFAULT_RECORD, Origin, TraceHeader
from grutrace.storage.open import (
    SinkFactory,
    open_sink,
    open_source,
    recorded_calls,
)
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.read.trace import Trace

_FORKED_CHILD_WARNING = (
    "a traced model was called in a forked child process: its calls are not recorded. Create a "
    "tracer in the child process"
)


_LARGE_TRACE_WARNING = (
    "the trace in memory has grown past 2 GiB. To use less memory, give the tracer a path "
    "(grutrace.trace(model, 'run.h5')), gates='deferred', units=, every= or max_bytes=, or "
    "sink=grutrace.Statistics(); or call trace.clear() once you have read it"
)

#: A trace in memory that exceeds this size causes one warning. Bytes.
LARGE_TRACE_BYTES = 2 * 1024**3

#: Warnings, by the mark of the sequence that they are about.
_ORIGIN_WARNINGS = {
    "ambiguous": (
        "cannot tell which sequence a call of {} continues: several sequences ended with the state "
        "that it starts from. It starts a new sequence, with the origin 'ambiguous'. Name the "
        "sequences: with tracer.recording(sequences=...)"
    ),
    "dropped": (
        "a call of {} continues a sequence whose final state is no longer in memory. It starts a "
        "new sequence, with the origin 'dropped'. Pass state_memory='64 MiB', or more, "
        "to the tracer"
    ),
}


class Tracer(Trace):
    """Record the gates and states of a model's GRUs while the model runs.

    A tracer is also a `grutrace.Trace`: it can be read at any time. It adds nothing to the model
    (no hook, no mode, no replaced forward); while it records, it intercepts the calls of PyTorch's
    GRU kernels. As a context manager it starts recording on entering and closes on leaving. A
    tracer that is garbage-collected without having been closed is closed then, with a warning.

    Example:
        >>> import torch
        >>> import grutrace
        >>> model = torch.nn.GRU(4, 3)
        >>> with grutrace.trace(model) as trace:
        ...     output, final = model(torch.randn(5, 2, 4))
        >>> trace.sites
        ('l0',)
        >>> site = trace["l0"]
        >>> len(site), site.update.shape
        (2, (10, 3))
        >>> site[0].hidden.shape
        (5, 3)

    Args:
        model: A model that contains nn.GRU or nn.GRUCell modules, or such a module.
        path: The file to write to. None keeps the trace in memory.
        sites: Glob, or list of globs, for the names of the sites to record. None records all sites.
        record: Quantities to record. They are reset, update, candidate, hidden and input.
        gates: When gates are computed. ``inline``: during the call. ``background``: the call copies
            the layer's input and states; the gates are computed from them later, by the writer
            thread of the file or, in memory, when the trace is read. If copying the kernel's own
            gates costs less than a third of computing them, they are copied instead. ``deferred``:
            the file stores the copies, and gates are computed when they are read. ``auto``:
            ``background`` in memory; ``inline`` with a file, ``units``, ``check="raise"`` or a
            ``sink``.
        recording: Whether recording starts on entering the context manager.
        mode: What to do if the file exists. ``w`` raises an error, ``a`` appends to it, and
            ``overwrite`` replaces it if grutrace wrote it. In every mode, a file that another
            tracer is writing raises an error.
        stacks: How the lower layers of a stack are observed. The fused kernel returns the states of
            the top layer only. ``split`` replaces the fused call with one call per layer (on a CPU
            the output has the same bits). ``rerun`` leaves the fused call as it is and runs the
            lower layers again afterwards. ``auto`` is ``split`` on a CPU and ``rerun`` elsewhere.
        check: What to do when a residual exceeds the tolerance. ``warn`` warns once per site, when
            the gates are computed: at a later call, on reading, flushing or closing. ``raise``
            makes the model's call raise a `ResidualError`. ``off`` does nothing. Deferred gates are
            not checked while recording; ``grutrace verify`` checks them.
        every: Record every n-th call of each module. The first call is recorded. A sequence that
            continues after a skipped call starts a new sequence in the trace.
        max_calls: Stop recording after this many calls. Calls of all modules count together.
        max_bytes: Stop recording before the trace exceeds this many bytes. Rows, initial states and
            weights count.
        dtype: Data type in which rows are stored. One of float16, float32 and float64, also for
            initial states; None keeps the type of each module. Weights keep the module's type.
        units: Units to record, as a list of numbers or a slice. Negative numbers count from the
            end. Gates and states have one column per unit, in the given order. None records all
            units.
        steps: Steps of each sequence to record, as a slice. Steps are counted over all calls of the
            sequence. None records all steps.
        shard: Whether to write one file per rank of a distributed run. The file of rank 3 is
            ``run.rank0003.h5`` instead of ``run.h5``. True does so if torch.distributed is
            initialized, or torchrun started the process, with more than one process. False never
            does. A tuple ``(rank, world size)`` sets both.
        sink: A grutrace.Statistics that counts rows instead of storing them. It excludes a path,
            and only the sites and the header of the trace can be read.
        on_error: What happens to the run if rows cannot be written. ``raise``: the model's next
            call, `flush` and `close` raise a `SinkError`. ``warn``: the model continues untraced; a
            warning says so at once, and another one on closing gives the number of lost calls. The
            model's output is the same in both cases.
        fsync: Whether every commit waits until the rows are on the disk. They then survive a loss
            of power; without it they survive only the death of the process.
        compression: Compression filter for the rows of the file. ``blosc2`` and ``zstd`` both
            shuffle bits first. Rows are then committed every 10 seconds instead of every half
            second. If the file is appended to, it keeps its filter.
        weights: How weight changes are detected that do not bump PyTorch's version counter.
            Examples are ``weight.data[...] = 0`` and writing through a NumPy view. ``auto``
            compares every byte where that takes at most a twentieth of the time of the calls, at
            the first call of a recording, and before rows are read or flushed; between these it
            compares a sample, and the recorded states show which weights a call used. ``exact``
            compares every byte at every call.
        compiled: How code compiled by torch.compile runs while recording. A compiled graph includes
            the kernel of nn.GRUCell, so its calls cannot be observed. ``eager`` runs all compiled
            code of the process as the original Python code while recording. ``auto`` does so if
            such a graph exists when recording starts. ``keep`` runs compiled code as usual, and a
            warning names the calls that are not recorded.
        state_memory: Memory for final states, used to find the sequence that a call continues. A
            number of bytes, or a text such as ``64 MiB``, for all modules together. If the final
            state of a sequence was dropped, its next call starts a new sequence, marked
            ``dropped``, and the tracer warns once.

    Raises:
        OptionError: An option has an invalid value, a glob matches no site, or options exclude each
            other: a path and a sink, a sink and deferred gates, or `fsync` or `compression` without
            a path.
        UnsupportedError: The model contains no GRU.
        TraceFileError: The file exists, or cannot be written.
        MissingExtraError: `compression` is set and hdf5plugin is not installed.
    """

    #: Further entries for the options of the trace.
    _extra_options: Mapping[str, object] = {}

    @reject_unknown_options
    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str] | None = None,
        *,
        sites: str | Sequence[str] | None = None,
        record: str | Sequence[str] = DEFAULT_RECORD,
        gates: Gates = "auto",
        recording: bool = True,
        mode: Mode = "w",
        stacks: Stacks = "auto",
        check: Check = "warn",
        every: int = 1,
        max_calls: int | None = None,
        max_bytes: int | None = None,
        dtype: DTypeLike | None = None,
        units: Units | None = None,
        steps: slice | None = None,
        shard: ShardOption = True,
        sink: SinkFactory | None = None,
        on_error: OnError = "raise",
        fsync: bool = False,
        compression: Compression | None = None,
        weights: WeightChecks = "auto",
        compiled: CompiledCode = "auto",
        state_memory: int | str = DEFAULT_STATE_MEMORY,
    ) -> None:
        options = Options(
            gates=gates,
            stacks=stacks,
            check=check,
            every=every,
            max_calls=max_calls,
            max_bytes=max_bytes,
            dtype=dtype,
            units=units,
            steps=steps,
            counted=sink is not None,
            to_file=path is not None,
            on_error=on_error,
            fsync=fsync,
            compression=compression,
            weights=weights,
            compiled=compiled,
            state_memory=state_memory,
        )
        own = resolve_shard(shard) if path is not None or sink is not None else None
        path = None if path is None else shard_path(as_path(path), own)
        self._selections = apply_options(self._select(model, sites, record), options)
        header = TraceHeader(
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            created=time.time(),
            versions=collect_versions(),
            options={**options.as_json(), **self._extra_options, **(own.options if own else {})},
            modules=tuple(each.description for each in self._selections),
        )
        self._background = None
        if options.gates == "background":
            self._background = BackgroundReplay(header.modules, own_thread=path is not None)
        self._guarded_sink = GuardedSink(
            open_sink(path, header, mode, sink, self._background, fsync=fsync)
        )
        super().__init__(open_source(self._guarded_sink.sink))
        self._before = recorded_calls(self._source)
        if self._background is not None:
            self._background.calls = self._before
        self._seen = 0
        self._limits = self._limit(options)
        self._recorders = [
            ModuleRecorder(
                index,
                selection,
                self._guarded_sink.append,
                options,
                self._limits,
                options.state_memory // len(self._selections),
            )
            for index, selection in enumerate(self._selections)
        ]
        # Limits and check="raise" must take effect during the call itself.
        counts = options.max_calls is not None or options.max_bytes is not None
        can_wait = not (counts or options.check == "raise")
        self._journal = Journal(self._recorders, self._guarded_sink, can_wait=can_wait)
        self._model = weakref.ref(model)
        self._grus = {path: weakref.ref(module) for path, module in find_grus(model)}
        self._call_counters = [count() for _ in self._selections]
        self._record_on_enter, self._options = recording, options
        self._tag: str | None = None
        # Identifies this tracer in the recording blocks of a thread without keeping it alive.
        self._owner = object()
        self._started = False
        self._blocks: set[RecordingBlock] = set()
        # Batches that can still be annotated: `clear` empties them, too.
        self._all_batches: weakref.WeakSet[RecordedBatches] = weakref.WeakSet()
        self._subscriptions: list[Subscription | compiled_graphs.EagerCode] = []
        self._watch = UnknownModuleWatch(_WeakMethod(self, Tracer._on_unknown_module))
        self._lock = threading.RLock()
        self._called: set[int] = set()
        self._warned: set[str] = set()
        self._has_recorded = self._closed = False
        self._process = os.getpid()
        self._closing = weakref.finalize(
            self,
            _close_dropped,
            weakref.ref(self),
            self._subscriptions,
            self._journal,
            self._guarded_sink,
            self._process,
        )

    def _select(
        self, model: nn.Module, sites: str | Sequence[str] | None, record: str | Sequence[str]
    ) -> list[SelectedModule]:
        return select(model, sites, record)

    def _limit(self, options: Options) -> RecordingLimits:
        return RecordingLimits(options.max_calls, options.max_bytes)

    @property
    def is_recording(self) -> bool:
        """Whether calls of the model are being recorded.

        False once ``max_calls`` or ``max_bytes`` is reached, and while the run continues after the
        sink has failed.
        """
        return (
            bool(self._subscriptions)
            and not self._limits.reached
            and self._guarded_sink.error is None
        )

    def start(self, tag: str | None = None) -> None:
        """Start recording. Does nothing once ``max_calls`` or ``max_bytes`` is reached.

        Example:
            >>> import torch
            >>> import grutrace
            >>> model = torch.nn.GRUCell(4, 3)
            >>> with grutrace.Tracer(model, recording=False) as tracer:
            ...     tracer.start(tag="train")
            ...     state = model(torch.randn(2, 4))
            ...     tracer.stop()
            ...     state = model(torch.randn(2, 4))
            >>> len(tracer.calls)
            1

        Args:
            tag: A name for the calls from now on; inside a `recording` block, until its end.

        Raises:
            OptionError: The tag is not a text.
            StateError: The tracer is closed.
        """
        _require_tag(tag)
        with self._lock:
            self._require_open()
            block = RecordingBlock.current(self._owner)
            if block is None:
                self._tag = tag
            else:
                block.tag = tag
            self._started = True
            self._subscribe_all()

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the tracer is closed: create a new one to record again")

    def _subscribe_all(self) -> None:
        """Subscribe to the calls of all recorded modules, whose weights may have changed."""
        with self._lock:
            self._drain()
            self._expect_changes()
            # Reaching the limit never stops the user's run.
            if self._subscriptions or self._limits.reached:
                return
            self._has_recorded = True
            try:
                self._handle_compiled_code()
                for index, selection in enumerate(self._selections):
                    self._subscribe(index, selection.module)
                self._watch.start()
            except BaseException:
                self.stop()
                raise

    def _handle_compiled_code(self) -> None:
        """Make compiled code run as Python code if the options say so; else warn of its graphs."""
        compiled = self._options.compiled
        if compiled == "eager" or (compiled == "auto" and compiled_graphs.any_with_gru_kernel()):
            code = compiled_graphs.EagerCode()
            self._subscriptions.append(code)
            code.start()
        else:
            self._warn_of_graphs()

    def _warn_of_graphs(self) -> None:
        """Warn of compiled graphs that contain a GRU kernel, whose calls are not recorded."""
        is_eager = any(isinstance(e, compiled_graphs.EagerCode) for e in self._subscriptions)
        if not is_eager and compiled_graphs.any_with_gru_kernel():
            self._warn_once(
                "compiled",
                "torch.compile has made a graph that contains a GRU kernel: if it belongs to this "
                "model, its calls are not recorded. Pass compiled='eager', which runs compiled "
                "code as Python code while recording",
            )

    def _warn_of_replaced_layers(self) -> None:
        """Warn of recorded layers that the model has replaced by a module of another kind."""
        model = self._model()
        present = {} if model is None else dict(model.named_modules())
        for each in self._selections:
            path = each.description.path
            there = present.get(path)
            # A new GRU was handled at its first call.
            if there is not None and not isinstance(there, (nn.GRU, nn.GRUCell)):
                self._warn_once(
                    f"exchanged {path}",
                    f"{path} was replaced by a {type(there).__qualname__} after the tracer was "
                    "created: calls of the replacement are not recorded",
                )

    def _subscribe(self, index: int, module: GRUModule | None) -> None:
        """Record the calls of a module as those of the recorded module with this index."""
        if module is None:
            return
        gone = [e for e in self._subscriptions if isinstance(e, Subscription) and e.is_gone]
        for each in gone:
            each.stop()
            self._subscriptions.remove(each)
        subscription = Subscription(
            module,
            _WeakMethod(self, Tracer._receive, index),
            self._options.stacks,
            _WeakMethod(self, Tracer._should_record, index),
            self._recorders[index].requested_gates,
        )
        # Stored before it starts: an interruption must not leave it active.
        self._subscriptions.append(subscription)
        subscription.start()

    def stop(self) -> None:
        """Stop recording, in all recording blocks. The trace stays open."""
        with self._lock:
            self._started = False
            self._blocks.clear()
            self._watch.stop()
            while self._subscriptions:
                self._subscriptions[-1].stop()
                self._subscriptions.pop()
            # A sink error is reported on flushing or closing.
            with suppress(SinkError):
                self._drain()

    def _drain(self) -> None:
        """Record the calls that wait in the journal. `_report_findings` reports the findings.

        Raises:
            SinkError: The sink cannot store them, and ``on_error`` is ``raise``.
        """
        while len(self._journal) and os.getpid() == self._process:
            try:
                self._journal.drain()
            except LimitExceeded:
                self.stop()
            except SinkError as error:
                if not self._continue_untraced(error):
                    raise

    def _expect_changes(self) -> None:
        for recorder in self._recorders:
            recorder.expect_changes()

    @reject_unknown_options
    @contextmanager
    def recording(
        self,
        tag: str | None = None,
        *,
        tokens: AnnotationValues | None = None,
        labels: Mapping[str, AnnotationValues] | None = None,
        sequences: SequenceNamesLike | None = None,
    ) -> Iterator[Recording]:
        """Record within a ``with`` block.

        The block applies to the thread or asyncio task that enters it, and to tasks created within
        it. Calls of other threads and tasks are recorded as well, but without this block's tag and
        annotations. To include the calls of a pool's thread, run them in a copy of the context:
        ``pool.submit(contextvars.copy_context().run, model, batch)``. Blocks may overlap. Recording
        stops with the last block, unless `start` was called.

        Example:
            >>> import torch
            >>> import grutrace
            >>> model = torch.nn.GRU(4, 3)
            >>> with grutrace.Tracer(model, recording=False) as tracer:
            ...     with tracer.recording(tag="valid", tokens=[["a", "b"]]):
            ...         output, final = model(torch.randn(2, 1, 4))
            >>> tracer["l0"][0].tokens
            ['a', 'b']

        Args:
            tag: A name for the calls in the block.
            tokens: Tokens of the recorded sequences, as for `Recording.annotate`. They are stored
                when the block ends.
            labels: Labels, likewise.
            sequences: (B,) names of the sequences of a batch, hashable and all different, for every
                call in the block with B sequences; or such names by the path, or glob, of a module.
                Calls with the same name, in this block or in a later one of this tracer, continue
                the same sequence, whichever state they start from. A new name continues, or forks
                from, the sequence whose state it starts from. A bidirectional layer never continues
                a sequence.

        Yields:
            A `Recording`, for annotations that are known only after the model has run.

        Raises:
            OptionError: The tag is not a text, `sequences` has invalid names, or tokens or labels
                fit no recorded batch.
            StateError: The tracer is closed.
        """
        _require_tag(tag)
        modules = [each.description for each in self._selections]
        names = None if sequences is None else SequenceNames(sequences, modules)
        # Annotations go to all batches that they fit, when the block ends.
        batches = RecordedBatches(modules, keep_all=tokens is not None or bool(labels))
        recording = Recording(self._annotate, batches)
        self._all_batches.add(batches)
        block = RecordingBlock(self._owner, tag, batches, names)
        with self._lock:
            self._require_open()
            self._blocks.add(block)
        try:
            self._subscribe_all()
            with block.activate():
                yield recording
                recording.annotate(tokens=tokens, labels=labels)
            if names is not None and (unused := names.unused_message()):
                self._warn_once("unused names", unused)
        finally:
            with self._lock:
                was_open = block in self._blocks
                self._blocks.discard(block)
                if was_open and not self._blocks and not self._started:
                    self.stop()
                else:
                    with suppress(SinkError):
                        self._drain()
                    self._expect_changes()
        # Last, because warnings may be configured to raise.
        self._report_findings()

    def flush(self) -> None:
        """Wait until every recorded row is in the trace and, with a file, committed to it.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
        """
        try:
            self._drain()
            self._guarded_sink.sink.flush()
        except SinkError as error:
            if not self._continue_untraced(error):
                raise
        self._report_findings()

    def clear(self) -> None:
        """Remove all rows of a trace in memory. Recording continues.

        Calls, sequences and versions of the weights count from 0 again. A sequence that is in
        progress starts a new sequence, whose initial state is the state that it had reached. Tokens
        and labels can be given only to calls recorded after this. ``max_calls`` and ``max_bytes``
        count from 0 again, and `start` works again if one of them had stopped the recording;
        ``every`` continues to count. Arrays, sequences and tables that were read before stay valid.

        Raises:
            StateError: The trace is in a file, or its sink stores no rows.
        """
        self._require_memory("cleared")
        with self._lock, self._journal.lock:
            self._journal.clear()
            super().clear()
            self._before = -self._guarded_sink.call_records
            if self._background is not None:
                self._background.reset()
            for batches in self._all_batches:
                batches.clear()
            self._limits.clear()

    def refresh(self) -> None:
        """Show the rows recorded since the last refresh; if the sink failed, those that it stored.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
            TraceFileError: The file is damaged.
        """
        try:
            super().refresh()
        except SinkError as error:
            if not self._continue_untraced(error):
                raise
            super().refresh()

    def close(self) -> None:
        """Stop recording and close the trace. It can still be read. Closing twice does nothing.

        Raises:
            SinkError: Rows could not be stored, and ``on_error`` is ``raise``.
        """
        if self._finish():
            self._warn_uncalled()
            self._report_findings()

    def _finish(self) -> bool:
        """Stop recording and close the trace. Return whether it was open."""
        if self._subscriptions:
            self._warn_of_graphs()
            self._warn_of_replaced_layers()
        self.stop()
        was_open, self._closed = not self._closed, True
        if was_open:
            self._closing.detach()
            try:
                self._guarded_sink.sink.close()
            except SinkError as error:
                if not self._continue_untraced(error):
                    raise
            if self._guarded_sink.error is not None:
                self._report_losses(*self._count_losses())
        return was_open

    def __enter__(self) -> Self:
        self._require_open()
        if self._record_on_enter:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._finish() and kind is None:
            self._warn_uncalled()
            self._report_findings()

    def _continue_untraced(self, error: SinkError) -> bool:
        """Return whether the run continues although the sink has failed. Warns the first time."""
        if self._options.on_error == "raise":
            return False
        if self._guarded_sink.mark_failed(error):
            with suppress(SinkError):
                self._guarded_sink.sink.close()
            message = f"recording has stopped, and the model continues untraced: {error}"
            self._warn_once(message, message)
        return True

    def _count_losses(self) -> tuple[int, int]:
        """Return the numbers of stored and lost calls. In an unreadable file all are lost."""
        stored = 0
        with suppress(TraceFileError):
            stored = recorded_calls(self._source) - self._before
        return stored, self._guarded_sink.calls - stored

    def _report_losses(self, stored: int, lost: int) -> None:
        message = (
            f"{self._source.name} holds {stored} calls of this recording, and {lost} more are "
            "lost, because they could not be written"
        )
        self._warn_once(message, message)

    def _refresh_snapshot(self) -> TraceSnapshot:
        """Refresh the snapshot, so that reading shows every recorded row."""
        if len(self._journal):
            with suppress(SinkError):
                self._drain()
        appended = self._guarded_sink.records
        if appended != self._seen:
            self.refresh()
            self._seen = appended
            # Includes the memory of gates that were computed just now.
            if self.nbytes > LARGE_TRACE_BYTES:
                self._warn_once(_LARGE_TRACE_WARNING, _LARGE_TRACE_WARNING)
        self._report_findings()
        return super()._refresh_snapshot()

    def _should_record(self, index: int) -> bool:
        """Whether to record the current call of a module. Called once per call."""
        if not self._limits.reached:
            wanted = next(self._call_counters[index]) % self._options.every == 0
            if not wanted:
                self._note_skipped(index)
            if wanted and self._guarded_sink.error is not None and os.getpid() == self._process:
                self._guarded_sink.count_call()
                return False
            return wanted
        # Another thread, or another part of the run, reached the limit. In a forked child no thread
        # may be left to release the lock.
        if os.getpid() == self._process:
            self.stop()
        return False

    def _receive(self, index: int, run: KernelRun | SkippedCall) -> None:
        if os.getpid() != self._process:
            self._warn_once("", _FORKED_CHILD_WARNING)
            return
        self._called.add(index)
        if isinstance(run, SkippedCall):
            self._report_skipped_call(index, run.reason)
            self._note_skipped(index)
            return
        block = RecordingBlock.current(self._owner)
        tag, names, batches = self._tag, None, None
        if block is not None:
            tag, batches = block.tag, block.batches
            if block.names is not None:
                names = self._names(block.names, index, run.batch)
        if not self._journal.add(index, run, tag, names, batches):
            return
        self._drain()
        if self._limits.reached:
            self.stop()
        self._report_findings()
        if self.nbytes > LARGE_TRACE_BYTES:
            self._warn_once(_LARGE_TRACE_WARNING, _LARGE_TRACE_WARNING)

    def _on_unknown_module(self, module: GRUModule, frame: FrameType) -> None:
        """Record a GRU that replaced a recorded module, or warn that its calls are not recorded."""
        model = self._model()
        if model is None or any(each() is module for each in self._grus.values()):
            return
        described = {each.description.path: each.description for each in self._selections}
        found = locate_module(module, model, described, frame)
        if found.replaces is not None:
            index = list(described).index(found.replaces)
            with self._lock:
                if self._subscriptions:
                    self._grus[found.replaces] = weakref.ref(module)
                    self._subscribe(index, module)
        elif found.reason is not None and found.path not in self._grus:
            self._warn_once(found.reason, found.reason)

    def _note_skipped(self, index: int) -> None:
        """Note that the current call of a module is not recorded, for tokens and labels."""
        # Without the lock: in a forked child no thread may be left to release it.
        block = RecordingBlock.current(self._owner)
        if block is not None and block.batches is not None:
            block.batches.note_skipped_call(index)

    def _names(self, names: SequenceNames, index: int, batch: int) -> tuple[Hashable, ...] | None:
        """Return the names of the sequences of a call. Warns if the given names do not fit."""
        found = names.names_for(index, batch)
        if found is None and (message := names.mismatch_message(index, batch)):
            self._warn_once(f"names of {self._path(index)}", message)
        return found

    def _report_skipped_call(self, index: int, reason: str) -> None:
        path = self._path(index)
        self._warn_once(path, f"a call of {path} was not recorded: {reason}")

    def _report_origins(self, index: int, origins: Iterable[Origin]) -> None:
        """Warn, once per module, of sequences that are ambiguous or whose state was dropped."""
        for origin in origins:
            if origin.mark in _ORIGIN_WARNINGS:
                path = self._path(index)
                self._warn_once(
                    f"{origin.mark} in {path}", _ORIGIN_WARNINGS[origin.mark].format(path)
                )

    def _report_findings(self) -> None:
        """Report the findings since the last report: warnings, or a `ResidualError`."""
        findings = self._journal.findings
        while findings:
            found = findings.popleft()
            if isinstance(found, SkippedCallNotice):
                self._report_skipped_call(found.module, found.reason)
            elif isinstance(found, str):
                self._warn_once(found, found)
            elif isinstance(found, MarkedSequences):
                self._report_origins(found.module, found.origins)
            else:
                number = None if found.call is None else self._before + found.call
                self._report_violations([found._replace(call=number)])
        if self._background is not None:
            self._report_violations(self._background.pop_violations())

    def _report_violations(self, violations: Iterable[ResidualViolation]) -> None:
        for doubt in violations if self._options.check != "off" else ():
            if self._options.check == "raise":
                raise ResidualError(doubt.message)
            self._warn_once(doubt.site.name, doubt.message, ResidualWarning)

    def _warn_once(
        self, about: str, message: str, category: type[GrutraceWarning] = GrutraceWarning
    ) -> None:
        # Without the lock: in a forked child no thread may be left to release it.
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, category, stacklevel=3)

    def _annotate(
        self, batches: RecordedBatches, name: str, given: AnnotationValues, module: str | None
    ) -> None:
        if self._limits.reached or self._guarded_sink.error is not None:
            # Calls since then were not observed.
            for index in range(len(self._recorders)):
                batches.note_skipped_call(index)
        try:
            self._drain()
            # All under the lock, so that `clear` cannot come between.
            with self._journal.lock:
                for annotation in batches.annotations(name, given, module):
                    self._guarded_sink.append(annotation)
        except SinkError as error:
            if not self._continue_untraced(error):
                raise

    def _warn_uncalled(self) -> None:
        indices = range(len(self._recorders))
        uncalled = [self._path(index) for index in indices if index not in self._called]
        stopped = self._limits.reached or self._guarded_sink.error is not None
        if self._has_recorded and uncalled and not stopped:
            compiled = (
                "; or it was called inside a graph of torch.compile, which is not observed "
                "(compiled='eager' runs compiled code as Python code while recording)"
                if dynamo_loaded()
                else ""
            )
            own = [each for each in uncalled if self._has_own_forward(each)]
            python = (
                f"; or the forward of {', '.join(own)} computes the GRU itself, without the kernel"
                if own
                else ""
            )
            warnings.warn(
                f"nothing was recorded of {', '.join(uncalled)}: no call of PyTorch's GRU kernel "
                f"while recording{python}{compiled}",
                GrutraceWarning,
                stacklevel=3,
            )

    def _has_own_forward(self, path: str) -> bool:
        modules = (
            each.module
            for each in self._selections
            if (each.description.path or "the model") == path
        )
        return any(
            module is not None and type(module).forward not in (nn.GRU.forward, nn.GRUCell.forward)
            for module in modules
        )

    def _path(self, index: int, unnamed: str = "the model") -> str:
        return self._selections[index].description.path or unnamed


class _WeakMethod:
    """Calls a method of a tracer that it does not keep alive."""

    def __init__(self, tracer: Tracer, method: Callable[..., Any], *first: object) -> None:
        # By name: a subclass may override the method.
        self._tracer, self._name, self._first = weakref.ref(tracer), method.__name__, first

    def __call__(self, *args: Any) -> Any:
        tracer = self._tracer()
        return None if tracer is None else getattr(tracer, self._name)(*self._first, *args)


def _close_dropped(
    tracer: weakref.ref[Tracer],
    subscriptions: list[Subscription | compiled_graphs.EagerCode],
    journal: Journal,
    guarded_sink: GuardedSink,
    process: int,
) -> None:
    """Close a tracer that was garbage-collected, or that is open when the process ends."""
    if os.getpid() != process:
        return
    was_recording = bool(subscriptions)
    for subscription in subscriptions:
        subscription.stop()
    journal.collect(wait=True)
    with suppress(SinkError):
        guarded_sink.sink.close()
    if tracer() is None and was_recording:
        warnings.warn(
            "a tracer was garbage-collected while recording: it is closed, and its trace is "
            "complete. Keep the tracer in a variable, and close it",
            GrutraceWarning,
            stacklevel=2,
        )


def _require_tag(tag: object) -> None:
    if not isinstance(tag, str | None):
        raise OptionError(f"tag: expected a str or None, found {short_repr(tag)}")


#: `Tracer` under the name that reads well in ``with grutrace.trace(model) as trace:``.
trace = Tracer
