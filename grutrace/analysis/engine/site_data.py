"""The data that analyses read: a site of a trace, or arrays.

N rows (steps of all sequences), S sequences, H units, I input size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import numpy as np

from grutrace.arrays.reopen import SnapshotHandle
from grutrace.errors import NotRecordedError, OptionError, StateError, join_names
from grutrace.records import DEFAULT_RECORD, QUANTITIES, Array, Site
from grutrace.reprs import fields_repr
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.annotations import LabelColumn, encode_labels
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import Restarts


@dataclass(frozen=True, eq=False)
class SiteArrays:
    """Arrays that replace a site of a trace: NumPy's, h5py's, Zarr's or dask's.

    The steps of all sequences are concatenated, each sequence in time order, in every quantity
    alike.

    Attributes:
        lengths: (S,) number of steps of each sequence; None for one sequence of all rows.
        reset: (N, H) reset gate.
        update: (N, H) update gate, PyTorch's: where it is 1 the previous state is kept.
        candidate: (N, H) candidate state.
        hidden: (N, H) hidden state.
        input: (N, I) input of the layer.
        gradient: (N, H) total gradient of a loss with respect to the hidden state.
        initial: (S, H) initial state of each sequence; None for zeros.
        labels: By name, (N,) or a list: a number or a text for each row; None or NaN for no label.
        weights: By PyTorch's names without suffix: weight_ih (3H, I), weight_hh (3H, H), bias_ih
            and bias_hh (3H,), in the order reset, update, candidate.
        reverse: Whether the layer reads its sequences from the last step to the first.
        name: Name of the site in results.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, moments
        >>> two_sequences = SiteArrays(hidden=np.zeros((50, 16)), lengths=[20, 30])
        >>> moments(two_sequences).steps
        50
    """

    lengths: Any = None
    reset: Any = None
    update: Any = None
    candidate: Any = None
    hidden: Any = None
    input: Any = None
    gradient: Any = None
    initial: Any = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    reverse: bool = False
    name: str = "arrays"

    __repr__ = fields_repr


class SiteData(ABC):
    """A site as analyses read it. It does not change while it is read.

    Attributes:
        name: Full name of the site.
        reverse: Whether its sequences are read from the last step to the first.
        lengths: (S,) number of steps of each sequence.
        units: (H,) number of the unit in each column.
        quantities: Names of the quantities that can be read.
        stored: Names of those that are stored as recorded, not derived.
        label_names: Names of the labels that some rows have, including ``tokens``.
        can_read_in_other_process: Whether other processes can read the site.
        columns: Extra columns of each row, by name; see `with_columns`.
        dask: Whether analyses run on dask; see `map_reduce.with_dask`.
        advance: Progress callback: number of finished parts, number of all parts.
    """

    name: str
    reverse: bool
    lengths: Integers
    units: Integers
    quantities: tuple[str, ...]
    stored: tuple[str, ...]
    label_names: tuple[str, ...]
    can_read_in_other_process: bool = True
    columns: Mapping[str, Rows] = MappingProxyType({})
    dask: bool = False
    advance: Callable[[int, int], None] | None = None

    @property
    def precision(self) -> float:
        """Machine epsilon of the most precise type the kernel computed in; 0 if unknown."""
        return 0.0

    def rows(self, quantity: str) -> Rows:
        """Return all rows of a quantity, (N, H) or (N, I), or extra columns, in storage order.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        return self.columns[quantity] if quantity in self.columns else self._rows(quantity)

    @abstractmethod
    def _rows(self, quantity: str) -> Rows: ...

    def total_gradient(self) -> Rows:
        """Return the total gradient of the state of each row, (N, H), in storage order.

        Raises:
            NotRecordedError: The gradient was not recorded.
        """
        return self.rows("gradient")

    def detached_steps(self) -> Mapping[int, Integers]:
        """Return by sequence the steps, after the first, to whose previous state no gradient flows.

        Sequences without such steps are left out.
        """
        return {}

    @abstractmethod
    def rows_between(self, first: int, last: int) -> slice | Integers:
        """Return the row numbers of sequences `first` to `last` - 1, each in time order."""

    @abstractmethod
    def initial(self, first: int, last: int) -> Array:
        """Return the initial states of these sequences: (last - first, H)."""

    @abstractmethod
    def versions(self, rows: slice | Integers) -> Integers:
        """Return the version of the weights that computed each of these rows."""

    @abstractmethod
    def weights(self, version: int) -> Mapping[str, Array]:
        """Return one version of the weights by PyTorch's names without suffix; -1 for the last.

        Raises:
            NotRecordedError: The weights were not recorded.
        """

    @abstractmethod
    def labels(self, name: str) -> LabelColumn:
        """Return the label of every row, or its token for ``tokens``; rows as in `rows`.

        Raises:
            NotRecordedError: No row has a label of this name; the message lists the names.
        """

    @property
    @abstractmethod
    def parents(self) -> Integers:
        """(S,) the sequence that each sequence branched from; -1 for none."""

    def restarts(self, first: int, last: int) -> Restarts:  # noqa: ARG002
        """Return where these sequences restart from a state that they had not reached."""
        none = np.empty(0, np.int64)
        return Restarts(none, none, np.empty((0, len(self.units))))

    def require(self, *quantities: str) -> None:
        """Check early that an analysis can read what it needs.

        Raises:
            NotRecordedError: A quantity was not recorded; the message lists those that were.
        """
        for quantity in quantities:
            if quantity not in self.quantities and quantity not in self.columns:
                recorded = ", ".join(self.quantities) or "nothing"
                raise NotRecordedError(
                    f"{self.name!r} has no {quantity!r}, which this analysis needs; "
                    f"it has {recorded}"
                )

    def __getstate__(self) -> dict[str, Any]:
        # The progress callback stays in the process that started the analysis.
        return self.__dict__ | {"advance": None}

    @property
    def steps(self) -> int:
        """N, of all sequences together."""
        return int(self.lengths.sum())


class _TraceSiteData(SiteData):
    """A site of a trace, frozen when the analysis began."""

    def __init__(self, site: SiteTrace) -> None:
        self._site = site.frozen()
        self.name, self.reverse = site.name, site.site.reverse
        self.lengths = self._site.lengths
        self.quantities, self.stored = site.site.available_quantities, site.site.quantities
        self.label_names = self._site.label_names
        self.can_read_in_other_process = not SnapshotHandle(self._site.snapshot).in_memory
        units = range(site.module.hidden_size) if site.units is None else site.units
        self.units = np.array(units, np.int64)
        self._latest: tuple[int, Mapping[str, Array]] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle how to open the file again, for a worker in another process."""
        number, snapshot = self._site.module_index, self._site.snapshot
        calls = snapshot.extent(number).calls
        arguments = SnapshotHandle(snapshot), number, self._site.site, calls
        return _reopen_site_data, arguments, {"dask": self.dask, "columns": dict(self.columns)}

    @property
    def precision(self) -> float:
        return float(self._site.checks["precision"].min(initial=np.inf))

    def _rows(self, quantity: str) -> Rows:
        return self._site.rows(quantity)

    def total_gradient(self) -> Rows:
        return self._site.gradient("hidden")

    def detached_steps(self) -> Mapping[int, Integers]:
        module, snapshot = self._site.module_index, self._site.snapshot
        index = snapshot.index(module)
        attached = snapshot.backward(module, self._site.site)["attached"] > 0
        calls = np.searchsorted(index.call_numbers, index.calls)
        pieces = np.flatnonzero(~attached[calls] & (index.steps > 0) & (index.steps_before > 0))
        # By sequence; the pieces of each are in time order.
        pieces = pieces[np.argsort(index.sequences[pieces], kind="stable")]
        sequences, first = np.unique(index.sequences[pieces], return_index=True)
        steps = np.split(index.steps_before[pieces], first[1:])
        return dict(zip(sequences.tolist(), steps, strict=False))

    def rows_between(self, first: int, last: int) -> slice | Integers:
        return self._site.rows_between(first, last)

    def initial(self, first: int, last: int) -> Array:
        return np.asarray(self._site.initial[first:last])

    def restarts(self, first: int, last: int) -> Restarts:
        return self._site.restarts(first, last)

    def versions(self, rows: slice | Integers) -> Integers:
        return self._site.row_versions(rows)

    def weights(self, version: int) -> Mapping[str, Array]:
        # Cached for consecutive sequences with the same weights.
        latest = self._latest
        if latest is None or latest[0] != version:
            latest = self._latest = version, self._site.weights(version)
        return latest[1]

    def labels(self, name: str) -> LabelColumn:
        return self._site.row_labels(name)

    @property
    def parents(self) -> Integers:
        return self._site.parents


def _reopen_site_data(
    handle: SnapshotHandle, number: int, site: Site, calls: int
) -> _TraceSiteData:
    with handle.snapshot(number, calls) as snapshot:
        present = snapshot.extent(number).calls
        if present != calls:
            raise StateError(
                f"the trace of {site.name} has grown from {calls} to {present} calls while it was "
                "analysed in another process: close it first, or analyse it in this process"
            )
        return _TraceSiteData(SiteTrace(lambda: snapshot, number, site))


class _ArraySiteData(SiteData):
    """Arrays whose shapes were checked."""

    def __init__(self, arrays: SiteArrays) -> None:
        self._arrays = {
            name: _require_2d(name, getattr(arrays, name))
            for name in QUANTITIES
            if getattr(arrays, name) is not None
        }
        if not self._arrays:
            raise OptionError(f"SiteArrays: expected one of {', '.join(QUANTITIES)}; found none")
        self.name, self.reverse = arrays.name, arrays.reverse
        self.quantities = self.stored = tuple(self._arrays)
        counts = {name: rows.shape[0] for name, rows in self._arrays.items()}
        total = next(iter(counts.values()))
        lengths = np.array([total] if arrays.lengths is None else arrays.lengths, np.int64)
        for name, count in counts.items():
            if count != lengths.sum():
                raise OptionError(
                    f"SiteArrays.{name}: expected {lengths.sum()} rows, as the lengths add up to, "
                    f"found {count}"
                )
        self.lengths = lengths
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        widths = {name: rows.shape[1] for name, rows in self._arrays.items() if name != "input"}
        if len(set(widths.values())) > 1:
            raise OptionError(f"SiteArrays: expected one number of units, found {widths}")
        self.units = np.arange(next(iter(widths.values()), 0))
        shape = len(lengths), len(self.units)
        self._initial = np.zeros(shape) if arrays.initial is None else np.asarray(arrays.initial)
        if self._initial.shape != shape:
            raise OptionError(
                f"SiteArrays.initial: expected shape {shape}, found {self._initial.shape}"
            )
        self._weights = dict(arrays.weights)
        self._labels = dict(arrays.labels)
        self.label_names = tuple(self._labels)
        for name, values in self._labels.items():
            if len(values) != total:
                raise OptionError(
                    f"SiteArrays.labels[{name!r}]: expected {total} values, one a row, "
                    f"found {len(values)}"
                )

    def _rows(self, quantity: str) -> Rows:
        self.require(quantity)
        rows: Rows = self._arrays[quantity]
        return rows

    def rows_between(self, first: int, last: int) -> slice | Integers:
        return slice(int(self._ends[first]), int(self._ends[last]))

    def initial(self, first: int, last: int) -> Array:
        return np.asarray(self._initial[first:last])

    def versions(self, rows: slice | Integers) -> Integers:
        count = len(range(*rows.indices(self.steps))) if isinstance(rows, slice) else len(rows)
        return np.zeros(count, np.int64)

    def weights(self, version: int) -> Mapping[str, Array]:
        if not self._weights or version not in (0, -1):
            raise NotRecordedError(f"{self.name!r} has no weights of version {version}")
        return self._weights

    def labels(self, name: str) -> LabelColumn:
        if name not in self._labels:
            raise NotRecordedError(
                f"there is no label {name!r}; there are: {join_names(self._labels)}"
            )
        return encode_labels(name, self._labels[name])

    @property
    def parents(self) -> Integers:
        return np.full(len(self.lengths), -1)


def _require_2d(name: str, rows: Any) -> Any:
    shape = getattr(rows, "shape", None)
    if shape is None or len(shape) != 2:
        raise OptionError(f"SiteArrays.{name}: expected an array (rows, width), found {shape}")
    return rows


#: Everything that an analysis accepts as a site.
SiteLike: TypeAlias = SiteTrace | SiteArrays | SiteData


def as_site_data(site: SiteLike) -> SiteData:
    """Convert a site of a trace, or arrays, to `SiteData`.

    Raises:
        OptionError: It is neither, or the shapes of the arrays do not match.
    """
    if isinstance(site, SiteData):
        return site
    if isinstance(site, SiteTrace):
        return _TraceSiteData(site)
    if isinstance(site, SiteArrays):
        return _ArraySiteData(site)
    raise OptionError(
        "site: expected a site of a trace, trace['encoder.l0'], or SiteArrays(update=..., ...); "
        f"found {type(site).__name__}"
    )


SiteDataT = TypeVar("SiteDataT", bound=SiteData)


def with_columns(site: SiteDataT, columns: Mapping[str, Rows]) -> SiteDataT:
    """Return the same site with extra columns for each of its rows.

    Args:
        site: The site.
        columns: By a name that is not a quantity of the site, (N, any width), in storage order.
    """
    for name, rows in columns.items():
        if rows.shape[0] != site.steps:
            raise OptionError(f"{name}: expected {site.steps} rows, found {rows.shape[0]}")
    extended = object.__new__(type(site))
    extended.__dict__.update(site.__dict__, columns=dict(columns))
    return extended


def row_bytes(site: SiteData, quantities: Sequence[str]) -> int:
    """Return the size of one row of some quantities, in bytes."""
    rows = [site.rows(name) for name in quantities]
    return sum(array.shape[1] * array.dtype.itemsize for array in rows)


def unit_quantities(site: SiteData) -> tuple[str, ...]:
    """Return the quantities of a site that have one column a unit.

    Raises:
        NotRecordedError: There are none.
    """
    names = tuple(name for name in DEFAULT_RECORD if name in site.quantities)
    if not names:
        raise NotRecordedError(
            f"{site.name!r} has neither gates nor states; it has {', '.join(site.quantities)}"
        )
    return names


def sequence_ids(site: SiteData) -> Integers:
    """Return the sequence of each row, in the smallest integer type: (N,)."""
    count = len(site.lengths)
    numbers = np.arange(count, dtype=np.min_scalar_type(-max(1, count)))
    return _in_storage_order(site, np.repeat(numbers, site.lengths))


def step_ids(site: SiteData) -> Integers:
    """Return the step of each row within its sequence, in time order: (N,)."""
    return _in_storage_order(site, steps_of_sequences(site.lengths))


def steps_of_sequences(lengths: Integers) -> Integers:
    """Return the steps 0, 1, ... of each sequence, one sequence after another: (N,)."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def _in_storage_order(site: SiteData, values: Array) -> Array:
    """Reorder (N,) values of consecutive sequences as the rows are stored."""
    stored = np.empty_like(values)
    stored[site.rows_between(0, len(site.lengths))] = values
    return stored
