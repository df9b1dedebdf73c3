"""Tokens and labels: which recorded steps the user's values belong to.

Values are given for a batch, one list a sequence, while a recording may hold the calls of several
modules. Unless the user names the module, values go only to modules whose batch they fit exactly:
as many sequences, and the longest list as long as the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from grutrace.capture.recorder import Recorded
from grutrace.capture.values import Parsed, Values, parse
from grutrace.errors import OptionError, brief, listed
from grutrace.record import Annotation, Module

#: Values, or values by the path of the module that they belong to, which may be a glob.
Given: TypeAlias = Values | Mapping[str, Values]


@dataclass
class _Batch:
    """Sequences that one call began or took up, (B,) each.

    Attributes:
        sequences: As they were told.
        first: Their first step here.
        steps: How many they have made since.
        numbers: As the trace has them; -1 for none.
        start: The first step that the trace keeps.
        stop: The first one after those; None for no end.
    """

    sequences: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    start: int
    stop: int | None


class RecordedBatches:
    """The batches that were recorded in one stretch of recording, by module."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self._modules = modules
        self._batches: list[list[_Batch]] = [[] for _ in modules]
        self._left_out: set[int] = set()

    def leave_out(self, module: int) -> None:
        """Note that a call of a module was not recorded, so that its values fit no batch.

        Such a call is not looked at, so it is not known how many sequences it had.
        """
        self._left_out.add(module)

    def clear(self) -> None:
        """Forget all: the calls are no longer in the trace."""
        self._batches = [[] for _ in self._modules]

    def add(self, recorded: Recorded) -> None:
        """Note a call: it goes on with batches that are known, or adds one."""
        assignment, lengths = recorded.assignment, recorded.lengths
        batches = self._batches[recorded.module]
        # A sequence that had no number gets one, and one that had no steps another, never a lower.
        if batches and batches[-1].sequences is assignment.sequences:
            batches[-1].steps += lengths
            np.maximum(batches[-1].numbers, recorded.numbers, out=batches[-1].numbers)
            return
        unknown = np.ones(len(lengths), bool)
        for batch in reversed(batches if not assignment.begun.all() else []):
            _, here, there = np.intersect1d(
                assignment.sequences, batch.sequences, assume_unique=True, return_indices=True
            )
            batch.steps[there] += lengths[here]
            batch.numbers[there] = np.maximum(batch.numbers[there], recorded.numbers[here])
            unknown[here] = False
            if not unknown.any():
                break
        forked = np.isin(assignment.sequences, [fork.sequence for fork in assignment.forks])
        if unknown.all() and not forked.any():
            first = assignment.steps_before.copy()
            batches.append(
                _Batch(
                    assignment.sequences,
                    first,
                    lengths.copy(),
                    recorded.numbers.copy(),
                    recorded.start,
                    recorded.stop,
                )
            )

    def annotations(self, name: str, given: Given, module: str | None = None) -> list[Annotation]:
        """Return the annotations that give the values to the steps they belong to.

        Args:
            name: ``tokens``, or the label's name.
            given: The values, or values by module.
            module: Path or glob of the modules that the values belong to.

        Raises:
            OptionError: The values fit no recorded batch; the message lists what was recorded.
        """
        if not isinstance(name, str):
            raise OptionError(f"labels: expected a text as a name, found {brief(name)}")
        if isinstance(given, Mapping):
            named = given.items()
            return [each for glob, values in named for each in self._named(name, glob, values)]
        if module is not None:
            return list(self._named(name, module, given))
        values = parse(name, given)
        fitting = [each for each in self._all() if _fits_exactly(values, each[1])]
        if not fitting:
            if self._left_out:
                return []
            raise OptionError(
                f"{name}: {_shape(values)} fits no batch of this recording exactly: "
                f"{self._what_is_there()}. To give values to a module whose sequences are longer, "
                f"name it: {{path: values}}"
            )
        return [
            annotation
            for number, batch in fitting
            for annotation in _align(name, number, values, batch)
        ]

    def _named(self, name: str, glob: str, given: Values) -> Iterator[Annotation]:
        values = parse(name, given)
        if not any(fnmatchcase(module.path, glob) for module in self._modules):
            paths = listed(module.path or "''" for module in self._modules)
            raise OptionError(f"{name}: {glob!r} matches no traced module: {paths}")
        left_out = any(
            fnmatchcase(self._modules[each].path, glob) for each in tuple(self._left_out)
        )
        matching = [each for each in self._all() if fnmatchcase(self._modules[each[0]].path, glob)]
        if not matching and not left_out:
            raise OptionError(
                f"{name}: {glob!r} matches no recorded module: {self._what_is_there()}"
            )
        fitting = [(module, batch) for module, batch in matching if _fits(values, batch)]
        if not fitting and not left_out:
            raise OptionError(
                f"{name}: {_shape(values)} does not fit {glob!r}: {self._what_is_there()}"
            )
        for module, batch in fitting:
            yield from _align(name, module, values, batch)

    def _all(self) -> Iterator[tuple[int, _Batch]]:
        for module, batches in enumerate(self._batches):
            for batch in batches:
                yield module, batch

    def _what_is_there(self) -> str:
        counts = {
            f"{self._modules[module].path or 'the model'} {len(batch.steps)} sequences of up to "
            f"{batch.steps.max(initial=0)} steps"
            for module, batch in self._all()
        }
        return "; ".join(sorted(counts)) or "nothing was recorded"


def _fits(values: Parsed, batch: _Batch) -> bool:
    """Whether each sequence has as many steps as it has values, or more; padding aside."""
    longest = batch.steps.max(initial=0)
    return len(values.lists) == len(batch.steps) and all(
        not isinstance(each, list) or len(each) <= (longest if values.padded else steps)
        for each, steps in zip(values.lists, batch.steps, strict=True)
    )


def _fits_exactly(values: Parsed, batch: _Batch) -> bool:
    return _fits(values, batch) and values.longest in (None, batch.steps.max(initial=0))


def _align(name: str, module: int, values: Parsed, batch: _Batch) -> Iterator[Annotation]:
    for place, given in enumerate(values.lists):
        steps = int(batch.steps[place])
        repeated = given[:steps] if isinstance(given, list) else [given] * steps
        first, kept = _kept(repeated, int(batch.first[place]), batch.start, batch.stop)
        if kept and batch.numbers[place] >= 0:
            is_text = isinstance(kept[0], str)
            yield Annotation(
                module=module,
                sequence=int(batch.numbers[place]),
                name=name,
                first=first,
                values=tuple(kept if is_text else map(float, kept)),
            )


def _kept(
    values: Sequence[Any], first: int, start: int, stop: int | None
) -> tuple[int, Sequence[Any]]:
    """Return which kept step the first value is of, and the values of the kept steps.

    Args:
        values: One a step.
        first: The step that the first of them is of.
        start: The first step that is kept.
        stop: The first one after those; None for no end.
    """
    end = None if stop is None else max(0, stop - first)
    return max(0, first - start), values[max(0, start - first) : end]


def _shape(values: Parsed) -> str:
    longest = "" if values.longest is None else f" with up to {values.longest} values"
    return f"{len(values.lists)} sequences{longest}"
