"""A site of a trace as an xarray Dataset with lazily loaded variables and coordinates.

N steps, S sequences, L steps of the longest sequence, H units, I features.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from grutrace.arrays.coordinates import (
    AnnotationColumn,
    CallNumbers,
    PaddedColumn,
    SequenceNumbers,
    StepColumn,
    StepNumbers,
    Tags,
)
from grutrace.arrays.dask_arrays import (
    INITIAL,
    PaddedRows,
    QuantityRef,
    QuantityRows,
    aligned_rows,
    chunked_rows,
    chunked_sequences,
)
from grutrace.arrays.reopen import SnapshotHandle
from grutrace.errors import require_extra
from grutrace.records import Site
from grutrace.storage.read.annotations import annotation_names
from grutrace.storage.read.snapshot import TraceSnapshot

if TYPE_CHECKING:
    import xarray


from typing import Protocol

from xarray.backends import BackendArray
from xarray.core import indexing

from grutrace.records import Array


class Indexable(Protocol):
    """An array that is read or computed when it is indexed by slices and integers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """Return a part, by one slice or integer for each axis."""


class _Backend(BackendArray):
    """The array as a backend array of xarray; see xarray's "How to add a new backend"."""

    def __init__(self, array: Indexable) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._array = array

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._array.__getitem__
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the values."""
        everything = self._array[(slice(None),) * len(self.shape)]
        return indexing.NumpyIndexingAdapter, (everything,)


def lazy_data(array: Indexable) -> Any:
    """Return the lazy data of an xarray variable. The values are read once and cached."""
    read = indexing.LazilyIndexedArray(_Backend(array))
    cached: Any = indexing.MemoryCachedArray(read)  # type: ignore[no-untyped-call]
    return indexing.CopyOnWriteArray(cached)


#: The `long_name` attributes of the variables.
LONG_NAMES = {
    "reset": "reset gate r",
    "update": "update gate z; where it is 1, the previous state is kept",
    "candidate": "candidate state n",
    "hidden": "hidden state h",
    "input": "input of the layer, x",
    INITIAL: "initial state of the sequence",
    "unit": "number of the unit",
    "sequence": "number of the sequence",
    "time": "step within the sequence, from 0",
    "length": "steps of the sequence",
    "call": "call that made the step, a row of Trace.calls",
    "tag": "tag of the call",
    "token": "token",
}

#: PyTorch's equations, as in docs/equations.md; h' is the previous state.
EQUATIONS = (
    "r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr); z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz); "
    "n = tanh(W_in x + b_in + r * (W_hn h' + b_hn)); h = (1 - z) * n + z * h'"
)

_Variables = dict[str, "xarray.Variable"]


def to_xarray(
    snapshot: TraceSnapshot, module: int, site: Site, *, padded: bool = False
) -> xarray.Dataset:
    """Return a site as a Dataset; `grutrace.Trace.to_xarray` documents its content.

    Raises:
        MissingExtraError: xarray is not installed.
    """
    with require_extra("to_xarray", "xarray"):
        import xarray
    builder = _DatasetBuilder(snapshot, module, site)
    variables, coordinates = _padded(builder) if padded else _ragged(builder)
    return xarray.Dataset(variables, coordinates, builder.attributes)


class _DatasetBuilder:
    """Creates the variables, coordinates and attributes of a site's Dataset."""

    def __init__(self, snapshot: TraceSnapshot, module: int, site: Site) -> None:
        self.site = site
        self.index = snapshot.index(module)
        self.chunked = find_spec("dask") is not None
        self._snapshot, self._module = snapshot, module
        self._handle = SnapshotHandle(snapshot)

    @property
    def quantities(self) -> Iterator[QuantityRef]:
        """All available quantities, stored or recomputed."""
        return map(self.quantity, self.site.available_quantities)

    def quantity(self, name: str) -> QuantityRef:
        """Return a quantity, or the initial states."""
        return QuantityRef(self._handle, self._snapshot, self._module, self.site, name)

    @property
    def annotations(self) -> Iterator[tuple[str, StepColumn]]:
        """Tokens and labels. The prefix of labels prevents conflicts with other names."""
        for name in annotation_names(self._snapshot.tables, self._module):
            variable = "token" if name == "tokens" else f"label_{name}"
            yield variable, AnnotationColumn(self._snapshot, self._module, name)

    @property
    def tags(self) -> Tags | None:
        """The tags of the calls, or None if no call has a tag."""
        tags = self._snapshot.tags
        tagged = any(tag is not None for tag in tags[self.index.call_numbers])
        return Tags(self.index, tags) if tagged else None

    @property
    def unit(self) -> xarray.Variable:
        """Numbers of the units."""
        numbers = self.site.units or range(self._snapshot.header.modules[self._module].hidden_size)
        return _variable(("unit",), np.array(numbers, np.int64), "unit")

    @property
    def attributes(self) -> dict[str, str | int]:
        """Attributes of the Dataset: strings and numbers, which every file format supports."""
        header = self._snapshot.header
        created = datetime.fromtimestamp(header.created, timezone.utc).isoformat(timespec="seconds")
        return {
            "site": self.site.name,
            "module": header.modules[self._module].path,
            "layer": self.site.layer,
            "reverse": int(self.site.reverse),
            "model": header.model,
            "created": created,
            "grutrace": header.versions.get("grutrace", ""),
            "equations": EQUATIONS,
        }

    def rows(self, quantity: QuantityRef, data: Any, *axes: str) -> xarray.Variable:
        """Return the variable of a quantity. Its last axis is unit or feature."""
        last = "feature" if quantity.name == "input" else "unit"
        variable = _variable((*axes, last), data, quantity.name)
        if quantity.name in self.site.derived:
            variable.attrs["comment"] = "recomputed from weights, inputs and states on reading"
        return variable


def _ragged(builder: _DatasetBuilder) -> tuple[_Variables, _Variables]:
    """Return variables and coordinates in the ragged layout of the CF conventions.

    The arrays are contiguous ragged arrays if the steps of each sequence are consecutive. Otherwise
    (for example, for a decoder that calls its layer for each step), they are indexed ragged arrays.
    """

    quantities = list(builder.quantities)
    # The same chunks for all quantities: dask rechunks arrays with different chunks.
    rows = min(map(aligned_rows, quantities), default=1)
    variables = {
        quantity.name: builder.rows(
            quantity,
            chunked_rows(quantity, rows) if builder.chunked else lazy_data(QuantityRows(quantity)),
            "step",
        )
        for quantity in quantities
    }
    initial = lazy_data(QuantityRows(builder.quantity(INITIAL)))
    variables[INITIAL] = _variable(("instance", "unit"), initial, INITIAL)
    variables["length"] = _variable(("instance",), builder.index.lengths, "length")
    columns: dict[str, StepColumn] = {
        "sequence": SequenceNumbers(builder.index),
        "time": StepNumbers(builder.index),
        "call": CallNumbers(builder.index),
    }
    if builder.tags:
        columns["tag"] = builder.tags
    columns.update(builder.annotations)
    coordinates = {"unit": builder.unit}
    for name, column in columns.items():
        coordinates[name] = _variable(("step",), lazy_data(column), name)
    if len(builder.index) == len(builder.index.steps):
        variables["length"].attrs["sample_dimension"] = "step"
    else:
        coordinates["sequence"].attrs["instance_dimension"] = "instance"
    return variables, coordinates


def _padded(builder: _DatasetBuilder) -> tuple[_Variables, _Variables]:
    """Return variables and coordinates in the padded layout: one sequence per row, NaN-padded."""

    index = builder.index
    count, longest = len(index), int(index.lengths.max(initial=0))
    variables = {}
    for quantity in builder.quantities:
        whole = PaddedRows(quantity, count, longest)
        data = chunked_sequences(whole, quantity.handle) if builder.chunked else lazy_data(whole)
        variables[quantity.name] = builder.rows(quantity, data, "sequence", "time")
    initial = lazy_data(QuantityRows(builder.quantity(INITIAL)))
    variables[INITIAL] = _variable(("sequence", "unit"), initial, INITIAL)
    first_rows = index.calls[index.first_pieces]
    coordinates = {
        "unit": builder.unit,
        "sequence": _variable(("sequence",), np.arange(count), "sequence"),
        "time": _variable(("time",), np.arange(longest), "time"),
        "length": _variable(("sequence",), index.lengths, "length"),
        "call": _variable(("sequence",), first_rows, "call"),
    }
    if builder.tags:
        tags = lazy_data(builder.tags.values_of_calls(first_rows))
        coordinates["tag"] = _variable(("sequence",), tags, "tag")
    for name, column in builder.annotations:
        padded = lazy_data(PaddedColumn(column, index))
        coordinates[name] = _variable(("sequence", "time"), padded, name)
    return variables, coordinates


def _variable(axes: tuple[str, ...], data: Any, name: str) -> xarray.Variable:
    import xarray

    return xarray.Variable(axes, data, {"long_name": LONG_NAMES.get(name, name)})
