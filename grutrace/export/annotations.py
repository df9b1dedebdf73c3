"""Tokens and labels as columns: one value a step, of all steps of a module laid end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from grutrace.record import Array
from grutrace.storage.moment import Moment


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

    def __init__(self, moment: Moment, module: int, name: str, *, text: bool) -> None:
        self.name = name
        self.dtype: np.dtype[Any] | type[str] = str if text else np.dtype(np.float64)
        self._annotations = moment.annotations(module)
        self._index = moment.index(module)

    def read(self, start: int, stop: int) -> Array:
        """(stop - start,) the values of these steps."""
        index = self._index
        text = self.dtype is str
        found = np.full(stop - start, "" if text else np.nan, object if text else np.float64)
        first = int(np.searchsorted(index.first_places, start, side="right")) - 1
        for sequence in range(max(0, first), len(index)):
            begin, length = int(index.first_places[sequence]), int(index.lengths[sequence])
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


def annotation_columns(moment: Moment, module: int) -> Iterator[AnnotationColumn]:
    """Yield a column for the tokens and each label of a module, the tokens first."""
    tables = moment.tables
    entries = tables.annotations[tables.annotations["module"] == module]
    has_text: dict[str, bool] = {}
    for number in np.unique(entries["name"]):
        name = tables.texts[number - 1]
        text = bool(entries["text"][entries["name"] == number].any())
        has_text[name] = has_text.get(name, False) or text
    for name in sorted(has_text, key=lambda each: each != "tokens"):
        yield AnnotationColumn(moment, module, name, text=has_text[name])
