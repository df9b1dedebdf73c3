"""What of a trace is exported, whatever the format: variables with named axes, read in blocks.

Rows lie sequence by sequence, each in time order, also where the trace has them call by call: the
contiguous ragged arrays of the CF conventions, with `length` as their count variable. Names are
those of `Trace.to_xarray`. N rows, S sequences, U units.

Tokens and labels as columns: one value a step, of all steps of a module laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.format.schema import group_name
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.sequence_index import SequenceIndex, as_slice
from grutrace.storage.read.snapshot import TraceSnapshot


class AnnotationColumn:
    """All values of one name: numbers, with nan for none; or texts, empty for none.

    Args:
        moment: Of the trace.
        module: Place of the module in the header.
        name: ``tokens``, or a label's name.
        text: Whether any of the values is a text; then all are given as texts.

    Attributes:
        name: As given.
        dtype: float64, or `str`.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, name: str, *, text: bool) -> None:
        self.name = name
        self.dtype: np.dtype[Any] | type[str] = str if text else np.dtype(np.float64)
        self._annotations = snapshot.annotations(module)
        self._index = snapshot.index(module)

    def read(self, start: int, stop: int) -> Array:
        """(stop - start,) the values of these steps."""
        index = self._index
        text = self.dtype is str
        found = np.full(stop - start, "" if text else np.nan, object if text else np.float64)
        first = int(np.searchsorted(index.first_positions, start, side="right")) - 1
        for sequence in range(max(0, first), len(index)):
            begin, length = int(index.first_positions[sequence]), int(index.lengths[sequence])
            if begin >= stop:
                break
            values = self._annotations.of(sequence, length).get(self.name)
            if values is None:
                continue
            low, high = max(begin, start), min(begin + length, stop)
            part = values[low - begin : high - begin]
            found[low - start : high - start] = [as_text(each) for each in part] if text else part
        return found


def as_text(value: str | float | None) -> str:
    """A value as a text, empty for none; a whole number without a point."""
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
    for name in sorted(has_text, key=lambda each: each != "tokens"):
        yield AnnotationColumn(snapshot, module, name, text=has_text[name])


#: What the variables are, for those who find them in a file.
LONG_NAMES = {
    "reset": "reset gate r",
    "update": "update gate z: h = (1 - z) n + z h', so where z is 1 the state is kept",
    "candidate": "candidate state n",
    "hidden": "hidden state h after the step",
    "input": "what the layer read",
    "initial": "state that the sequence began from",
    "unit": "number of the unit",
    "length": "steps of the sequence",
    "sequence": "number of the sequence that the step is of",
    "time": "which step of its sequence it is, from 0",
    "token": "token of the step",
    "call": "the call that made the step, a row of calls",
    "first_call": "the call that the sequence began in, a row of calls",
    "place": "its place in the batch of that call",
    "parent": "the sequence from whose middle it began, -1 for none",
    "parent_steps": "how many steps that had made by then, -1 for none",
    "tag": "tag of the call",
}

#: Those of the table of all calls, where the same name may stand for something else.
CALL_LONG_NAMES = {
    "time": "when the call was recorded, in seconds since 1970-01-01 00:00 UTC",
    "module": "path of the module that was called, empty for the model itself",
    "tag": "tag of the call",
    "weights": "version of the module's weights that the call used, from 0",
    "training": "1 in training mode, 0 in evaluation mode",
    "batch": "sequences in the batch of the call",
    "steps": "steps of all sequences of the call together",
    "residual": "largest |recomputed h - the kernel's h| of the call, nan where unknown",
    "proof": "whether the gates of the call are proven, unchecked or unproven",
    "rank": "rank of the process that recorded the call",
}

#: How much is brought into memory at once, unless the format says otherwise. Bytes.
BLOCK = 16 * 1024 * 1024

#: How much is gathered at once of sequences that took many calls. The steps of one lie among those
#: of all others in its batch, which are read along, so it should be many sequences. Bytes.
GATHER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Variable:
    """An array that is read a part at a time.

    Attributes:
        name: Its name.
        axes: Names of its axes.
        shape: How long they are.
        dtype: Type of the elements; `str` for texts of any length.
        read: Gives the items from one number to another along the first axis.
        description: What it is, in words, where the name alone does not say it.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | type[str]
    read: Callable[[int, int], Array] = field(repr=False)
    description: str = ""

    @property
    def long_name(self) -> str:
        """What it is, in words."""
        if self.description:
            return self.description
        label = f"label {self.name.removeprefix('label_')} of the step"
        return LONG_NAMES.get(self.name, label if self.name.startswith("label_") else self.name)

    @property
    def is_text(self) -> bool:
        """Whether its elements are texts."""
        return self.dtype is str

    def items_per_block(self, size: int | None = None) -> int:
        """How many items fit in so many bytes (`BLOCK`), at least one. Of texts it is a guess."""
        width = 64 if self.dtype is str else np.dtype(self.dtype).itemsize
        for length in self.shape[1:]:
            width *= length
        return max(1, (BLOCK if size is None else size) // max(1, width))

    def blocks(self, items: int | None = None) -> Iterator[tuple[slice, Array]]:
        """Yield all of it, so many items at a time, each time with where they go."""
        each = items or self.items_per_block()
        for start in range(0, self.shape[0], each):
            stop = min(start + each, self.shape[0])
            yield slice(start, stop), self.read(start, stop)


@dataclass(frozen=True)
class Group:
    """Variables that belong together: a site, or the table of all calls.

    Attributes:
        name: Fit to be the name of a file or of a group, with no slash in it.
        variables: What is in it.
        about: What is known of it as a whole: texts, whole numbers, numbers.
    """

    name: str
    variables: tuple[Variable, ...]
    attributes: Mapping[str, str | int | float]

    @property
    def axes(self) -> dict[str, int]:
        """All axes, and how long they are."""
        return {
            axis: length
            for variable in self.variables
            for axis, length in zip(variable.axes, variable.shape, strict=True)
        }

    def variable_attributes(self, variable: Variable) -> dict[str, str]:
        """What formats with attributes say of a variable, in the words of the CF conventions."""
        found = {"long_name": variable.long_name}
        if variable.name == "length":
            found["sample_dimension"] = "step"
        if variable.axes[0] == "step" and len(variable.axes) > 1:
            per_step = [each.name for each in self.variables if each.axes == ("step",)]
            found["coordinates"] = " ".join(per_step)
        return found

    def __getitem__(self, name: str) -> Variable:
        return next(each for each in self.variables if each.name == name)


class SiteContent:
    """What is exported of one site.

    Args:
        moment: Of the trace.
        number: Place of the module in the header.
        site: The site.
        quantities: Which quantities, all of which can be read there.
        advance: Called with how many rows of a quantity were read.
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
        """All of it."""
        name = group_name(self.site.name)
        variables = (*self.rows(), *self.per_step(), *self.per_sequence(), self.units())
        return Group(name, variables, self._attributes())

    def rows(self) -> Iterator[Variable]:
        """The quantities, (N, U) each, or (N, I) for the input."""
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
        """What each step is: its sequence, its number in it, its call, token, labels; (N,) each."""
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
        """What each sequence is, and the state that it began from."""
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
        """(U,) the numbers of the units."""
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
    """Rows sequence by sequence.

    Args:
        index: Of the module.
        rows: As they lie in the trace.
    """

    def __init__(self, index: SequenceIndex, rows: Rows) -> None:
        self._index, self._rows = index, rows
        self._is_contiguous = len(index) == len(index.steps)
        self._buffer, self._buffer_start = np.empty((0, rows.shape[1]), rows.dtype), 0

    def read(self, start: int, stop: int) -> Array:
        """The rows at these places."""
        if self._is_contiguous:
            return self._read(start, stop)
        if not self._buffer_start <= start <= stop <= self._buffer_start + len(self._buffer):
            width = self._rows.shape[1] * self._rows.dtype.itemsize
            items = max(stop - start, GATHER_BYTES // max(1, width))
            self._buffer_start = start
            self._buffer = self._read(start, min(start + items, len(self._rows)))
        return self._buffer[start - self._buffer_start : stop - self._buffer_start]

    def _read(self, start: int, stop: int) -> Array:
        return np.asarray(self._rows[as_slice(self._index.sequential_rows(np.arange(start, stop)))])


@dataclass(frozen=True)
class ExportContent:
    """What is exported of a trace.

    Attributes:
        sites: In the model's order, at least one.
        calls: The table of all calls.
        about: What is known of the trace as a whole.
    """

    sites: tuple[SiteContent, ...]
    calls: Group
    attributes: Mapping[str, str | int | float]

    def groups(self) -> Iterator[Group]:
        """Yield the table of calls, and a group a site."""
        yield self.calls
        for site in self.sites:
            yield site.group()


def calls_group(snapshot: TraceSnapshot) -> Group:
    """The table of all calls, as `Trace.calls` has it."""
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
    """Objects as texts, with an empty one for None."""
    return np.array(["" if each is None else str(each) for each in values], object)


def _in_memory_variable(name: str, axis: str, values: Array, description: str = "") -> Variable:
    """A variable that is in memory, since it is small."""
    dtype = str if values.dtype == object else values.dtype
    if values.dtype == bool:
        values, dtype = values.astype(np.int8), np.dtype(np.int8)
    return Variable(
        name, (axis,), values.shape, dtype, lambda start, stop: values[start:stop], description
    )
