"""The shared vocabulary: what is traced, and the records that flow from a model to a sink.

Everything here is NumPy and plain Python. torch ends where these records are made, and HDF5
begins after them.

Shapes use PyTorch's letters: B sequences in a batch, I input size, H hidden size, N rows of a
call, which is the number of steps of all its sequences together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

#: The three gates, in the order in which PyTorch stacks their weights.
GATES = ("reset", "update", "candidate")

#: What is recorded unless asked otherwise.
DEFAULT_RECORD = (*GATES, "hidden")

#: Everything that can be recorded, one row a step.
QUANTITIES = (*DEFAULT_RECORD, "input")

#: PyTorch's weight names without the layer suffix.
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Site:
    """One direction of one layer (or one nn.GRUCell): the place where gates are seen.

    Attributes:
        name: The module's path, a dot, and the suffix: ``encoder.rnn.l0_reverse``. Without the
            dot when the path is empty.
        suffix: PyTorch's weight suffix, ``l0``, ``l0_reverse``, ``l1`` ...; ``cell`` for
            nn.GRUCell.
        layer: Number of the layer, from 0.
        reverse: Whether this direction reads its sequences from the last step to the first.
        input_size: Width of what this layer reads: for layers above the first, the hidden size
            times the number of directions.
        quantities: What is stored here, in the order of `QUANTITIES`.
        derived: What is not stored here but follows from what is, in the same order.
        units: Which of the H units are recorded, in the order of the columns of the gates, the
            hidden and the initial states; None for all. The input has all its columns.
    """

    name: str
    suffix: str
    layer: int
    reverse: bool
    input_size: int
    quantities: tuple[str, ...]
    derived: tuple[str, ...] = ()
    units: tuple[int, ...] | None = None

    @property
    def available_quantities(self) -> tuple[str, ...]:
        """What a reader gets, stored or derived, in the order of `QUANTITIES`."""
        return tuple(name for name in QUANTITIES if name in (*self.quantities, *self.derived))


@dataclass(frozen=True)
class ModuleInfo:
    """One nn.GRU or nn.GRUCell of the model, with the sites that are recorded in it.

    Attributes:
        path: Its path in the traced model; empty if it is the traced model itself.
        kind: ``GRU`` or ``GRUCell``.
        type: Qualified name of its class.
        dtype: NumPy name of the type in which its rows are kept.
        weights_dtype: NumPy name of the type in which its weights are kept.
        sites: Its recorded sites, in PyTorch's order of layers and directions.
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
        """How many units of one of its sites are recorded: U, or H where all are."""
        return self.hidden_size if site.units is None else len(site.units)


@dataclass(frozen=True)
class TraceHeader:
    """What is known when a trace begins.

    Attributes:
        model: Qualified name of the traced model's class.
        created: Seconds since the epoch.
        versions: Versions of grutrace, torch, numpy, python and the platform, by name.
        options: The options of the trace; JSON values only.
        modules: The traced modules; a record names one by its place here.
    """

    model: str
    created: float
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    modules: tuple[ModuleInfo, ...]


@dataclass(frozen=True)
class SiteRows:
    """What one call recorded at one site.

    Attributes:
        rows: By quantity, (N, H), or (N, U) where U units are recorded, or (N, I) for the input:
            the sequences one after another in the order of the batch, each in time order, also for
            the reverse direction.
        initial: (sequences begun by this call, H or U): the state that each of them started from.
        residual: Largest ``|replayed h - kernel's h|`` of the call; NaN where nothing was replayed.
        tolerance: The residual that rounding explains, in the same unit. Where nothing was
            replayed: 0 if every byte of the weights was compared with those of the version when
            the call ran, else NaN.
        precision: Spacing at 1 of the coarsest type in which the kernel computed. Rows may be kept
            in another.
    """

    rows: Mapping[str, Array]
    initial: Array
    residual: float
    tolerance: float
    precision: float


@dataclass(frozen=True)
class Fork:
    """A sequence that began from a state in the middle of another one (beam search).

    Attributes:
        sequence: The sequence that began.
        parent: The sequence that it began from.
        steps: How many of the parent's steps had been made by then.
    """

    sequence: int
    parent: int
    steps: int


#: What a mark says of how a sequence began. ``continued``: it is a segment of its parent, which
#: goes on from a state that the model or the user changed. ``ambiguous``: it started from a state
#: that several sequences had ended with. ``dropped``: it started from a state, or has a name, that
#: was no longer in memory.
MARKS = ("continued", "ambiguous", "dropped")

#: No label of the user's has a name that begins so: see docs/format.md.
MARK_PREFIX = "grutrace:"


@dataclass(frozen=True)
class Origin:
    """A mark of how a sequence began.

    Attributes:
        sequence: The sequence that began.
        mark: One of `MARKS`. Of a sequence that is ``continued``, a `Fork` names the parent.
    """

    sequence: int
    mark: str


@dataclass(frozen=True)
class CallRecord:
    """One recorded call of one module.

    A sequence's number is its place in the order in which the module's sequences began. A batch
    row whose number is the next unused one begins a sequence; any other continues one.

    Attributes:
        module: Place of the module in the header.
        time: Seconds since the epoch.
        tag: The user's name for this part of the run, if any.
        training: Whether the module was in training mode.
        weights: Version of the weights that the call used, announced earlier as `WeightsRecord`.
        steps: (B,) number of steps of each batch row.
        sequences: (B,) number of the sequence that each batch row is a piece of.
        sites: By suffix, what was recorded; every recorded site of the module.
        forks: Origins of those sequences that began from the middle of another.
        origins: Marks of those sequences that began, where there is one.
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

    @property
    def is_proven(self) -> bool:
        """Whether no site's residual is larger than rounding explains."""
        return not any(site.residual > site.tolerance for site in self.sites.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its rows and initial states. Rows that two sites share count once."""
        arrays = {
            id(array): array.nbytes
            for site in self.sites.values()
            for array in (*site.rows.values(), site.initial)
        }
        return sum(arrays.values())


@dataclass(frozen=True)
class WeightsRecord:
    """One version of a module's weights, appended before the first block that used it.

    Attributes:
        module: Place of the module in the header.
        version: Versions of a module count from 0.
        sites: By suffix, then by name in `WEIGHTS`: weight_ih (3H, I), weight_hh (3H, H) and,
            if the module has them, bias_ih and bias_hh (3H,).
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
    """Tokens or a label of one sequence, one value a step.

    Attributes:
        module: Place of the module in the header.
        sequence: Number of the sequence within the module.
        name: ``tokens``, or the label's name.
        first: The step that the first value belongs to.
        values: One value a step, all text or all numbers (kept as float64).
    """

    module: int
    sequence: int
    name: str
    first: int
    values: tuple[str, ...] | tuple[float, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """An estimate of the memory it takes while it waits to be written."""
        return 64 * (1 + len(self.values))


#: What a sink takes.
Record: TypeAlias = CallRecord | WeightsRecord | AnnotationRecord


#: Appends records to a sink that wait elsewhere. If it is given False, it does not wait for another
#: thread that does so.
Collect: TypeAlias = Callable[[bool], None]


class Sink(Protocol):
    """Where records go. `append` may be called from any thread."""

    @property
    def has_failed(self) -> bool:
        """Whether `append` will raise from now on."""

    def collect_from(self, collect: Collect) -> None:
        """Have records that wait elsewhere collected; a sink without a thread never does."""

    def gather(self) -> AbstractContextManager[None]:
        """Return a context: what is appended in it may wait for its end, to be stored together."""

    def append(self, record: Record) -> None:
        """Take a record. Its arrays belong to the sink from now on; nobody changes them."""

    def flush(self) -> None:
        """Return once everything appended so far can be read back, and would survive a crash."""

    def close(self) -> None:
        """Flush and release everything. Closing twice does nothing."""
