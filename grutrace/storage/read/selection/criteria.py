"""`Criteria`, the conditions that all sequences of a selection meet."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grutrace.errors import (
    NotRecordedError,
    OptionError,
    join_names,
    short_repr,
    string_list,
    suggest_name,
)
from grutrace.storage.read.annotations import annotation_names, row_labels
from grutrace.storage.read.selection.patterns import (
    Mask,
    TokenPattern,
    matches_any,
    matching_codes,
    parse_globs,
)
from grutrace.storage.read.sequence_index import SequenceIndex
from grutrace.storage.read.snapshot import TraceSnapshot


@dataclass(frozen=True)
class Numbers:
    """Some of the numbers from 0 on: those of a slice, or a list.

    Attributes:
        values: The numbers, or the slice.
    """

    values: slice | tuple[int, ...]

    @classmethod
    def parse(cls, option: str, value: Any) -> Numbers:
        """Parse an integer, a slice, a range, or several integers.

        Raises:
            OptionError: The value is something else.
        """
        if isinstance(value, slice):
            try:
                value.indices(0)
            except (TypeError, ValueError):
                pass
            else:
                return cls(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            try:
                return cls(tuple(map(operator.index, value)))
            except TypeError:
                pass
        elif not isinstance(value, bool) and hasattr(value, "__index__"):
            return cls((operator.index(value),))
        raise OptionError(
            f"{option}: expected a number, a slice such as slice(10, None), or numbers; "
            f"found {short_repr(value)}"
        )

    def mask(self, count: int) -> Mask:
        """Return which of the numbers from 0 to ``count`` - 1 belong to it, (count,).

        Negative numbers count from the end.
        """
        mask = np.zeros(count, bool)
        if isinstance(self.values, slice):
            mask[self.values] = True
        else:
            numbers = np.array(self.values, np.int64)
            mask[numbers[(numbers >= -count) & (numbers < count)]] = True
        return mask

    def __str__(self) -> str:
        if isinstance(self.values, slice):
            bounds = self.values.start, self.values.stop, self.values.step
            texts = ["" if bound is None else str(bound) for bound in bounds]
            return ":".join(texts[: 2 + (self.values.step is not None)])
        return ",".join(map(str, self.values))


@dataclass(frozen=True)
class Criteria:
    """The conditions that all sequences of a selection meet. None, or no condition, selects all.

    Attributes:
        tag: Globs for the tag of the call in which the sequence began.
        label: By name of a label, globs: one of the steps has a label that matches.
        length: Numbers of steps.
        calls: Calls in which the sequence began, as rows of `Trace.calls`.
        tokens: Consecutive tokens that the sequence has.
        sequences: Numbers of the sequences within their module.
    """

    tag: tuple[str, ...] | None = None
    label: tuple[tuple[str, tuple[str, ...]], ...] = ()
    length: Numbers | None = None
    calls: Numbers | None = None
    tokens: TokenPattern | None = None
    sequences: Numbers | None = None

    @classmethod
    def parse(
        cls,
        *,
        tag: Any = None,
        label: Any = None,
        length: Any = None,
        calls: Any = None,
        tokens: Any = None,
        sequences: Any = None,
    ) -> Criteria:
        """Check the arguments of `Trace.select`.

        Raises:
            OptionError: A value is invalid.
        """
        lengths = None if length is None else Numbers.parse("length", length)
        if lengths is not None:
            _require_not_negative(lengths, length)
        return cls(
            None if tag is None else tuple(string_list("tag", tag, "a glob or a list of globs")),
            () if label is None else _parse_label(label),
            lengths,
            None if calls is None else Numbers.parse("calls", calls),
            None if tokens is None else TokenPattern.parse(tokens),
            None if sequences is None else Numbers.parse("sequences", sequences),
        )

    def require_recorded(self, snapshot: TraceSnapshot) -> None:
        """Check that the trace has the labels and tokens.

        Raises:
            NotRecordedError: No module has such a label, or tokens.
        """
        names = self._label_names()
        recorded = dict.fromkeys(
            name
            for module in range(len(snapshot.header.modules))
            for name in annotation_names(snapshot.tables, module)
        )
        for name in names:
            if name not in recorded:
                what = "there are no tokens" if name == "tokens" else f"there is no label {name!r}"
                raise NotRecordedError(
                    f"{what}{suggest_name(name, recorded)}; there are: {join_names(recorded)}"
                )

    def mask(self, snapshot: TraceSnapshot, module: int) -> Mask:
        """Return which sequences of a module are selected, (sequences,)."""
        index = snapshot.index(module)
        mask = np.ones(len(index), bool)
        if self.sequences is not None:
            mask &= self.sequences.mask(len(index))
        if self.length is not None:
            mask &= self.length.mask(int(index.lengths.max(initial=0)) + 1)[index.lengths]
        if self.calls is not None or self.tag is not None:
            first_calls = index.calls[index.first_pieces]
            if self.calls is not None:
                mask &= self.calls.mask(len(snapshot.tables.calls))[first_calls]
            if self.tag is not None:
                mask &= _matching_tags(snapshot, self.tag)[first_calls]
        if self._label_names():
            mask &= self._label_mask(snapshot, module, index)
        return mask

    def _label_names(self) -> list[str]:
        return [name for name, _ in self.label] + (["tokens"] if self.tokens else [])

    def _label_mask(self, snapshot: TraceSnapshot, module: int, index: SequenceIndex) -> Mask:
        tables, mask = snapshot.tables, np.ones(len(index), bool)
        recorded = annotation_names(tables, module)
        if not set(self._label_names()) <= set(recorded):
            return np.zeros(len(index), bool)
        rows = index.rows_between(0, len(index))
        for name, globs in self.label:
            matches = matching_codes(row_labels(tables, module, index, name), globs)[rows]
            counts = np.concatenate([[0], np.cumsum(matches)])
            starts = index.first_positions
            mask &= counts[starts + index.lengths] > counts[starts]
        if self.tokens is not None:
            found, _ = self.tokens.find(row_labels(tables, module, index, "tokens"), index)
            mask &= np.isin(np.arange(len(index)), found)
        return mask

    def __str__(self) -> str:
        """Return the criteria as on a command line."""
        parts = [f"{name}={value}" for name, value in self._texts()]
        return ", ".join(parts) or "everything"

    def _texts(self) -> list[tuple[str, str]]:
        texts = [] if self.tag is None else [("tag", "|".join(self.tag))]
        texts += [(f"label {name}", "|".join(globs)) for name, globs in self.label]
        for name in ("length", "calls", "sequences"):
            if getattr(self, name) is not None:
                texts.append((name, str(getattr(self, name))))
        if self.tokens is not None:
            ends = ["^"] * self.tokens.at_start, ["$"] * self.tokens.at_end
            texts.append(("tokens", " ".join([*ends[0], *self.tokens.globs, *ends[1]])))
        return texts


def _parse_label(label: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(label, str):
        return ((label, ("*",)),)
    if not isinstance(label, Mapping) or not label or not all(isinstance(k, str) for k in label):
        raise OptionError(
            "label: expected the name of a label, or globs by name, such as {'pos': 'noun'}; "
            f"found {short_repr(label)}"
        )
    return tuple((name, parse_globs(f"label[{name!r}]", globs)) for name, globs in label.items())


def _require_not_negative(lengths: Numbers, value: Any) -> None:
    values = lengths.values
    bounds = values if isinstance(values, tuple) else (values.start, values.stop, values.step)
    if any(bound is not None and bound < 0 for bound in bounds):
        raise OptionError(f"length: expected numbers from 0 on; found {short_repr(value)}")


def _matching_tags(snapshot: TraceSnapshot, globs: tuple[str, ...]) -> Mask:
    """Return which calls have a tag that matches, (calls,)."""
    texts, numbers = snapshot.tables.texts, snapshot.tables.calls["tag"]
    used = np.unique(numbers)
    is_match = np.zeros(len(texts) + 1, bool)
    is_match[used] = [number > 0 and matches_any(texts[number - 1], globs) for number in used]
    return np.asarray(is_match[numbers])
