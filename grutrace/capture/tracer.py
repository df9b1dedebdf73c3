"""The tracer: attach to a model, record on demand, detach, and read what was recorded."""

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
from grutrace.capture.kernel_calls.model_changes import place_of
from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.subscription import StrangerWatch, Subscription
from grutrace.capture.kernel_calls.torch_context import Missed, compiler_is_loaded
from grutrace.capture.options import (
    Options,
    StoredType,
    Units,
    versions,
)
from grutrace.capture.recording.annotations import Given, RecordedBatches
from grutrace.capture.recording.background import Background
from grutrace.capture.recording.guarded_sink import LimitReached, Limits, Outlet
from grutrace.capture.recording.journal import Journal, Marked, Unrecorded
from grutrace.capture.recording.module_recorder import ModuleRecorder
from grutrace.capture.recording.recording_block import Block, GivenNames, Recording, SequenceNames
from grutrace.capture.selection import Selection, find, narrow, select
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
from grutrace.gru.residual import Doubt
from grutrace.options import (
    STATE_MEMORY,
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

_IN_A_CHILD = (
    "a traced model was called in a forked child of the process that records it, where nothing is "
    "recorded: make a tracer in the child"
)


_TOO_LARGE = (
    "the trace in memory has grown past 2 GiB. To use less memory, give the tracer a path "
    "(grutrace.trace(model, 'run.h5')), gates='deferred', units=, every= or max_bytes=, or "
    "sink=grutrace.Statistics(); or call trace.clear() once you have read it"
)

#: A trace in memory that is larger than this is warned of, once. Bytes.
LARGE = 2 * 1024**3

#: By mark of a sequence, what to say of it.
_DOUBTS = {
    "ambiguous": (
        "which sequence a call of {} goes on with cannot be told: several had ended with the very "
        "state that it starts from. It begins a sequence, with the origin 'ambiguous'. Name the "
        "sequences: with tracer.recording(sequences=...)"
    ),
    "dropped": (
        "a call of {} goes on with a sequence whose state is no longer remembered. It begins a "
        "sequence, with the origin 'dropped'. Pass state_memory='64 MiB', or more, to the tracer"
    ),
}


class Tracer(Trace):
    """Records the gates and states of a model's GRUs, and reads like a trace at any time.

    Nothing is put on the model: the calls of PyTorch's GRU kernels are heard, only while it
    records. As a context manager it records from entering, unless ``recording`` is False, and is
    closed on leaving. A tracer that is dropped without being closed is closed then, with a warning.

    Args:
        model: Any model with nn.GRU or nn.GRUCell inside; it may itself be the layer.
        path: File to stream to; None keeps everything in memory.
        sites: A glob, or several, for names of sites; None for all.
        record: Quantities out of reset, update, candidate, hidden and input.
        gates: When they are computed. ``inline``: with the call. ``background``: the call only
            copies what they follow from (the states of every layer, the input of the first and,
            where there is dropout, of the others), and they are computed and stored by the thread
            that writes the file or, in memory, when somebody looks at the trace; where the kernel's
            own can be had for a third of what that takes, these are copied instead. ``deferred``:
            the copies are stored, and gates are derived when they are read. ``auto``: in memory in
            the background; inline with a file, ``units``, ``check="raise"`` or a ``sink``.
        recording: Whether to begin to record on entering.
        mode: For a file that exists: ``w`` refuses, ``a`` appends, ``overwrite`` replaces it if
            grutrace wrote it. A file that another tracer is writing is refused in every mode.
        stacks: How to see between the layers of a stack: ``split`` (one fused call a layer, bit
            for bit the same output on a CPU), ``rerun`` (the lower layers once more), or ``auto``
            for split on a CPU and rerun elsewhere.
        check: What to do when a replayed state differs from the kernel's by more than rounding:
            ``warn`` (once a site), ``raise`` or ``off``. A warning comes when the gates are made:
            at a later call, when the trace is looked at, or on flushing or closing. ``raise`` has
            the call itself raise. Deferred gates are not checked here: `grutrace verify` checks
            them.
        every: Of each module only the 1st, (n+1)-th, (2n+1)-th ... call while recording. The calls
            between are left alone, and what a decoder goes on with after them begins a sequence.
        max_calls: After so many calls, of all modules together, recording stops for good.
        max_bytes: Recording stops for good before the call whose rows, initial states and weights
            would be more than this, together with all before it.
        dtype: What rows and initial states are kept as: float16, float32 or float64; the type of
            each module unless asked otherwise. Weights stay in the module's.
        units: Numbers of units, from the end if negative, or a slice; all unless asked otherwise.
            Gates and states have a column for each of them, in this order.
        steps: A slice: only these steps of each sequence, counted through all its calls.
        shard: Whether this process writes one shard of several: ``run.rank0003.h5`` in the place of
            ``run.h5``. True: where torch.distributed is initialized, or torchrun has started the
            process, and there is more than one. False: never. Or ``(rank, world size)`` of the
            user's own.
        sink: A `grutrace.Statistics`, to count figures with instead of keeping rows: then there
            is no path, and of the trace nothing can be read but its sites and its header.
        on_error: What a failing sink, such as a full disk, does to the run. ``raise``: a
            `SinkError` comes out of the next call of the model, and of `flush` and `close`.
            ``warn``: the model goes on untraced, which is said once, and once more on closing, with
            how many calls were lost. What the model computes is the same either way.
        fsync: Whether `flush` and every other commit wait until the disk itself holds the rows, so
            that they survive a loss of power, and not only the death of the process.
        compression: What the rows of the file are compressed with: ``blosc2``, ``zstd`` (both
            shuffle bits first), or None. Rows are then committed every 10 seconds instead of every
            half. A file that is appended to stays as it is.
        weights: How changes of the weights are found that move no version counter of PyTorch's
            (``weight.data[...] = 0``, a NumPy view). ``auto``: every byte is compared wherever that
            takes at most a twentieth of the calls' own time, at the first call after a recording
            begins, and before rows are read or flushed; in between a sample is looked at, and the
            states tell which weights were used. ``exact``: every byte at every call.
        compiled: What to do about torch.compile, whose graphs take in the kernel of nn.GRUCell, and
            then nothing is heard of its calls. ``eager``: while recording, compiled code of the
            whole process runs as the Python code that it was made from. ``auto``: so if there is
            such a graph when recording starts. ``keep``: compiled code runs as ever, and a warning
            says what is not heard.
        state_memory: How much of the states that calls ended with is remembered, all modules
            together, to tell which sequence a call goes on with: a number of bytes, or a text such
            as ``64 MiB``. A sequence whose state was dropped begins anew, marked ``dropped``, with
            one warning.

    Raises:
        OptionError: An option has no such value, or a glob matches no site; or there are a path and
            a sink, or a sink and deferred gates, or `fsync` or `compression` without a path.
        UnsupportedError: The model has no GRU.
        TraceFileError: The file exists, or cannot be written.
        MissingExtraError: `compression` is asked for and hdf5plugin is not installed.
    """

    #: What else is kept among the options of the trace.
    _stamp: Mapping[str, object] = {}

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
        dtype: StoredType | None = None,
        units: Units | None = None,
        steps: slice | None = None,
        shard: ShardOption = True,
        sink: SinkFactory | None = None,
        on_error: OnError = "raise",
        fsync: bool = False,
        compression: Compression | None = None,
        weights: WeightChecks = "auto",
        compiled: CompiledCode = "auto",
        state_memory: int | str = STATE_MEMORY,
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
        self._selections = narrow(self._select(model, sites, record), options)
        header = TraceHeader(
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            created=time.time(),
            versions=versions(),
            options={**options.as_json(), **self._stamp, **(own.options if own else {})},
            modules=tuple(each.description for each in self._selections),
        )
        self._background = None
        if options.gates == "background":
            self._background = Background(header.modules, own_thread=path is not None)
        self._outlet = Outlet(open_sink(path, header, mode, sink, self._background, fsync=fsync))
        super().__init__(open_source(self._outlet.sink))
        self._before = recorded_calls(self._source)
        if self._background is not None:
            self._background.calls = self._before
        self._seen = 0
        self._limits = self._limit(options)
        self._recorders = [
            ModuleRecorder(
                index,
                selection,
                self._outlet.append,
                options,
                self._limits,
                options.state_memory // len(self._selections),
            )
            for index, selection in enumerate(self._selections)
        ]
        # What stops a run, or ends it, is known at the call.
        counts = options.max_calls is not None or options.max_bytes is not None
        keeps = not (counts or options.check == "raise")
        self._journal = Journal(self._recorders, self._outlet, keeps=keeps)
        self._model = weakref.ref(model)
        self._grus = {path: weakref.ref(module) for path, module in find(model)}
        self._turns = [count() for _ in self._selections]
        self._record_on_enter, self._options = recording, options
        self._tag: str | None = None
        # What stands for this tracer in the blocks of a thread, which must not keep it alive.
        self._owner = object()
        self._started = False
        self._blocks: set[Block] = set()
        # Those that annotations may still be given to: what is cleared is cleared in them, too.
        self._all_batches: weakref.WeakSet[RecordedBatches] = weakref.WeakSet()
        self._subscriptions: list[Subscription | compiled_graphs.EagerCode] = []
        self._watch = StrangerWatch(_Weakly(self, Tracer._meet))
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
            self._outlet,
            self._process,
        )

    def _select(
        self, model: nn.Module, sites: str | Sequence[str] | None, record: str | Sequence[str]
    ) -> list[Selection]:
        return select(model, sites, record)

    def _limit(self, options: Options) -> Limits:
        return Limits(options.max_calls, options.max_bytes)

    @property
    def is_recording(self) -> bool:
        """Whether calls of the model are recorded now.

        Not once ``max_calls`` or so is reached, nor where the run goes on without a sink that has
        failed.
        """
        return bool(self._subscriptions) and not self._limits.reached and self._outlet.error is None

    def start(self, tag: str | None = None) -> None:
        """Record from now on. Does nothing once ``max_calls`` or ``max_bytes`` is reached.

        Args:
            tag: A name that every call bears from now on; within a `recording`, until its end.

        Raises:
            OptionError: The tag is no text.
            StateError: The tracer is closed.
        """
        _require_tag(tag)
        with self._lock:
            self._require_open()
            block = Block.of(self._owner)
            if block is None:
                self._tag = tag
            else:
                block.tag = tag
            self._started = True
            self._listen()

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the tracer is closed: make a new one to record again")

    def _listen(self) -> None:
        """Hear the calls of the model from now on, and mind that it may have changed."""
        with self._lock:
            self._drain()
            self._expect_changes()
            # Reaching the limit never stops the user's run.
            if self._subscriptions or self._limits.reached:
                return
            self._has_recorded = True
            try:
                self._mind_compiled_code()
                for index, selection in enumerate(self._selections):
                    self._subscribe(index, selection.module)
                self._watch.start()
            except BaseException:
                self.stop()
                raise

    def _mind_compiled_code(self) -> None:
        """Have graphs with a GRU kernel in them run as Python code, or say that they exist."""
        compiled = self._options.compiled
        if compiled == "eager" or (compiled == "auto" and compiled_graphs.exist()):
            code = compiled_graphs.EagerCode()
            self._subscriptions.append(code)
            code.start()
        else:
            self._name_graphs()

    def _name_graphs(self) -> None:
        """Say that there are graphs with a GRU kernel in them, of which nothing is heard."""
        is_eager = any(isinstance(e, compiled_graphs.EagerCode) for e in self._subscriptions)
        if not is_eager and compiled_graphs.exist():
            self._warn_once(
                "compiled",
                "torch.compile has made a graph with a GRU kernel in it: if it is one of this "
                "model, its calls are not recorded. Pass compiled='eager', which runs compiled "
                "code as Python code while recording",
            )

    def _name_exchanged(self) -> None:
        """Say of which recorded layers the model has something else by now that is not recorded."""
        model = self._model()
        present = {} if model is None else dict(model.named_modules())
        for each in self._selections:
            path = each.description.path
            there = present.get(path)
            # A GRU was met at its first call, and is recorded or named.
            if there is not None and not isinstance(there, (nn.GRU, nn.GRUCell)):
                self._warn_once(
                    f"exchanged {path}",
                    f"{path} was exchanged for a {type(there).__qualname__} after the tracer was "
                    "made, of which nothing is recorded",
                )

    def _subscribe(self, index: int, module: GRUModule | None) -> None:
        """Have the calls of a module recorded as those of the module of this number."""
        if module is None:
            return
        gone = [e for e in self._subscriptions if isinstance(e, Subscription) and e.is_gone]
        for each in gone:
            each.stop()
            self._subscriptions.remove(each)
        subscription = Subscription(
            module,
            _Weakly(self, Tracer._receive, index),
            self._options.stacks,
            _Weakly(self, Tracer._wants, index),
            self._recorders[index].asked,
        )
        # Kept before it starts: an interruption must not leave it behind.
        self._subscriptions.append(subscription)
        subscription.start()

    def stop(self) -> None:
        """Stop recording, in all blocks. The trace stays open."""
        with self._lock:
            self._started = False
            self._blocks.clear()
            self._watch.stop()
            while self._subscriptions:
                self._subscriptions[-1].stop()
                self._subscriptions.pop()
            # What cannot be stored now is said on flushing or closing.
            with suppress(SinkError):
                self._drain()

    def _drain(self) -> None:
        """Work out the calls that wait. What was found is said by `_say_news`.

        Raises:
            SinkError: The sink cannot take them, and ``on_error`` is ``raise``.
        """
        while len(self._journal) and os.getpid() == self._process:
            try:
                self._journal.drain()
            except LimitReached:
                self.stop()
            except SinkError as error:
                if not self._goes_on(error):
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
        tokens: Given | None = None,
        labels: Mapping[str, Given] | None = None,
        sequences: GivenNames | None = None,
    ) -> Iterator[Recording]:
        """Record within a ``with`` block, then go back to what was before.

        A block is that of the thread or asyncio task that enters it, and of tasks made within it:
        calls of other threads and tasks have their own block, or none. They are recorded all the
        same. To have the calls of a pool's thread in this block, run them in a copy of the context:
        ``pool.submit(contextvars.copy_context().run, model, batch)``. The end of a block ends no
        other: recording stops with the last one, unless it was started otherwise.

        Args:
            tag: A name that every call within bears.
            tokens: As for `Recording.annotate`; given to what was recorded, when the block ends.
            labels: Likewise.
            sequences: (B,) names of the sequences of a batch, hashable and all different, for
                every call within that has B sequences; or such names by the path of a module, or
                a glob. Calls with the same name, in this block or a later one of this tracer,
                continue the same sequence from whatever state they start. A name that is used for
                the first time continues, or forks from, the sequence whose state it starts from.
                A bidirectional layer never continues a sequence.

        Yields:
            The recording, for annotations that are known only after the model has run.

        Raises:
            OptionError: The tag is no text, `sequences` are no such names, or tokens or labels fit
                nothing that was recorded.
            StateError: The tracer is closed.
        """
        _require_tag(tag)
        modules = [each.description for each in self._selections]
        names = None if sequences is None else SequenceNames(sequences, modules)
        # What was given goes to all batches that it fits, at the end.
        batches = RecordedBatches(modules, keep_all=tokens is not None or bool(labels))
        recording = Recording(self._annotate, batches)
        self._all_batches.add(batches)
        block = Block(self._owner, tag, batches, names)
        with self._lock:
            self._require_open()
            self._blocks.add(block)
        try:
            self._listen()
            with block.entered():
                yield recording
                recording.annotate(tokens=tokens, labels=labels)
            if names is not None and (unused := names.unused()):
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
        # After all else: a warning may be an error.
        self._say_news()

    def flush(self) -> None:
        """Return once every recorded row is in the trace, and committed to the file if any.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
        """
        try:
            self._drain()
            self._outlet.sink.flush()
        except SinkError as error:
            if not self._goes_on(error):
                raise
        self._say_news()

    def clear(self) -> None:
        """Empty a trace in memory, and go on recording if it does.

        What comes after is numbered as if the tracer were new: calls, sequences and versions of the
        weights count from 0. A sequence that was under way begins anew, with the state that it had
        reached as its initial one. Tokens and labels can be given only to what is recorded after.
        ``max_calls`` and ``max_bytes`` count anew, and where one of them has ended the recording,
        `start` begins it again; ``every`` goes on counting the model's calls. Arrays, sequences and
        tables that were handed out before stay as they are, and take their memory until they are
        dropped.

        Raises:
            StateError: The trace is in a file, or has no rows.
        """
        self._require_memory("cleared")
        with self._lock, self._journal.lock:
            self._journal.clear()
            super().clear()
            self._before = -self._outlet.blocks
            if self._background is not None:
                self._background.forget()
            for batches in self._all_batches:
                batches.clear()
            self._limits.clear()

    def refresh(self) -> None:
        """Take in what was recorded since; where the sink has failed, what it still stored.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
            TraceFileError: The file is damaged.
        """
        try:
            super().refresh()
        except SinkError as error:
            if not self._goes_on(error):
                raise
            super().refresh()

    def close(self) -> None:
        """Stop recording and close the trace, which can still be read. Twice does nothing.

        Raises:
            SinkError: Rows could not be stored, and ``on_error`` is ``raise``.
        """
        if self._finish():
            self._name_uncalled()
            self._say_news()

    def _finish(self) -> bool:
        """Stop recording and close the trace; whether it was open before."""
        if self._subscriptions:
            self._name_graphs()
            self._name_exchanged()
        self.stop()
        was_open, self._closed = not self._closed, True
        if was_open:
            self._closing.detach()
            try:
                self._outlet.sink.close()
            except SinkError as error:
                if not self._goes_on(error):
                    raise
            if self._outlet.error is not None:
                self._say_losses(*self._count_losses())
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
            self._name_uncalled()
            self._say_news()

    def _goes_on(self, error: SinkError) -> bool:
        """Whether the run goes on without the sink, which has failed. Said when it is news."""
        if self._options.on_error == "raise":
            return False
        if self._outlet.fail(error):
            with suppress(SinkError):
                self._outlet.sink.close()
            message = f"nothing more is recorded, and the model goes on untraced: {error}"
            self._warn_once(message, message)
        return True

    def _count_losses(self) -> tuple[int, int]:
        """How many calls are stored, and how many are not: all of them, if nothing can be read."""
        stored = 0
        with suppress(TraceFileError):
            stored = recorded_calls(self._source) - self._before
        return stored, self._outlet.calls - stored

    def _say_losses(self, stored: int, lost: int) -> None:
        message = (
            f"{self._source.name} holds {stored} calls of this recording, and {lost} more "
            "are lost, since it could not be written"
        )
        self._warn_once(message, message)

    def _refresh_snapshot(self) -> TraceSnapshot:
        """Take in what was recorded since the last look, so that the trace is always up to date."""
        if len(self._journal):
            with suppress(SinkError):
                self._drain()
        appended = self._outlet.records
        if appended != self._seen:
            self.refresh()
            self._seen = appended
            # Gates that were made only now take their memory, too.
            if self.nbytes > LARGE:
                self._warn_once(_TOO_LARGE, _TOO_LARGE)
        self._say_news()
        return super()._refresh_snapshot()

    def _wants(self, index: int) -> bool:
        """Whether the present call of a module is to be recorded. Asked once a call."""
        if not self._limits.reached:
            wanted = next(self._turns[index]) % self._options.every == 0
            if not wanted:
                self._leave_out(index)
            if wanted and self._outlet.error is not None and os.getpid() == self._process:
                self._outlet.count()
                return False
            return wanted
        # Reached by a call of another thread, or by another part of a run. In a forked child nobody
        # might be left to release the lock.
        if os.getpid() == self._process:
            self.stop()
        return False

    def _receive(self, index: int, run: KernelRun | Missed) -> None:
        if os.getpid() != self._process:
            self._warn_once("", _IN_A_CHILD)
            return
        self._called.add(index)
        if isinstance(run, Missed):
            self._say_unrecorded(index, run.reason)
            self._leave_out(index)
            return
        block = Block.of(self._owner)
        tag, names, batches = self._tag, None, None
        if block is not None:
            tag, batches = block.tag, block.batches
            if block.names is not None:
                names = self._names(block.names, index, run.batch)
        if not self._journal.note(index, run, tag, names, batches):
            return
        self._drain()
        if self._limits.reached:
            self.stop()
        self._say_news()
        if self.nbytes > LARGE:
            self._warn_once(_TOO_LARGE, _TOO_LARGE)

    def _meet(self, module: GRUModule, frame: FrameType) -> None:
        """Record a GRU that the model did not have in the place of one that it had, or name it."""
        model = self._model()
        if model is None or any(each() is module for each in self._grus.values()):
            return
        described = {each.description.path: each.description for each in self._selections}
        found = place_of(module, model, described, frame)
        if found.replaces is not None:
            index = list(described).index(found.replaces)
            with self._lock:
                if self._subscriptions:
                    self._grus[found.replaces] = weakref.ref(module)
                    self._subscribe(index, module)
        elif found.reason is not None and found.path not in self._grus:
            self._warn_once(found.reason, found.reason)

    def _leave_out(self, index: int) -> None:
        """Note for tokens and labels that the present call of a module is not recorded."""
        # Without the lock: in a forked child nobody might be left to release it.
        block = Block.of(self._owner)
        if block is not None and block.batches is not None:
            block.batches.leave_out(index)

    def _names(self, names: SequenceNames, index: int, batch: int) -> tuple[Hashable, ...] | None:
        """The names of the sequences of a call; where there should be and are not, it is said."""
        found = names.of(index, batch)
        if found is None and (complaint := names.complaint(index, batch)):
            self._warn_once(f"names of {self._path(index)}", complaint)
        return found

    def _say_unrecorded(self, index: int, reason: str) -> None:
        path = self._path(index)
        self._warn_once(path, f"a call of {path} was not recorded: {reason}")

    def _say_origins(self, index: int, origins: Iterable[Origin]) -> None:
        """Say, once a module, that it cannot be told which sequence a call goes on with."""
        for origin in origins:
            if origin.mark in _DOUBTS:
                path = self._path(index)
                self._warn_once(f"{origin.mark} in {path}", _DOUBTS[origin.mark].format(path))

    def _say_news(self) -> None:
        """Say what was found since the last time that the user has to know."""
        news = self._journal.news
        while news:
            found = news.popleft()
            if isinstance(found, Unrecorded):
                self._say_unrecorded(found.module, found.reason)
            elif isinstance(found, str):
                self._warn_once(found, found)
            elif isinstance(found, Marked):
                self._say_origins(found.module, found.origins)
            else:
                number = None if found.call is None else self._before + found.call
                self._say([found._replace(call=number)])
        if self._background is not None:
            self._say(self._background.take_doubts())

    def _say(self, doubts: Iterable[Doubt]) -> None:
        for doubt in doubts if self._options.check != "off" else ():
            if self._options.check == "raise":
                raise ResidualError(doubt.message)
            self._warn_once(doubt.site.name, doubt.message, ResidualWarning)

    def _warn_once(
        self, about: str, message: str, category: type[GrutraceWarning] = GrutraceWarning
    ) -> None:
        # Without the lock: in a forked child nobody might be left to release it.
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, category, stacklevel=3)

    def _annotate(
        self, batches: RecordedBatches, name: str, given: Given, module: str | None
    ) -> None:
        if self._limits.reached or self._outlet.error is not None:
            # Nobody knows what was called since.
            for index in range(len(self._recorders)):
                batches.leave_out(index)
        try:
            self._drain()
            # At once, so that nobody empties the trace in between.
            with self._journal.lock:
                for annotation in batches.annotations(name, given, module):
                    self._outlet.append(annotation)
        except SinkError as error:
            if not self._goes_on(error):
                raise

    def _name_uncalled(self) -> None:
        indices = range(len(self._recorders))
        uncalled = [self._path(index) for index in indices if index not in self._called]
        stopped = self._limits.reached or self._outlet.error is not None
        if self._has_recorded and uncalled and not stopped:
            compiled = (
                "; or it was called within a graph of torch.compile, which is not heard "
                "(compiled='eager' runs compiled code as Python code while recording)"
                if compiler_is_loaded()
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


class _Weakly:
    """Calls a method of a tracer, as long as there is the tracer."""

    def __init__(self, tracer: Tracer, method: Callable[..., Any], *first: object) -> None:
        # By name: a subclass may have a method of its own.
        self._tracer, self._name, self._first = weakref.ref(tracer), method.__name__, first

    def __call__(self, *args: Any) -> Any:
        tracer = self._tracer()
        return None if tracer is None else getattr(tracer, self._name)(*self._first, *args)


def _close_dropped(
    tracer: weakref.ref[Tracer],
    subscriptions: list[Subscription | compiled_graphs.EagerCode],
    journal: Journal,
    outlet: Outlet,
    process: int,
) -> None:
    """Close what a tracer leaves behind that was dropped, or is there when the process ends."""
    if os.getpid() != process:
        return
    was_recording = bool(subscriptions)
    for subscription in subscriptions:
        subscription.stop()
    journal.collect(wait=True)
    with suppress(SinkError):
        outlet.sink.close()
    if tracer() is None and was_recording:
        warnings.warn(
            "a tracer was dropped while it recorded: it is closed, and what it had recorded is "
            "complete. Keep it in a variable, and close it",
            GrutraceWarning,
            stacklevel=2,
        )


def _require_tag(tag: object) -> None:
    if not isinstance(tag, str | None):
        raise OptionError(f"tag: expected a text, found {short_repr(tag)}")


#: The name for a ``with`` block: ``with grutrace.trace(model) as trace:``.
trace = Tracer
