"""The steps, units and sequences that a setting applies to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from grutrace.capture.options import integer
from grutrace.errors import OptionError, short_repr

#: Selection of steps: a slice, a number, or numbers; None for all.
Steps: TypeAlias = slice | int | Iterable[int]

#: Selection of units, or of sequences: a slice, a number, or numbers; None for all.
Numbers: TypeAlias = slice | int | Iterable[int]


class StepSelection:
    """The steps of a sequence that a setting applies to, counted from 0.

    Attributes:
        count: Number of selected steps; None if there is no last one.
    """

    def __init__(self, steps: Steps) -> None:
        self._numbers: dict[int, int] | None = None
        if isinstance(steps, slice):
            bounds = steps.start, steps.stop, steps.step
            start, stop, step = (
                None if bound is None else _step(bound, "in the slice") for bound in bounds
            )
            self._start, self._stop, self._step = start or 0, stop, 1 if step is None else step
            if not self._step or (stop is not None and stop <= self._start):
                raise OptionError(f"steps: expected some steps, found none in {steps}")
            self.count = None if stop is None else len(range(self._start, stop, self._step))
            return
        if isinstance(steps, (str, bytes)) or not isinstance(steps, (int, Iterable)):
            raise OptionError(
                "steps: expected a slice, a number or numbers such as slice(5, None); "
                f"found {short_repr(steps)}"
            )
        numbers = [steps] if isinstance(steps, int) else list(steps)
        checked = [_step(number, "as numbers") for number in numbers]
        if not checked or len(set(checked)) < len(checked):
            raise OptionError(f"steps: expected different steps, found {short_repr(numbers)}")
        self._numbers = {number: index for index, number in enumerate(checked)}
        self.count = len(checked)

    def __contains__(self, step: int) -> bool:
        return self.index(step) is not None

    def index(self, step: int) -> int | None:
        """Return the position of a step in the selection; None if it is not selected."""
        if self._numbers is not None:
            return self._numbers.get(step)
        distance = step - self._start
        if distance < 0 or distance % self._step or (self._stop is not None and step >= self._stop):
            return None
        return distance // self._step


def _step(value: Any, where: str) -> int:
    number = integer("steps", value, f"whole numbers {where}")
    if number < 0:
        raise OptionError(
            f"steps: expected numbers from 0, found {number}. The length of a sequence is not "
            "known while it is decoded step by step"
        )
    return number


def select_units(units: Numbers | None, size: int, site: str) -> tuple[int, ...] | None:
    """Return the selected units, in the given order; None if they are all units in order.

    Args:
        units: What the user passed.
        size: H
        site: Name of the site.

    Raises:
        OptionError: A unit does not exist or is given twice, or there is none.
    """
    if units is None:
        return None
    if isinstance(units, slice):
        numbers = list(range(size)[units])
    else:
        numbers = _numbers("units", units)
        for number in numbers:
            if not -size <= number < size:
                raise OptionError(
                    f"units: expected units from 0 to {size - 1} at {site}, found {number}"
                )
        numbers = [number % size for number in numbers]
    if not numbers or len(set(numbers)) < len(numbers):
        raise OptionError(f"units: expected one or more different units, found {short_repr(units)}")
    return None if numbers == list(range(size)) else tuple(numbers)


def select_sequences(sequences: Numbers | None) -> tuple[int, ...] | None:
    """Return the selected sequences: positions in the batch in which they start; None for all.

    Raises:
        OptionError: A number is negative or given twice, or there is none.
    """
    if sequences is None:
        return None
    if isinstance(sequences, slice):
        if sequences.stop is None or min(sequences.start or 0, sequences.stop) < 0:
            raise OptionError(
                "sequences: expected a slice from 0 with an end, or numbers, found "
                f"{sequences}. The size of a batch is known only when the model runs"
            )
        numbers = list(range(sequences.stop)[sequences])
    else:
        numbers = _numbers("sequences", sequences)
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise OptionError(
            "sequences: expected different positions in the batch, from 0; "
            f"found {short_repr(sequences)}"
        )
    return tuple(numbers)


def _numbers(option: str, values: Any) -> list[int]:
    expected = "a slice, a number or numbers"
    if isinstance(values, (str, bytes)):
        raise OptionError(f"{option}: expected {expected}, found {short_repr(values)}")
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return [integer(option, values, expected)]
    return [integer(option, value, expected) for value in values]
