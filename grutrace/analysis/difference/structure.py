"""What two traces should have alike beside their values: sequences, units, tokens, labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grutrace.analysis.difference.correspondence import Pair, Side
from grutrace.analysis.difference.discrepancies import Mismatch, only_in
from grutrace.record import Array
from grutrace.storage.index import AnnotationIndex


def site_mismatches(pair: Pair, quantities: Sequence[str]) -> Iterator[Mismatch]:
    """Yield what a site does not have alike in both: units, width of the input, quantities.

    Args:
        pair: The site.
        quantities: Those that both should have.
    """
    a, b = pair.a, pair.b
    name = a.site.name
    if a.module.hidden_size != b.module.hidden_size:
        yield Mismatch(name, "hidden size", *_texts(a.module.hidden_size, b.module.hidden_size))
        return
    if a.site.input_size != b.site.input_size:
        yield Mismatch(name, "input size", *_texts(a.site.input_size, b.site.input_size))
    if set(a.units()) != set(b.units()):
        yield Mismatch(name, "units", _units(a), _units(b))
    for quantity in quantities:
        held = quantity in a.site.readable, quantity in b.site.readable
        if held[0] != held[1]:
            yield Mismatch(name, quantity, *only_in(*held))


def module_mismatches(a: Side, b: Side) -> Iterator[Mismatch]:
    """Yield what the sequences of a module do not have alike in both.

    Args:
        a: A site of the module in the one trace.
        b: The same site in the other.
    """
    path, count = a.module.path, min(len(a.index), len(b.index))
    if a.module.bias != b.module.bias:
        yield Mismatch(path, "bias", *_texts(a.module.bias, b.module.bias))
    if len(a.index) != len(b.index):
        yield Mismatch(path, "sequences", *_texts(len(a.index), len(b.index)))
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


def _texts(a: Any, b: Any) -> tuple[str, str]:
    return str(a), str(b)


def _where_unequal(path: str, what: str, a: Array, b: Array) -> Iterator[Mismatch]:
    """(S,) numbers of the sequences."""
    unequal = np.flatnonzero(a != b)
    if len(unequal):
        first = int(unequal[0])
        of_a, of_b = ("none" if value < 0 else str(value) for value in (a[first], b[first]))
        yield Mismatch(path, what, of_a, of_b, count=len(unequal), sequence=first)


def _same_annotations(a: Side, b: Side) -> bool:
    """Whether the tables say the same, which is quickly seen; if not, they may mean the same."""
    tables = a.moment.tables, b.moment.tables
    return a.number == b.number and all(
        np.array_equal(*(getattr(each, name) for each in tables))
        for name in ("annotations", "values", "strings", "characters")
    )


def _annotation_mismatches(a: Side, b: Side, lengths: list[int]) -> Iterator[Mismatch]:
    found: dict[tuple[str, str], Mismatch] = {}
    of_a, of_b = (side.moment.annotations(side.number) for side in (a, b))
    for sequence, length in enumerate(lengths):
        named = [_values(index, sequence, length) for index in (of_a, of_b)]
        for name in dict.fromkeys([*named[0], *named[1]]):
            mismatch = _of_sequence(a.module.path, name, sequence, *(n.get(name) for n in named))
            if mismatch:
                key = name, str([mismatch.a is None, mismatch.b is None])
                found[key] = _added(found.get(key), mismatch)
    yield from found.values()


def _values(index: AnnotationIndex, sequence: int, length: int) -> dict[str, list[Any]]:
    """By name, one value a step, None for none."""
    return {
        name: [
            None if value != value else value
            for value in (values.tolist() if isinstance(values, np.ndarray) else values)
        ]
        for name, values in index.of(sequence, length).items()
    }


def _of_sequence(
    path: str, name: str, sequence: int, a: list[Any] | None, b: list[Any] | None
) -> Mismatch | None:
    what = name if name == "tokens" else f"label {name}"
    if a is None or b is None:
        return Mismatch(path, what, *only_in(a is not None, b is not None), sequence=sequence)
    unequal = [step for step, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
    if not unequal:
        return None
    step = unequal[0]
    of_a, of_b = ("none" if each is None else repr(each) for each in (a[step], b[step]))
    return Mismatch(path, what, of_a, of_b, len(unequal), sequence, step)


def _added(first: Mismatch | None, more: Mismatch) -> Mismatch:
    if first is None:
        return more
    return replace(first, count=first.count + more.count)
