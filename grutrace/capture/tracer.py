"""`Tracer`: attach to a model, start and stop recording, and read the trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import nn
from torch.amp import GradScaler

from grutrace.capture.differentiable.trace import DifferentiableTrace, Keep
from grutrace.capture.logged_values import LogNames
from grutrace.capture.model_recorder import ModelRecorder
from grutrace.capture.options import DTypeLike, Options, Units
from grutrace.capture.recording.annotations import AnnotationValues
from grutrace.capture.recording.recording_block import Recording, SequenceNamesLike
from grutrace.capture.selection import apply_options, records_gradient, select
from grutrace.capture.trace_output import TraceOutput
from grutrace.distributed import ShardOption
from grutrace.errors import OptionError, SinkError, reject_unknown_options, short_repr
from grutrace.options import (
    DEFAULT_BUFFER,
    DEFAULT_STATE_MEMORY,
    OPTIONS,
    Check,
    CompiledCode,
    Compression,
    Gates,
    Mode,
    OnError,
    Stacks,
    WeightChecks,
)
from grutrace.records import DEFAULT_RECORD
from grutrace.storage.open import SinkFactory
from grutrace.storage.read.snapshot import TraceSnapshot
from grutrace.storage.read.trace import Trace

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Tracer(Trace):
    """Record the gates and states of a model's GRUs while the model runs.

    A tracer is also a `grutrace.Trace`: it can be read at any time. It adds nothing to the model
    (no hook, no mode, no replaced forward); while it records, it intercepts the calls of PyTorch's
    GRU kernels. As a context manager it starts recording on entering and closes on leaving. A
    tracer that is garbage-collected without having been closed is closed then, with a warning.

    Examples:
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
        record: Quantities to record. They are reset, update, candidate, hidden, input and
            gradient: the gradient that arrives at each state in the backward pass. It includes
            hidden and input.
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
            weights count, and the labels and values of an intervention.
        dtype: Data type in which rows are stored. One of float16, float32 and float64, also for
            initial states; None keeps the type of each module. Weights keep the module's type.
            (netCDF-C, as in the package netCDF4, cannot read float16; h5py and h5netcdf can.)
        units: Units to record, as a list of numbers or a slice. Negative numbers count from the
            end. Gates and states have one column per unit, in the given order. None records all
            units.
        steps: Steps of each sequence to record, as a slice. Steps are counted over all calls of the
            sequence. None records all steps.
        log: Names of values to log beside the gates, or their numbers by name. `Tracer.log` takes
            them: ``("loss",)`` for one value per step, ``{"loss": 1, "attention": 8}`` for several.
        shard: Whether to write one file per rank of a distributed run. The file of rank 3 is
            ``run.rank0003.h5`` instead of ``run.h5``. True does so if torch.distributed is
            initialized, or torchrun started the process, with more than one process. False never
            does. A tuple ``(rank, world size)`` sets both.
        sink: A grutrace.Statistics that counts rows; without a path, instead of storing them. Then
            only the sites and the header of the trace can be read.
        on_error: What happens to the run if rows cannot be written. ``raise``: the model's next
            call, `flush` and `close` raise a `SinkError`. ``warn``: the model continues untraced; a
            warning says so at once, and another one on closing gives the number of lost calls. The
            model's output is the same in both cases.
        fsync: Whether every commit waits until the rows are on the disk. They then survive a loss
            of power; without it they survive only the death of the process.
        compression: Compression filter for the rows of the file. ``blosc2`` and ``zstd`` both
            shuffle bits first. ``gzip`` shuffles bytes; it is slower, but other programs read it
            without a plugin. Rows are then committed every 10 seconds instead of every half second.
            If the file is appended to, it keeps its filter.
        checksums: Whether each chunk of rows has a checksum. A bit that has flipped on the disk is
            then an error in every program that reads the row. Rows are committed every 10 seconds.
            If the file is appended to, it keeps its checksums, or stays without.
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
        buffer: Memory for recorded calls that wait to be stored. A number of bytes, or a text such
            as ``64 MiB``. While the model runs, short calls are only copied; their sequences and
            gates are worked out for many calls at once, at the latest when they hold so many bytes
            or have waited for 0.3 seconds.
        grad_scaler: The GradScaler whose scale recorded gradients are divided by. Its scale is
            stored with each call when gradients arrive, and ``site.gradient`` divides by it. The
            rows of ``gradient`` stay as they arrived. None stores no scale.

    Raises:
        OptionError: An option has an invalid value, a glob matches no site, or options exclude each
            other: a sink and deferred gates, or `fsync`, `compression` or `checksums` without a
            path.
        UnsupportedError: The model contains no GRU.
        TraceFileError: The file exists, or cannot be written.
        MissingExtraError: `compression` needs hdf5plugin, which is not installed.
    """

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
        log: LogNames | None = None,
        shard: ShardOption = True,
        sink: SinkFactory | None = None,
        on_error: OnError = "raise",
        fsync: bool = False,
        compression: Compression | None = None,
        checksums: bool = False,
        weights: WeightChecks = "auto",
        compiled: CompiledCode = "auto",
        state_memory: int | str = DEFAULT_STATE_MEMORY,
        buffer: int | str = DEFAULT_BUFFER,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        selections = select(model, sites, record)
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
            log=log,
            has_sink=sink is not None,
            to_file=path is not None,
            on_error=on_error,
            fsync=fsync,
            compression=compression,
            checksums=checksums,
            weights=weights,
            compiled=compiled,
            state_memory=state_memory,
            buffer=buffer,
            grad_scaler=grad_scaler,
            records_gradient=records_gradient(selections),
        )
        selections = apply_options(selections, options)
        output = TraceOutput(model, selections, options, path, mode, sink, shard)
        super().__init__(output.source)
        self._recorder = ModelRecorder(model, selections, options, output)
        self._journal, self._guarded_sink = self._recorder.journal, output.guarded_sink
        self._records_on_enter = recording
        self._shown_records = 0

    @property
    def is_recording(self) -> bool:
        """Whether calls of the model are being recorded.

        False once ``max_calls`` or ``max_bytes`` is reached, and while the run continues after the
        sink has failed.
        """
        return self._recorder.is_recording

    def start(self, tag: str | None = None) -> None:
        """Start recording. Does nothing once ``max_calls`` or ``max_bytes`` is reached.

        Examples:
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
        self._recorder.start(tag)

    def stop(self) -> None:
        """Stop recording, in all recording blocks. The trace stays open."""
        self._recorder.stop()

    def pause(self) -> None:
        """Leave out calls until `resume`: between the batches of a training, for example.

        `stop` and `start` do the same, but record at once what waits, and look at all weights. For
        a tracer that was started, not within a `recording` block.
        """
        self._recorder.pause()

    def resume(self, tag: str | None = None) -> None:
        """Record calls again after `pause`; start if recording has not started.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> model = torch.nn.GRU(4, 3)
            >>> with grutrace.Tracer(model, recording=False) as tracer:
            ...     for step in range(3):
            ...         tracer.resume(tag=f"train step={step}")
            ...         output, final = model(torch.randn(5, 2, 4))
            ...         tracer.pause()
            ...         output, final = model(torch.randn(5, 2, 4))
            >>> tracer.calls["tag"].tolist()
            ['train step=0', 'train step=1', 'train step=2']

        Args:
            tag: A name for the calls from now on.

        Raises:
            OptionError: The tag is not a text.
            StateError: The tracer is closed.
        """
        self._recorder.resume(tag)

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

        Examples:
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
        with self._recorder.record_block(tag, tokens, labels, sequences) as recording:
            yield recording

    @reject_unknown_options
    def log(self, name: str, values: Any, *, module: str | None = None) -> None:
        """Record values beside the gates of the same steps: a loss, a logit, an attention.

        They belong to the latest recorded call of a module, and are stored with it. So log them
        after the call, before the next call of that module, and before the trace is read or flushed
        or the recording block ends. A decoder that calls its layer for each step logs each step.
        Steps without values have NaN.

        Args:
            name: A name that was declared: ``grutrace.trace(model, log=("loss",))``.
            values: A tensor or array, (T, B) or (T, B, n), in the layout of the layer: (B, T) or
                (B, T, n) for one with ``batch_first``; (B,) or (B, n) for a single step. Values
                beyond the end of a packed sequence are ignored. They are copied, and stored in the
                type of the rows.
            module: Path or glob of a module. Without it, the values go to the latest call of every
                module that has this shape.

        Raises:
            OptionError: The name was not declared, or no latest call has this shape.
            StateError: Nothing is being recorded, or the call was stored already.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, log=("loss",)) as trace:
            ...     output, state = gru(torch.randn(5, 4, 2))
            ...     trace.log("loss", output.square().sum(-1))     # 5 steps, 4 sequences
            >>> trace["l0"]["loss"].shape, trace["l0"].sequence(3).rows("loss").shape
            ((20, 1), (5, 1))
        """
        self._recorder.log(name, values, module)

    def flush(self) -> None:
        """Wait until every recorded row is in the trace and, with a file, committed to it.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
        """
        self._recorder.flush()
        self._recorder.report_findings()

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
        self._recorder.clear(super().clear)

    def refresh(self) -> None:
        """Show the rows recorded since the last refresh; if the sink failed, those that it stored.

        Raises:
            SinkError: The rows could not be stored, and ``on_error`` is ``raise``.
            TraceFileError: The file is damaged.
        """
        try:
            super().refresh()
        except SinkError as error:
            if not self._recorder.continue_untraced(error):
                raise
            super().refresh()

    def close(self) -> None:
        """Stop recording and close the trace. It can still be read. Closing twice does nothing.

        Raises:
            SinkError: Rows could not be stored, and ``on_error`` is ``raise``.
        """
        if self._recorder.close():
            self._recorder.warn_of_uncalled_modules()
            self._recorder.report_findings()

    def __enter__(self) -> Self:
        self._recorder.require_open()
        if self._records_on_enter:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._recorder.close() and kind is None:
            self._recorder.warn_of_uncalled_modules()
            self._recorder.report_findings()

    def _refresh_snapshot(self) -> TraceSnapshot:
        """Refresh the snapshot, so that reading shows every recorded row."""
        if len(self._journal):
            with suppress(SinkError):
                self._recorder.drain()
        records = self._guarded_sink.records
        if records != self._shown_records:
            self.refresh()
            self._shown_records = records
            # Includes the memory of gates that were computed just now.
            self._recorder.warn_if_large()
        self._recorder.report_findings()
        return super()._refresh_snapshot()


class TracerOptions(TypedDict, total=False):
    """The options of `Tracer`, for type checkers."""

    sites: str | Sequence[str] | None
    record: str | Sequence[str]
    gates: Gates
    recording: bool
    mode: Mode
    stacks: Stacks
    check: Check
    every: int
    max_calls: int | None
    max_bytes: int | None
    dtype: DTypeLike | None
    units: Units | None
    steps: slice | None
    log: LogNames | None
    shard: ShardOption
    sink: SinkFactory | None
    on_error: OnError
    fsync: bool
    compression: Compression | None
    checksums: bool
    weights: WeightChecks
    compiled: CompiledCode
    state_memory: int | str
    buffer: int | str
    grad_scaler: GradScaler | None


@overload
def trace(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    differentiable: Literal[False] = False,
    **options: Unpack[TracerOptions],
) -> Tracer: ...


@overload
def trace(
    model: nn.Module,
    path: None = None,
    *,
    differentiable: Literal[True],
    sites: str | Sequence[str] | None = None,
    keep: Keep = "all",
    recording: bool = True,
    stacks: Stacks = "auto",
    check: Check = "warn",
    compiled: CompiledCode = "auto",
    state_memory: int | str = DEFAULT_STATE_MEMORY,
) -> DifferentiableTrace: ...


def trace(
    model: nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    differentiable: bool = False,
    **options: Any,
) -> Tracer | DifferentiableTrace:
    """Trace the GRUs of a model: ``with grutrace.trace(model) as trace:``.

    Args:
        model: A model that contains nn.GRU or nn.GRUCell modules, or such a module.
        path: The file to write to. None keeps the trace in memory.
        differentiable: Whether the gates are tensors in the graph of the model's forward, for a
            loss on gates and for the gradients of gates. They are in memory only.
        options: Options of `Tracer` or, if differentiable, of `DifferentiableTrace`.

    Returns:
        A `Tracer` or, if differentiable, a `DifferentiableTrace`.

    Raises:
        OptionError: An option is unknown or has an invalid value, or does not go together with
            ``differentiable=True``.
        UnsupportedError: The model contains no GRU.
        TraceFileError: The file exists, or cannot be written.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> model = torch.nn.GRU(4, 3)
        >>> with grutrace.trace(model) as trace:
        ...     output, final = model(torch.randn(5, 2, 4))
        >>> trace["l0"].update.shape
        (10, 3)
        >>> with grutrace.trace(model, differentiable=True) as trace:
        ...     output, final = model(torch.randn(5, 2, 4))
        >>> trace["l0"].update.requires_grad
        True
    """
    if not isinstance(differentiable, bool):
        raise OptionError(
            f"differentiable: expected True or False, found {short_repr(differentiable)}"
        )
    if not differentiable:
        return Tracer(model, path, **options)
    if path is not None:
        raise OptionError(
            "path: expected None with differentiable=True, because its tensors belong to the "
            f"model's graph and go to no file; found {short_repr(path)}. To store gates or "
            "gradients, use a second grutrace.trace(model, path)"
        )
    for name in options:
        if name in OPTIONS and name not in DIFFERENTIABLE_OPTIONS:
            raise OptionError(
                f"{name}: not an option with differentiable=True, whose gates are computed when "
                f"they are read; the options are {', '.join(DIFFERENTIABLE_OPTIONS)}"
            )
    return DifferentiableTrace(model, **options)


#: Names of the options of `DifferentiableTrace`.
DIFFERENTIABLE_OPTIONS = tuple(signature(DifferentiableTrace).parameters)[1:]
