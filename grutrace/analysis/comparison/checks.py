"""The checks of `trace_diff`: values block by block, structure, annotations, weights and context.

The context is how the traces were made: mode, batches, types, versions and options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grutrace.analysis.comparison.alignment import Block, Pair, Side
from grutrace.analysis.comparison.report import (
    ContextDifference,
    Mismatch,
    ValueDifference,
    ValuePair,
    WeightsDifference,
    presence,
)
from grutrace.analysis.verification.distance import abs_difference, scaled_difference
from grutrace.records import GATES, Array, TraceHeader
from grutrace.storage.read.annotations import AnnotationIndex
from grutrace.storage.read.snapshot import TraceSnapshot

#: The initial states, which are compared like a quantity.
INITIAL = "initial"

#: Inputs first: if they differ, later quantities are not the cause.
ORDER = ("input", INITIAL, *GATES, "hidden")


#: Default tolerance in epsilons of the less precise type: four times the largest difference seen in
#: a trained network.
TOLERANCE_EPS = 256


@dataclass(frozen=True)
class Comparison:
    """One quantity of a site to compare.

    Attributes:
        pair: The site in both traces.
        quantity: One of `ORDER` that both have.
    """

    pair: Pair
    quantity: str

    @property
    def count(self) -> int:
        """Number of rows in the first trace."""
        side = self.pair.a
        if self.quantity == INITIAL:
            return self.pair.sequences
        return side.snapshot.extent(side.number).rows

    def blocks(self) -> Iterator[Block]:
        """Yield all corresponding values."""
        return self.pair.initial() if self.quantity == INITIAL else self.pair.rows(self.quantity)

    def tolerance(self) -> float:
        """Return the default tolerance; see `grutrace.analysis.comparison.trace_diff`."""
        sides = self.pair.a, self.pair.b
        storage_rounding = sum(_spacing(side) / 2 for side in sides)
        spacing = max(self._computed(side) for side in sides)
        return min(TOLERANCE_EPS * spacing, math.sqrt(spacing)) + storage_rounding

    def _computed(self, side: Side) -> float:
        """Return the epsilon of the least precise type that these values were computed in."""
        precision = float(side.trace.checks["precision"].max(initial=0.0))
        derived = self.quantity in side.site.derived
        # Derived gates follow from rows that were rounded to the storage type.
        return max(precision, _spacing(side)) if derived or not precision else precision


def _spacing(side: Side) -> float:
    return float(np.finfo(side.module.dtype).eps)


class ValueComparison:
    """Accumulates blocks, in any order, and summarizes their differences.

    Args:
        comparison: The compared quantity.
        tolerance: Largest difference that counts as equal.
    """

    def __init__(self, comparison: Comparison, tolerance: float) -> None:
        self._comparison, self._tolerance = comparison, tolerance
        self._values = self._unequal = self._beyond = 0
        self._largest: ValuePair | None = None
        self._first: tuple[tuple[int, int], ValuePair] | None = None

    def add(self, block: Block) -> None:
        """Add a block."""
        self._values += block.a.size
        if block.a.dtype == block.b.dtype and np.array_equal(block.a, block.b):
            return
        difference = scaled_difference(block.a, block.b)
        self._unequal += int(np.count_nonzero(difference))
        if difference.size:
            self._take_largest(block, *divmod(int(difference.argmax()), difference.shape[1]))
        beyond = difference > self._tolerance
        self._beyond += int(np.count_nonzero(beyond))
        rows = np.flatnonzero(beyond.any(axis=1))
        if len(rows):
            read = -block.steps if self._comparison.pair.a.site.reverse else block.steps
            row = int(rows[np.lexsort((read[rows], block.sequences[rows]))[0]])
            key = int(block.sequences[row]), int(read[row])
            if self._first is None or key < self._first[0]:
                self._first = key, self._value_pair(block, row, int(beyond[row].argmax()))

    def result(self) -> ValueDifference:
        """Return the summary."""
        return ValueDifference(
            self._comparison.pair.a.site.name,
            self._comparison.quantity,
            self._tolerance,
            self._values,
            self._unequal,
            self._beyond,
            self._largest,
            self._first[1] if self._first else None,
        )

    def _take_largest(self, block: Block, row: int, column: int) -> None:
        pair = self._value_pair(block, row, column)
        if pair.difference > (self._largest.difference if self._largest else 0.0):
            self._largest = pair

    def _value_pair(self, block: Block, row: int, column: int) -> ValuePair:
        is_input = self._comparison.quantity == "input"
        step = int(block.steps[row])
        return ValuePair(
            int(block.sequences[row]),
            None if step < 0 else step,
            column if is_input else int(self._comparison.pair.common[column]),
            float(block.a[row, column]),
            float(block.b[row, column]),
        )


def site_mismatches(pair: Pair, quantities: Sequence[str]) -> Iterator[Mismatch]:
    """Yield differences in units, width of the input and quantities of a site.

    Args:
        pair: The site in both traces.
        quantities: Quantities that both should have.
    """
    a, b = pair.a, pair.b
    name = a.site.name
    if a.module.hidden_size != b.module.hidden_size:
        yield from _unequal(name, "hidden size", a.module.hidden_size, b.module.hidden_size)
        return
    yield from _unequal(name, "input size", a.site.input_size, b.site.input_size)
    if set(a.units()) != set(b.units()):
        yield Mismatch(name, "units", _units(a), _units(b))
    for quantity in quantities:
        held = quantity in a.site.available_quantities, quantity in b.site.available_quantities
        if held[0] != held[1]:
            yield Mismatch(name, quantity, *presence(*held))


def module_mismatches(a: Side, b: Side) -> Iterator[Mismatch]:
    """Yield differences in the sequences and annotations of a module.

    Args:
        a: A site of the module in the first trace.
        b: The same site in the second trace.
    """
    path, count = a.module.path, min(len(a.index), len(b.index))
    yield from _unequal(path, "bias", a.module.bias, b.module.bias)
    yield from _unequal(path, "sequences", len(a.index), len(b.index))
    lengths = [side.index.lengths[:count] for side in (a, b)]
    yield from _where_unequal(path, "steps", *lengths)
    for what, of_a, of_b in zip(
        ("parent", "steps of the parent"), a.index.parents, b.index.parents, strict=True
    ):
        yield from _where_unequal(path, what, of_a[:count], of_b[:count])
    if not _same_annotations(a, b):
        yield from _annotation_mismatches(a, b, np.minimum(*lengths).tolist())


def _units(side: Side) -> str:
    if side.site.units is None:
        return f"all {side.module.hidden_size}"
    more = ", ..." if len(side.site.units) > 8 else ""
    return ", ".join(map(str, side.site.units[:8])) + more


def _unequal(where: str, what: str, a: object, b: object) -> Iterator[Mismatch]:
    if a != b:
        yield Mismatch(where, what, str(a), str(b))


def _where_unequal(path: str, what: str, a: Array, b: Array) -> Iterator[Mismatch]:
    """(S,) numbers of the sequences."""
    unequal = np.flatnonzero(a != b)
    if len(unequal):
        first = int(unequal[0])
        of_a, of_b = ("none" if value < 0 else str(value) for value in (a[first], b[first]))
        yield Mismatch(path, what, of_a, of_b, count=len(unequal), sequence=first)


def _same_annotations(a: Side, b: Side) -> bool:
    """Return whether the annotation tables are equal. Unequal tables may mean the same."""
    tables = a.snapshot.tables, b.snapshot.tables
    return a.number == b.number and all(
        np.array_equal(*(getattr(table, name) for table in tables))
        for name in ("annotations", "values", "strings", "characters")
    )


def _annotation_mismatches(a: Side, b: Side, lengths: list[int]) -> Iterator[Mismatch]:
    first: dict[tuple[str, bool, bool], Mismatch] = {}
    indices = [side.snapshot.annotations(side.number) for side in (a, b)]
    for sequence, length in enumerate(lengths):
        in_a, in_b = (_values(index, sequence, length) for index in indices)
        for name in dict.fromkeys([*in_a, *in_b]):
            mismatch = _annotation_mismatch(
                a.module.path, name, sequence, in_a.get(name), in_b.get(name)
            )
            if mismatch:
                key = name, mismatch.a is None, mismatch.b is None
                count = mismatch.count + (first[key].count if key in first else 0)
                first[key] = replace(first.get(key, mismatch), count=count)
    yield from first.values()


def _values(index: AnnotationIndex, sequence: int, length: int) -> dict[str, list[Any]]:
    """Return one value a step, by name; None for none."""
    return {
        name: [
            None if value != value else value
            for value in (values.tolist() if isinstance(values, np.ndarray) else values)
        ]
        for name, values in index.values(sequence, length).items()
    }


def _annotation_mismatch(
    path: str, name: str, sequence: int, a: list[Any] | None, b: list[Any] | None
) -> Mismatch | None:
    what = name if name == "tokens" else f"label {name}"
    if a is None or b is None:
        return Mismatch(path, what, *presence(a is not None, b is not None), sequence=sequence)
    unequal = [step for step, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
    if not unequal:
        return None
    step = unequal[0]
    of_a, of_b = ("none" if name is None else repr(name) for name in (a[step], b[step]))
    return Mismatch(path, what, of_a, of_b, len(unequal), sequence, step)


#: Floating-point types by their epsilon, as stored in the file.
_TYPES = {2.0**-52: "float64", 2.0**-23: "float32", 2.0**-10: "float16", 2.0**-7: "bfloat16"}

_MISSING = "none"


def weights_difference(pair: Pair) -> WeightsDifference | None:
    """Compare the weights of a site version by version; None where all are equal.

    Versions correspond by number. Both sites must have the same sizes.
    """
    a, b = pair.a.trace, pair.b.trace
    first: WeightsDifference | None = None
    versions = 0
    for version in range(min(a.extent.versions, b.extent.versions)):
        difference = _largest_difference(a.name, version, a.weights(version), b.weights(version))
        versions += difference is not None
        first = first or difference
    return first and replace(first, versions=versions)


def _largest_difference(
    site: str, version: int, a: Mapping[str, Array], b: Mapping[str, Array]
) -> WeightsDifference | None:
    """Find the largest difference between common weights; None if all are equal."""
    largest: WeightsDifference | None = None
    for name in [name for name in a if name in b]:
        difference = abs_difference(a[name].astype(np.float64), b[name].astype(np.float64))
        if not difference.size:
            continue
        position = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[position] > (largest.largest if largest else 0.0):
            values = float(a[name][position]), float(b[name][position])
            largest = WeightsDifference(site, version, 1, name, *values)
    return largest


def trace_context(a: TraceSnapshot, b: TraceSnapshot) -> Iterator[ContextDifference]:
    """Yield differences between the headers of the traces."""
    headers = a.header, b.header
    yield from _differences(*({"model": header.model, **header.versions} for header in headers))
    yield from _differences(*map(_options, headers))


def _options(header: TraceHeader) -> dict[str, str]:
    # Each run has its own id.
    options = {name: value for name, value in header.options.items() if name != "run"}
    return {f"option {name}": json.dumps(value) for name, value in options.items()}


def module_context(a: Side, b: Side) -> Iterator[ContextDifference]:
    """Yield differences between the calls of a module, given one of its sites in both traces."""
    path = f"{a.module.path}: " if a.module.path else ""
    same_batches = np.array_equal(_batch_sizes(a), _batch_sizes(b))
    unequal = () if same_batches else ("batches",)
    for difference in _differences(_module_texts(a), _module_texts(b), unequal):
        yield replace(difference, what=f"{path}{difference.what}")


def _module_texts(side: Side) -> dict[str, str]:
    return {
        "class": side.module.type,
        "dropout": str(side.module.dropout),
        "calls in training mode": _training(side),
        "batches": _batches(side),
        "versions of the weights": str(side.snapshot.extent(side.number).versions),
        "tags": _tags(side),
    }


def site_context(pair: Pair) -> Iterator[ContextDifference]:
    """Yield differences in the types of a site, and in whether its input was recorded."""
    return _differences(*map(_site_texts, (pair.a, pair.b)))


def _site_texts(side: Side) -> dict[str, str]:
    name, has_input = side.site.name, "input" in side.site.available_quantities
    return {
        f"{name}: computed in": _precisions(side),
        f"{name}: kept as": side.module.dtype,
        f"{name}: input": "recorded" if has_input else "not recorded",
    }


def _differences(
    a: Mapping[str, str], b: Mapping[str, str], unequal: Collection[str] = ()
) -> Iterator[ContextDifference]:
    """Yield the entries that differ, and those named as unequal although their texts are equal."""
    for what in dict.fromkeys([*a, *b]):
        texts = a.get(what, _MISSING), b.get(what, _MISSING)
        if texts[0] != texts[1] or what in unequal:
            yield ContextDifference(what, *texts)


def _training(side: Side) -> str:
    training = side.snapshot.tables.calls["training"][side.index.call_numbers] > 0
    if not training.any():
        return "none"
    return "all" if training.all() else f"{training.sum()} of {len(training)}"


def _batch_sizes(side: Side) -> Array:
    return np.asarray(side.snapshot.tables.calls["batch"][side.index.call_numbers])


def _batches(side: Side) -> str:
    sizes = _batch_sizes(side)
    if not len(sizes):
        return "no calls"
    size = str(sizes[0]) if (sizes == sizes[0]).all() else f"{sizes.min()} to {sizes.max()}"
    return f"{len(sizes)} call{'s' * (len(sizes) > 1)} of {size}"


def _tags(side: Side) -> str:
    tags = dict.fromkeys(side.snapshot.tags[side.index.call_numbers].tolist())
    return ", ".join("none" if tag is None else repr(tag) for tag in tags)


def _precisions(side: Side) -> str:
    spacings = np.unique(side.trace.checks["precision"]).tolist()
    return ", ".join(_TYPES.get(spacing, f"a spacing of {spacing:g}") for spacing in spacings)
