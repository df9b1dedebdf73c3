"""Data types shared by recording and storage: modules, sites, records and the sink interface.

This module uses NumPy and plain Python only. Recording, with torch, creates the records; storage,
with HDF5, writes them.

Shapes use PyTorch's letters: B sequences in a batch, I input size, H hidden size, N rows of a
call (the steps of all its sequences).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

#: The gates, in the order in which PyTorch stacks their weights.
GATES = ("reset", "update", "candidate")

#: Quantities that are recorded by default.
DEFAULT_RECORD = (*GATES, "hidden")

#: Quantities that a forward pass makes.
FORWARD_QUANTITIES = (*DEFAULT_RECORD, "input")

#: All quantities that can be recorded. Each has one row per step. The gradient is the one that
#: arrives at each state from outside the recurrence: at the layer's output and, at the last step,
#: at the final state.
QUANTITIES = (*FORWARD_QUANTITIES, "gradient")

#: Prefix of the quantity under which values that the user logs are stored.
LOG_PREFIX = "log."

#: PyTorch's weight names without the layer suffix.
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def is_log_name(name: object) -> bool:
    """Return whether values can be logged under this name."""
    return (
        isinstance(name, str)
        and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) is not None
        and name not in QUANTITIES
    )


@dataclass(frozen=True)
class Site:
    """One direction of one layer of an nn.GRU, or one nn.GRUCell.

    Attributes:
        name: The module's path, a dot and the suffix, such as ``encoder.rnn.l0_reverse``; just the
            suffix if the path is empty.
        suffix: PyTorch's weight suffix, ``l0``, ``l0_reverse``, ``l1`` ...; ``cell`` for
            nn.GRUCell.
        layer: Index of the layer, from 0.
        reverse: Whether this direction reads its sequences from the last step to the first.
        input_size: Width of the layer's input. Above the first layer it is the hidden size times
            the number of directions.
        quantities: Stored quantities, in the order of `QUANTITIES`.
        derived: Quantities that are not stored but computed from the stored ones, in the same
            order.
        units: Indices of the recorded units, in the order of the columns of gates, hidden and
            initial states; None for all units. The input always has all its columns.
        logs: Names of the values that the user logs, and how many there are per step. They are
            stored at the first recorded site of a module, as quantities with `LOG_PREFIX`.
    """

    name: str
    suffix: str
    layer: int
    reverse: bool
    input_size: int
    quantities: tuple[str, ...]
    derived: tuple[str, ...] = ()
    units: tuple[int, ...] | None = None
    logs: tuple[tuple[str, int], ...] = ()

    @property
    def available_quantities(self) -> tuple[str, ...]:
        """Quantities that can be read, stored or deferred, in the order of `QUANTITIES`."""
        return tuple(name for name in QUANTITIES if name in (*self.quantities, *self.derived))


@dataclass(frozen=True)
class ModuleInfo:
    """An nn.GRU or nn.GRUCell of the model, and its recorded sites.

    Attributes:
        path: Path in the traced model; empty if it is the model itself.
        kind: ``GRU`` or ``GRUCell``.
        type: Qualified name of the class.
        dtype: NumPy name of the data type of the rows.
        weights_dtype: NumPy name of the data type of the weights.
        sites: Recorded sites, in PyTorch's order of layers and directions.
    """

    path: str
    kind: str
    type: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    dropout: float
    dtype: str
    weights_dtype: str
    sites: tuple[Site, ...]

    def unit_count(self, site: Site) -> int:
        """Return the number of recorded units of a site: U, or H if all are recorded."""
        return self.hidden_size if site.units is None else len(site.units)


@dataclass(frozen=True)
class TraceHeader:
    """Metadata of a trace, known when recording starts.

    Attributes:
        model: Qualified name of the traced model's class.
        created: Seconds since the epoch.
        versions: Versions of grutrace, torch, numpy, python and the platform, by name.
        options: Options of the tracer, as JSON values.
        modules: The traced modules. Records refer to a module by its index in this tuple.
    """

    model: str
    created: float
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    modules: tuple[ModuleInfo, ...]


@dataclass(frozen=True)
class SiteRows:
    """The rows of one call at one site.

    Attributes:
        rows: By quantity, (N, H), or (N, U) if only U units are recorded; (N, I) for the input.
            Sequences follow each other in batch order. Each is in time order, also for the reverse
            direction.
        initial: (sequences that start in this call, H or U) their initial states.
        residual: Largest ``|replayed h - kernel's h|`` of the call; NaN without a replay.
        tolerance: The largest residual that rounding can explain. Without a replay: 0 if every byte
            of the weights was compared when the call ran, else NaN.
        precision: Machine epsilon of the least precise data type that the kernel used. Rows may be
            stored in another type.
        is_attached: If gradients are recorded, whether they flow from the call to the states that
            it started from.
        loss_scale: If gradients are recorded, the factor of the loss; 0 if it is not known.
    """

    rows: Mapping[str, Array]
    initial: Array
    residual: float
    tolerance: float
    precision: float
    is_attached: bool = False
    loss_scale: float = 0.0


@dataclass(frozen=True)
class Fork:
    """A sequence that starts from a state inside another sequence, as in beam search.

    Attributes:
        sequence: Number of the new sequence.
        parent: Number of the sequence that it starts from.
        steps: Number of steps of the parent before the fork.
    """

    sequence: int
    parent: int
    steps: int


#: Marks for the start of a sequence. ``continued``: it is a segment of its parent, and starts from
#: a state that the model or the user changed. ``ambiguous``: several sequences had ended with the
#: state that it starts from. ``dropped``: its initial state, or its name, was no longer in memory.
MARKS = ("continued", "ambiguous", "dropped")

#: Reserved prefix of label names; see docs/format.md.
MARK_PREFIX = "grutrace:"

#: Prefix of the label, with the suffix of a site, that says what an intervention has set at a step.
SET_PREFIX = f"{MARK_PREFIX}set:"

#: Prefix of labels with the values of gates that an intervention has set, where gates are
#: recomputed on reading: ``grutrace:value:l0:update[3,7]``.
VALUE_PREFIX = f"{MARK_PREFIX}value:"


@dataclass(frozen=True)
class Origin:
    """A mark for the start of a sequence.

    Attributes:
        sequence: Number of the sequence.
        mark: One of `MARKS`. If it is ``continued``, a `Fork` names the parent.
    """

    sequence: int
    mark: str


@dataclass(frozen=True)
class CallRecord:
    """One recorded call of one module.

    The sequences of a module are numbered from 0 in the order in which they start. A batch row with
    the next unused number starts a sequence; any other row continues one.

    Attributes:
        module: Index of the module in the header.
        time: Seconds since the epoch.
        tag: The user's name for this part of the run; None without one.
        training: Whether the module was in training mode.
        weights: Version of the weights that the call used. Its `WeightsRecord` comes before.
        steps: (B,) number of steps of each batch row.
        sequences: (B,) number of the sequence that each batch row belongs to.
        sites: Rows by site suffix, for every recorded site of the module.
        forks: Forks among the sequences that start in this call.
        origins: Marks of the sequences that start in this call, if they have one.
        annotations: Annotations of the call's steps that are stored together with the call.
    """

    module: int
    time: float
    tag: str | None
    training: bool
    weights: int
    steps: npt.NDArray[np.uint32]
    sequences: npt.NDArray[np.uint64]
    sites: Mapping[str, SiteRows]
    forks: tuple[Fork, ...] = ()
    origins: tuple[Origin, ...] = ()
    annotations: tuple[AnnotationRecord, ...] = ()

    @property
    def is_proven(self) -> bool:
        """Whether no site's residual exceeds its tolerance."""
        return not any(site.residual > site.tolerance for site in self.sites.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and initial states. Rows that two sites share count once."""
        arrays = {
            id(array): array.nbytes
            for site in self.sites.values()
            for array in (*site.rows.values(), site.initial)
        }
        return sum(arrays.values())


@dataclass(frozen=True)
class SeriesRows:
    """The rows of several calls of one step at one site.

    Attributes:
        rows: By quantity, (n * B, H or U or I), call by call, each in batch order.
        initial: (sequences that start in these calls, H or U) their initial states.
        residuals: (n,) as `SiteRows.residual` of each call.
        tolerances: (n,) as `SiteRows.tolerance` of each call.
        precision: As `SiteRows.precision` of every call.
    """

    rows: Mapping[str, Array]
    initial: Array
    residuals: npt.NDArray[np.float64]
    tolerances: npt.NDArray[np.float64]
    precision: float


@dataclass(frozen=True)
class CallSeries:
    """Several calls of one module that are alike: n calls with one step of B sequences each.

    It says the same as n records of type `CallRecord`, in arrays.

    Attributes:
        module: Index of the module in the header.
        times: (n,) seconds since the epoch.
        tag: The user's name for this part of the run; None without one.
        training: Whether the module was in training mode.
        weights: Version of the weights that the calls used. Its `WeightsRecord` comes before.
        sequences: (n, B) number of the sequence that each batch row belongs to.
        begun: (n,) number of sequences that start in each call.
        sites: Rows by site suffix, for every recorded site of the module.
        forks: By index of the call, its forks, if it has any.
        origins: By index of the call, the marks of its sequences, if it has any.
    """

    module: int
    times: npt.NDArray[np.float64]
    tag: str | None
    training: bool
    weights: int
    sequences: npt.NDArray[np.uint64]
    begun: npt.NDArray[np.int64]
    sites: Mapping[str, SeriesRows]
    forks: Mapping[int, tuple[Fork, ...]] = field(default_factory=dict)
    origins: Mapping[int, tuple[Origin, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and initial states."""
        return sum(
            array.nbytes
            for site in self.sites.values()
            for array in (*site.rows.values(), site.initial)
        )

    def calls(self) -> list[CallRecord]:
        """Return the calls as single records, which share the memory of the rows."""
        batch = self.sequences.shape[1]
        ends = np.cumsum(self.begun)
        steps = np.ones(batch, np.uint32)
        calls = []
        for call, (time, sequences) in enumerate(
            zip(self.times.tolist(), self.sequences, strict=True)
        ):
            rows = slice(call * batch, (call + 1) * batch)
            begun = slice(int(ends[call] - self.begun[call]), int(ends[call]))
            sites = {
                suffix: SiteRows(
                    {quantity: values[rows] for quantity, values in site.rows.items()},
                    site.initial[begun],
                    float(site.residuals[call]),
                    float(site.tolerances[call]),
                    site.precision,
                )
                for suffix, site in self.sites.items()
            }
            common = self.module, time, self.tag, self.training, self.weights, steps, sequences
            of_call = self.forks.get(call, ()), self.origins.get(call, ())
            calls.append(CallRecord(*common, sites, *of_call))
        return calls


@dataclass(frozen=True)
class CallBatch:
    """Series of calls of one or more modules, appended at once.

    Attributes:
        series: One per module.
        order: (calls,) index of the series of each call, in the order of the calls.
    """

    series: tuple[CallSeries, ...]
    order: npt.NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and initial states."""
        return sum(series.nbytes for series in self.series)

    def calls(self) -> list[CallRecord]:
        """Return the calls as single records, in their order."""
        iterators = [iter(series.calls()) for series in self.series]
        return [next(iterators[index]) for index in self.order.tolist()]


@dataclass(frozen=True)
class WeightsRecord:
    """One version of a module's weights. It is appended before the first call that used it.

    Attributes:
        module: Index of the module in the header.
        version: Number of the version, from 0 for each module.
        sites: By suffix, then by name in `WEIGHTS`: weight_ih (3H, I), weight_hh (3H, H) and, if
            the module has biases, bias_ih and bias_hh (3H,).
    """

    module: int
    version: int
    sites: Mapping[str, Mapping[str, Array]]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for site in self.sites.values() for array in site.values())


@dataclass(frozen=True)
class AnnotationRecord:
    """Tokens or a label of one sequence, one value per step.

    Attributes:
        module: Index of the module in the header.
        sequence: Number of the sequence within the module.
        name: ``tokens``, or the name of the label.
        first: The step of the first value.
        values: One value per step: all texts, or all numbers (stored as float64).
    """

    module: int
    sequence: int
    name: str
    first: int
    values: tuple[str, ...] | tuple[float, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Estimated memory of the record while it waits to be written."""
        return 64 * (1 + len(self.values))


#: A record that a sink stores.
Record: TypeAlias = CallRecord | CallBatch | WeightsRecord | AnnotationRecord


#: Appends waiting records to the sink. Called with False, it returns at once if another thread is
#: doing so.
Collect: TypeAlias = Callable[[bool], None]


class Sink(Protocol):
    """Destination of records. `append` may be called from any thread."""

    @property
    def appended(self) -> int:
        """Number of records appended so far."""

    @property
    def has_failed(self) -> bool:
        """Whether the sink has failed, so that `append` raises an error."""

    def collect_from(self, collect: Collect) -> None:
        """Set the function that appends waiting records. A sink without a thread never calls it."""

    def gather(self) -> AbstractContextManager[None]:
        """Return a context in which appended records may wait, to be stored together at its end."""

    def append(self, record: Record) -> None:
        """Append a record. The sink owns its arrays: the caller must not change them."""

    def flush(self) -> None:
        """Wait until all appended records can be read and survive a crash of the process."""

    def close(self) -> None:
        """Flush and release everything. Closing twice does nothing."""
