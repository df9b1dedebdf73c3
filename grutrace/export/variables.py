"""The exported content of a trace, shared by all formats: variables that are read in blocks.

Rows are sorted by sequence, each in time order, as contiguous ragged arrays of the CF conventions
with the count variable `length`. Names are those of `Trace.to_xarray`.

Module contents: `Variable` and `Group`, an array with named axes and a group of them;
`SiteContent`, `calls_group` and `ExportContent`, the groups of a trace; `AnnotationColumn`, tokens
and labels of each step.

N rows, S sequences, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.format.schema import group_name
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import item_bytes, items_per_block
from grutrace.storage.read.sequence_index import SequenceIndex, as_slice
from grutrace.storage.read.snapshot import TraceSnapshot


class AnnotationColumn:
    """The token or label of each step: floats with NaN, or strings with an empty string.

    Args:
        snapshot: Snapshot of the trace.
        module: Index of the module in the header.
        name: Name of the label, or ``tokens``.
        text: Whether any value is a string. Then all values are strings.

    Attributes:
        name: Name of the label, or ``tokens``.
        dtype: float64, or `str`.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, name: str, *, text: bool) -> None:
        self.name = name
        self.dtype: np.dtype[Any] | type[str] = str if text else np.dtype(np.float64)
        self._annotations = snapshot.annotations(module)
        self._index = snapshot.index(module)

    def read(self, start: int, stop: int) -> Array:
        """Return the values of these steps, (stop - start,)."""
        index = self._index
        text = self.dtype is str
        column = np.full(stop - start, "" if text else np.nan, object if text else np.float64)
        first = int(np.searchsorted(index.first_positions, start, side="right")) - 1
        for sequence in range(max(0, first), len(index)):
            begin, length = int(index.first_positions[sequence]), int(index.lengths[sequence])
            if begin >= stop:
                break
            values = self._annotations.values(sequence, length).get(self.name)
            if values is None:
                continue
            low, high = max(begin, start), min(begin + length, stop)
            part = values[low - begin : high - begin]
            column[low - start : high - start] = list(map(as_text, part)) if text else part
        return column


def as_text(value: str | float | None) -> str:
    """Return a value as a string: empty for None and NaN, an integer without a decimal point."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def annotation_columns(snapshot: TraceSnapshot, module: int) -> Iterator[AnnotationColumn]:
    """Yield a column for the tokens and each label of a module, the tokens first."""
    tables = snapshot.tables
    entries = tables.annotations[tables.annotations["module"] == module]
    has_text: dict[str, bool] = {}
    for number in np.unique(entries["name"]):
        name = tables.texts[number - 1]
        text = bool(entries["text"][entries["name"] == number].any())
        has_text[name] = has_text.get(name, False) or text
    for name in sorted(has_text, key=lambda name: name != "tokens"):
        yield AnnotationColumn(snapshot, module, name, text=has_text[name])


#: The `long_name` attributes of the variables.
LONG_NAMES = {
    "reset": "reset gate r",
    "update": "update gate z: h = (1 - z) n + z h', so the state is kept where z is 1",
    "candidate": "candidate state n",
    "hidden": "hidden state h after the step",
    "input": "input of the layer",
    "initial": "initial state of the sequence",
    "unit": "number of the unit",
    "length": "number of steps of the sequence",
    "sequence": "sequence of the step",
    "time": "step within the sequence, from 0",
    "token": "token of the step",
    "call": "call of the step, a row of calls",
    "first_call": "first call of the sequence, a row of calls",
    "place": "batch index of the sequence in its first call",
    "parent": "sequence that the sequence was forked from, -1 for none",
    "parent_steps": "number of steps that the parent had made at the fork, -1 for none",
    "tag": "tag of the call",
}

#: The `long_name` attributes of the table of calls. Some names have another meaning there.
CALL_LONG_NAMES = {
    "time": "time of the call, in seconds since 1970-01-01 00:00 UTC",
    "module": "path of the module, empty for the model itself",
    "tag": "tag of the call",
    "weights": "version of the module's weights, from 0",
    "training": "1 in training mode, 0 in evaluation mode",
    "batch": "number of sequences in the batch",
    "steps": "total number of steps of all sequences of the call",
    "residual": "largest |replayed h - kernel's h| of the call, NaN if unknown",
    "proof": "whether the gates of the call are proven, unchecked or unproven",
    "attached": "1 if gradients flow on to the states that the call started from",
    "scale": "factor of the loss whose gradients were recorded, 0 if unknown",
    "set": "what an intervention has set in the call, empty for nothing",
    "rank": "rank of the recording process",
}

#: Bytes that are read at once, unless the format sets another size.
BLOCK = 16 * 1024 * 1024

#: Bytes that are read at once if sequences span several calls. Their steps alternate with those of
#: the other sequences of the batch, so reading many sequences at once avoids reading rows twice.
GATHER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Variable:
    """An array with named axes that is read in blocks.

    Attributes:
        name: Name of the variable.
        axes: Names of the axes.
        shape: Lengths of the axes.
        dtype: Type of the elements; `str` for strings of any length.
        read: Returns the items from start to stop along the first axis.
        description: Long name, if it differs from that in `LONG_NAMES`.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | type[str]
    read: Callable[[int, int], Array] = field(repr=False)
    description: str = ""

    @property
    def long_name(self) -> str:
        """Description of the variable, for its `long_name` attribute."""
        if self.description:
            return self.description
        label = f"label {self.name.removeprefix('label_')} of the step"
        return LONG_NAMES.get(self.name, label if self.name.startswith("label_") else self.name)

    @property
    def is_text(self) -> bool:
        """Whether the elements are strings."""
        return self.dtype is str

    def items_per_block(self, size: int | None = None) -> int:
        """Return how many items fit in `size` bytes (`BLOCK`), at least one; strings count 64."""
        width = 64 if self.dtype is str else np.dtype(self.dtype).itemsize
        for length in self.shape[1:]:
            width *= length
        return items_per_block(BLOCK if size is None else size, width)

    def blocks(self, items: int | None = None) -> Iterator[tuple[slice, Array]]:
        """Yield all items in blocks, each with its position."""
        block_items = items or self.items_per_block()
        for start in range(0, self.shape[0], block_items):
            stop = min(start + block_items, self.shape[0])
            yield slice(start, stop), self.read(start, stop)


@dataclass(frozen=True)
class Group:
    """A group of variables: a site, or the table of calls.

    Attributes:
        name: Name of the group, valid as the name of a file.
        variables: Variables of the group.
        attributes: Attributes of the group: strings, ints and floats.
    """

    name: str
    variables: tuple[Variable, ...]
    attributes: Mapping[str, str | int | float]

    @property
    def axes(self) -> dict[str, int]:
        """Lengths of all axes, by name."""
        return {
            axis: length
            for variable in self.variables
            for axis, length in zip(variable.axes, variable.shape, strict=True)
        }

    def variable_attributes(self, variable: Variable) -> dict[str, str]:
        """Return the attributes of a variable, after the CF conventions."""
        attributes = {"long_name": variable.long_name}
        if variable.name == "length":
            attributes["sample_dimension"] = "step"
        if variable.axes[0] == "step" and len(variable.axes) > 1:
            per_step = [variable.name for variable in self.variables if variable.axes == ("step",)]
            attributes["coordinates"] = " ".join(per_step)
        return attributes

    def __getitem__(self, name: str) -> Variable:
        return next(variable for variable in self.variables if variable.name == name)


class SiteContent:
    """The exported content of one site.

    Args:
        snapshot: Snapshot of the trace.
        number: Index of the module in the header.
        site: The site.
        quantities: Exported quantities, which are all available.
        advance: Called with the number of rows of a quantity that were read.
    """

    def __init__(
        self,
        snapshot: TraceSnapshot,
        number: int,
        site: Site,
        quantities: tuple[str, ...],
        advance: Callable[[int], None],
    ) -> None:
        self.site, self.number, self.quantities = site, number, quantities
        self._snapshot, self._advance = snapshot, advance
        self.module: ModuleInfo = snapshot.header.modules[number]
        self.index = snapshot.index(number)
        self.row_count = snapshot.extent(number).rows

    def group(self) -> Group:
        """Return all variables and attributes of the site."""
        name = group_name(self.site.name)
        variables = (*self.rows(), *self.per_step(), *self.per_sequence(), self.units())
        return Group(name, variables, self._attributes())

    def rows(self) -> Iterator[Variable]:
        """Yield the quantities, (N, U), or (N, I) for the input."""
        for name in self.quantities:
            yield self._rows_variable(name, self._snapshot.rows(self.number, self.site, name))

    def _rows_variable(self, name: str, rows: Rows) -> Variable:
        axes = ("step", "feature" if name == "input" else "unit")
        read = _SequenceOrderedRows(self.index, rows).read

        def advancing(start: int, stop: int) -> Array:
            self._advance(stop - start)
            return read(start, stop)

        return Variable(name, axes, (rows.shape[0], rows.shape[1]), rows.dtype, advancing)

    def per_step(self) -> Iterator[Variable]:
        """Yield sequence, time, call, tag, token and labels of each step, (N,) each."""
        index = self.index
        ends = index.first_positions + index.lengths
        tags = self._snapshot.tags

        def sequences(start: int, stop: int) -> Array:
            return np.asarray(np.searchsorted(ends, np.arange(start, stop), side="right"))

        def times(start: int, stop: int) -> Array:
            return np.arange(start, stop) - index.first_positions[sequences(start, stop)]

        def calls(start: int, stop: int) -> Array:
            return index.calls[index.pieces_of(index.sequential_rows(np.arange(start, stop)))]

        for name, read in {"sequence": sequences, "time": times, "call": calls}.items():
            yield Variable(name, ("step",), (self.row_count,), np.dtype(np.int64), read)
        if any(tag is not None for tag in tags[index.call_numbers]):
            shape = (self.row_count,)
            yield Variable("tag", ("step",), shape, str, lambda a, b: texts(tags[calls(a, b)]))
        for column in annotation_columns(self._snapshot, self.number):
            name = "token" if column.name == "tokens" else f"label_{group_name(column.name)}"
            yield Variable(name, ("step",), (self.row_count,), column.dtype, column.read)

    def per_sequence(self) -> Iterator[Variable]:
        """Yield the initial states, (S, U), and length, first call and parent, (S,) each."""
        index, count = self.index, len(self.index)
        initial = self._snapshot.initial(self.number, self.site)
        shape = count, initial.shape[1]
        yield Variable(
            "initial", ("instance", "unit"), shape, initial.dtype, lambda a, b: initial[a:b]
        )
        first = index.first_pieces
        columns = {
            "length": index.lengths,
            "first_call": index.calls[first],
            "place": index.batch_indices[first],
            "parent": index.parents[0],
            "parent_steps": index.parents[1],
        }
        for name, values in columns.items():
            yield _in_memory_variable(name, "instance", values)

    def units(self) -> Variable:
        """Return the numbers of the units, (U,)."""
        numbers = self.site.units or range(self.module.hidden_size)
        return _in_memory_variable("unit", "unit", np.array(numbers, np.int64))

    def _attributes(self) -> dict[str, str | int | float]:
        module, site = self.module, self.site
        return {
            "site": site.name,
            "module": module.path,
            "kind": module.kind,
            "type": module.type,
            "layer": site.layer,
            "reverse": int(site.reverse),
            "input_size": site.input_size,
            "hidden_size": module.hidden_size,
            "num_layers": module.num_layers,
            "bidirectional": int(module.bidirectional),
            "bias": int(module.bias),
            "dropout": float(module.dropout),
        }


class _SequenceOrderedRows:
    """The rows of a quantity, sorted by sequence.

    Args:
        index: Index of the module's sequences.
        rows: The rows in the order of recording.
    """

    def __init__(self, index: SequenceIndex, rows: Rows) -> None:
        self._index, self._rows = index, rows
        self._is_contiguous = len(index) == len(index.steps)
        self._buffer, self._buffer_start = np.empty((0, rows.shape[1]), rows.dtype), 0

    def read(self, start: int, stop: int) -> Array:
        """Return the rows at these positions."""
        if self._is_contiguous:
            return self._read(start, stop)
        if not self._buffer_start <= start <= stop <= self._buffer_start + len(self._buffer):
            items = max(stop - start, items_per_block(GATHER_BYTES, item_bytes(self._rows)))
            self._buffer_start = start
            self._buffer = self._read(start, min(start + items, len(self._rows)))
        return self._buffer[start - self._buffer_start : stop - self._buffer_start]

    def _read(self, start: int, stop: int) -> Array:
        return np.asarray(self._rows[as_slice(self._index.sequential_rows(np.arange(start, stop)))])


@dataclass(frozen=True)
class ExportContent:
    """The exported content of a trace.

    Attributes:
        sites: Exported sites in model order, at least one.
        calls: The table of calls.
        attributes: Attributes of the trace.
    """

    sites: tuple[SiteContent, ...]
    calls: Group
    attributes: Mapping[str, str | int | float]

    def groups(self) -> Iterator[Group]:
        """Yield the table of calls and one group for each site."""
        yield self.calls
        for site in self.sites:
            yield site.group()


def calls_group(snapshot: TraceSnapshot) -> Group:
    """Return the table of calls; see `Trace.calls`."""
    calls = snapshot.calls
    columns = {name: calls[name] for name in calls.dtype.names or ()}
    variables = tuple(
        _in_memory_variable(
            name,
            "call",
            texts(values) if values.dtype == object else values,
            CALL_LONG_NAMES.get(name, ""),
        )
        for name, values in columns.items()
    )
    return Group("calls", variables, {})


def texts(values: Array) -> Array:
    """Return objects as strings, with an empty string for None."""
    return np.array(["" if value is None else str(value) for value in values], object)


def _in_memory_variable(name: str, axis: str, values: Array, description: str = "") -> Variable:
    """Return a variable with small values in memory."""
    dtype = str if values.dtype == object else values.dtype
    if values.dtype == bool:
        values, dtype = values.astype(np.int8), np.dtype(np.int8)
    return Variable(
        name, (axis,), values.shape, dtype, lambda start, stop: values[start:stop], description
    )
