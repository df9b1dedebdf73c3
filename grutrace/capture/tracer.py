"""The tracer: attach to a model, record on demand, detach, and read what was recorded."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from grutrace.capture.annotate import Given, RecordedBatches
from grutrace.capture.background import Background
from grutrace.capture.doubt import Doubt, doubts
from grutrace.capture.limits import LimitReached, Limits
from grutrace.capture.listen import Ear
from grutrace.capture.observe import Observation, Stacks
from grutrace.capture.options import (
    Check,
    Gates,
    OnError,
    Options,
    StoredType,
    Units,
    versions,
)
from grutrace.capture.outlet import Outlet
from grutrace.capture.recorder import ModuleRecorder
from grutrace.capture.recording import Recording
from grutrace.capture.selection import narrow
from grutrace.capture.sites import Selection, select
from grutrace.capture.surroundings import Missed, compiler_is_loaded
from grutrace.errors import (
    GrutraceWarning,
    OptionError,
    ResidualError,
    ResidualWarning,
    SinkError,
    StateError,
    TraceFileError,
    UnsupportedError,
)
from grutrace.record import DEFAULT_RECORD, Header
from grutrace.shard import ShardOption, chosen_shard, sharded
from grutrace.storage.moment import Moment
from grutrace.storage.sinks import (
    Compression,
    Mode,
    SinkMaker,
    open_sink,
    open_source,
    recorded_calls,
)
from grutrace.storage.trace import Trace

_IN_A_CHILD = (
    "a traced model was called in a forked child of the process that records it, where nothing is "
    "recorded: make a tracer in the child"
)


class Tracer(Trace):
    """Records the gates and states of a model's GRUs, and reads like a trace at any time.

    Hooks are on the model only while it records. As a context manager it records from entering,
    unless ``recording`` is False, and is closed on leaving.

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
            ``warn`` (once a site), ``raise`` or ``off``. It is done as soon as it is known: of
            gates in the background at a later call, when the trace is looked at, or on flushing or
            closing. Deferred gates are not checked here: `grutrace verify` checks them.
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

    Raises:
        OptionError: An option has no such value, or a glob matches no site; or there are a path and
            a sink, or a sink and deferred gates, or `fsync` or `compression` without a path.
        UnsupportedError: The model has no GRU.
        TraceFileError: The file exists, or cannot be written.
        MissingExtraError: `compression` is asked for and hdf5plugin is not installed.
    """

    #: What else is kept among the options of the trace.
    _stamp: Mapping[str, object] = {}

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
        sink: SinkMaker | None = None,
        on_error: OnError = "raise",
        fsync: bool = False,
        compression: Compression | None = None,
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
        )
        own = chosen_shard(shard) if path is not None or sink is not None else None
        path = None if path is None else sharded(Path(path), own)
        self._selections = narrow(self._select(model, sites, record), options)
        header = Header(
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
        self._seen = 0
        self._limits = self._limit(options)
        self._recorders = [
            ModuleRecorder(index, selection, self._outlet.append, options, self._limits)
            for index, selection in enumerate(self._selections)
        ]
        self._turns = [count() for _ in self._selections]
        self._record_on_enter, self._options = recording, options
        self._tag: str | None = None
        self._batches: RecordedBatches | None = None
        self._ears: list[Ear] = []
        self._lock = threading.RLock()
        self._called: set[int] = set()
        self._warned: set[str] = set()
        self._has_recorded = self._closed = False
        self._process = os.getpid()

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
        return bool(self._ears) and not self._limits.reached and self._outlet.error is None

    def start(self, tag: str | None = None) -> None:
        """Record from now on. Does nothing once ``max_calls`` or ``max_bytes`` is reached.

        Args:
            tag: A name that every call bears from now on.

        Raises:
            OptionError: The tag is no text.
            StateError: The tracer is closed.
        """
        if not isinstance(tag, str | None):
            raise OptionError(f"tag: expected a text, found {tag!r}")
        with self._lock:
            if self._closed:
                raise StateError("the tracer is closed: make a new one to record again")
            self._tag = tag
            # A run of days is not to end because it has been recorded enough.
            if self._ears or self._limits.reached:
                return
            self._has_recorded = True
            try:
                for index, selection in enumerate(self._selections):
                    receive = partial(self._receive, self._recorders[index])
                    wants = partial(self._wants, self._turns[index])
                    # Kept before it starts: an interruption must not leave its hooks behind.
                    ear = Ear(
                        selection.module,
                        receive,
                        self._options.stacks,
                        wants,
                        self._recorders[index].asked,
                    )
                    self._ears.append(ear)
                    self._ears[-1].start()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Stop recording and take all hooks off the model. The trace stays open."""
        with self._lock:
            deaf = []
            while self._ears:
                if not self._ears[-1].stop():
                    deaf.append(self._path(len(self._ears) - 1))
                self._ears.pop()
        for path in deaf:
            self._warn_once(
                path,
                f"somebody removed the hooks from {path} while it was recorded: its calls since "
                "then are not in the trace",
            )

    @contextmanager
    def recording(
        self,
        tag: str | None = None,
        *,
        tokens: Given | None = None,
        labels: Mapping[str, Given] | None = None,
    ) -> Iterator[Recording]:
        """Record within a ``with`` block, then go back to what was before.

        Args:
            tag: A name that every call within bears.
            tokens: As for `Recording.annotate`; given to what was recorded, when the block ends.
            labels: Likewise.

        Yields:
            The recording, for annotations that are known only after the model has run.
        """
        batches = RecordedBatches([each.description for each in self._selections])
        recording = Recording(self._annotate, batches)
        before = self.is_recording, self._tag, self._batches
        try:
            self.start(tag)
            self._batches = batches
            yield recording
            recording.annotate(tokens=tokens, labels=labels)
        finally:
            was_recording, self._tag, self._batches = before
            if not was_recording:
                self.stop()

    def flush(self) -> None:
        """Return once every recorded row is in the trace, and committed to the file if any.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
        """
        try:
            self._outlet.sink.flush()
        except SinkError as error:
            if not self._goes_on(error):
                raise
        self._say_doubts()

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
            self._say_doubts()

    def _finish(self) -> bool:
        """Stop recording and close the trace; whether it was open before."""
        self.stop()
        was_open, self._closed = not self._closed, True
        if was_open:
            try:
                self._outlet.sink.close()
            except SinkError as error:
                if not self._goes_on(error):
                    raise
            if self._outlet.error is not None:
                self._say_losses(*self._count_losses())
        return was_open

    def __enter__(self) -> Self:
        if self._closed:
            raise StateError("the tracer is closed: make a new one to record again")
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
            self._say_doubts()

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

    def _look(self) -> Moment:
        """Take in what was recorded since the last look, so that the trace is always up to date."""
        appended = self._outlet.records
        if appended != self._seen:
            self.refresh()
            self._seen = appended
            self._say_doubts()
        return super()._look()

    def _wants(self, turn: Iterator[int]) -> bool:
        """Whether the present call of a module is to be recorded. Asked once a call."""
        if not self._limits.reached:
            wanted = next(turn) % self._options.every == 0
            if wanted and self._outlet.error is not None and os.getpid() == self._process:
                self._outlet.count()
                return False
            return wanted
        # Reached by a call of another thread, or by another part of a run. In a forked child nobody
        # might be left to release the lock.
        if os.getpid() == self._process:
            self.stop()
        return False

    def _receive(self, recorder: ModuleRecorder, observation: Observation | Missed) -> None:
        if os.getpid() != self._process:
            self._warn_once("", _IN_A_CHILD)
            return
        index = self._recorders.index(recorder)
        self._called.add(index)
        if isinstance(observation, Missed):
            path = self._path(index)
            self._warn_once(path, f"a call of {path} was not recorded: {observation.reason}")
            return
        try:
            recorded = recorder.record(observation, self._tag)
        except UnsupportedError as error:
            path = self._path(index)
            self._warn_once(path, f"a call of {path} was not recorded: {error}")
            return
        except LimitReached:
            self.stop()
            return
        except SinkError as error:
            if not self._goes_on(error):
                raise
            return
        with self._lock:
            if self._batches is not None:
                self._batches.add(recorded)
        if self._limits.reached:
            self.stop()
        if self._background is not None:
            self._say_doubts()
        elif recorded.block is not None:
            self._say(doubts(recorder.description, recorded.block))

    def _say_doubts(self) -> None:
        """Say what was found outside the model's forward since the last time."""
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
        try:
            annotations = batches.annotations(name, given, module)
        except OptionError:
            if self._limits.reached:
                # What they belong to lies beyond the limit.
                return
            raise
        try:
            for annotation in annotations:
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
                ", but maybe within a graph that torch.compile made before it "
                "(torch.compiler.reset() discards those)"
            )
            warnings.warn(
                f"nothing was recorded of {', '.join(uncalled)}: no call while recording "
                "(layer.forward(x) is none, layer(x) is)"
                f"{compiled if compiler_is_loaded() else ''}",
                GrutraceWarning,
                stacklevel=3,
            )

    def _path(self, index: int) -> str:
        return self._selections[index].description.path or "the model"


#: The name for a ``with`` block: ``with grutrace.trace(model) as trace:``.
trace = Tracer
