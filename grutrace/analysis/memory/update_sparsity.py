"""How much of the update is used: the share of steps in which a unit is hardly written to.

What a step writes to a unit is

    h(t) - h(t - 1) = (1 - z(t)) (n(t) - h(t - 1)).

It is near zero if the gate keeps, or if the candidate proposes what is there already. Neil, Lee,
Delbruck and Liu (2017), "Delta networks for optimized recurrent network computation", leave out
what changes by less than a threshold: the share of near-zero writes is what that could save.

N steps, H units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import fold_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import PREVIOUS, Stretch
from grutrace.analysis.engine.site_data import Analysed, material
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: A write that is smaller than this is near zero. Hidden states lie in (-1, 1).
SMALL = 0.01


@dataclass(frozen=True, eq=False)
class Writes(Result):
    """Of a site. Not a number where there are no steps.

    Attributes:
        steps: N, of all sequences together.
        threshold: Below which a write is near zero.
        near_zero: Share of all writes, of all units, that are.
        units: (H,) numbers of the units.
        share: (H,) share of its writes that are near zero.
        size: (H,) mean size of its writes, ``|h(t) - h(t - 1)|``.
        left_out: (H,) how many of its writes are not finite; they count for nothing else.
    """

    steps: int
    threshold: float
    near_zero: float
    units: Integers
    share: Array
    size: Array
    left_out: Integers


def writes(site: Analysed, threshold: float = SMALL) -> Writes:
    """Count how often each unit is written to by less than a threshold.

    Args:
        site: With hidden.
        threshold: In the unit of the states.

    Raises:
        NotRecordedError: The hidden states were not recorded.
        OptionError: The threshold is not above 0.
    """
    if not threshold > 0:
        raise OptionError(f"threshold: expected a number above 0, found {short_repr(threshold)}")
    of = material(site)
    found = fold_sequences(of, (PREVIOUS,), partial(_Written, len(of.units), threshold))
    count = of.steps - found.left_out
    known = np.where(count > 0, count, np.nan)
    return Writes(
        site=of.name,
        steps=of.steps,
        threshold=threshold,
        near_zero=float(found.small.sum() / count.sum()) if count.any() else np.nan,
        units=of.units,
        share=found.small / known,
        size=found.total / known,
        left_out=found.left_out,
    )


class _Written:
    """(H,) each: how many are small, how large they are together, how many are not finite."""

    def __init__(self, width: int, threshold: float) -> None:
        self._threshold = threshold
        self.small, self.left_out = np.zeros(width, np.int64), np.zeros(width, np.int64)
        self.total = np.zeros(width)

    def add(self, stretch: Stretch) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.abs(stretch.values["hidden"] - stretch.previous)
        self.small += np.count_nonzero(size < self._threshold, axis=0)
        total = size.sum(0, dtype=np.float64)
        if not np.isfinite(total).all():
            finite = np.isfinite(size)
            self.left_out += np.count_nonzero(~finite, axis=0)
            total = np.where(finite, size, 0).sum(0, dtype=np.float64)
        self.total += total

    def merge(self, later: _Written) -> None:
        self.small += later.small
        self.left_out += later.left_out
        self.total += later.total
