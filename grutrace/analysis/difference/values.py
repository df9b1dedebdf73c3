"""The values of one quantity at one site of two traces, compared block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grutrace.analysis.difference.correspondence import Block, Pair, Side
from grutrace.analysis.difference.discrepancies import Place, ValueDifference
from grutrace.analysis.distance import scaled_differences
from grutrace.record import GATES

#: Beside quantities: the states that sequences began from.
INITIAL = "initial"

#: What goes in comes first: where it differs, nothing after it is the cause.
ORDER = ("input", INITIAL, *GATES, "hidden")


#: Spacings at 1 of the coarser type that two computations may differ by: four times what was seen
#: of a trained network.
SPACINGS = 256


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        pair: The site.
        quantity: One of `ORDER` that both have.
    """

    pair: Pair
    quantity: str

    @property
    def count(self) -> int:
        """Rows of the one trace."""
        side = self.pair.a
        if self.quantity == INITIAL:
            return self.pair.sequences
        return side.moment.extent(side.number).rows

    def blocks(self) -> Iterator[Block]:
        """Yield all values that correspond."""
        return self.pair.initial() if self.quantity == INITIAL else self.pair.rows(self.quantity)

    def tolerance(self) -> float:
        """What may come of rounding: see `grutrace.analysis.difference.comparing`."""
        sides = self.pair.a, self.pair.b
        kept = sum(_spacing(side) / 2 for side in sides)
        spacing = max(self._computed(side) for side in sides)
        return min(SPACINGS * spacing, math.sqrt(spacing)) + kept

    def _computed(self, side: Side) -> float:
        """Spacing at 1 of the coarsest type in which these values came about."""
        precision = float(side.trace.checks["precision"].max(initial=0.0))
        derived = self.quantity in side.site.derived
        # What is derived follows from rows that are rounded to the type in which they are kept.
        return max(precision, _spacing(side)) if derived or not precision else precision


def _spacing(side: Side) -> float:
    return float(np.finfo(side.module.dtype).eps)


class Tally:
    """Takes in blocks, in any order, and says what differs in them.

    Args:
        comparison: What they are of.
        tolerance: Differences up to here count as none.
    """

    def __init__(self, comparison: Comparison, tolerance: float) -> None:
        self._comparison, self._tolerance = comparison, tolerance
        self._values = self._unequal = self._beyond = 0
        self._largest: Place | None = None
        self._first: tuple[tuple[int, int], Place] | None = None

    def add(self, block: Block) -> None:
        """Take in some values."""
        self._values += block.a.size
        if block.a.dtype == block.b.dtype and np.array_equal(block.a, block.b):
            return
        off = scaled_differences(block.a, block.b)
        self._unequal += int(np.count_nonzero(off))
        if off.size:
            self._take_largest(block, *divmod(int(off.argmax()), off.shape[1]))
        beyond = off > self._tolerance
        self._beyond += int(np.count_nonzero(beyond))
        rows = np.flatnonzero(beyond.any(axis=1))
        if len(rows):
            read = -block.steps if self._comparison.pair.a.site.reverse else block.steps
            row = int(rows[np.lexsort((read[rows], block.sequences[rows]))[0]])
            key = int(block.sequences[row]), int(read[row])
            if self._first is None or key < self._first[0]:
                self._first = key, self._place(block, row, int(beyond[row].argmax()))

    def result(self) -> ValueDifference:
        """What was found."""
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
        place = self._place(block, row, column)
        if place.difference > (self._largest.difference if self._largest else 0.0):
            self._largest = place

    def _place(self, block: Block, row: int, column: int) -> Place:
        is_input = self._comparison.quantity == "input"
        step = int(block.steps[row])
        return Place(
            int(block.sequences[row]),
            None if step < 0 else step,
            column if is_input else int(self._comparison.pair.common[column]),
            float(block.a[row, column]),
            float(block.b[row, column]),
        )
