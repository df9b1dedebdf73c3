"""Update sparsity: the share of steps that hardly change a unit.

A step changes a unit by

    h(t) - h(t - 1) = (1 - z(t)) (n(t) - h(t - 1)).

The change is near zero if the gate keeps the state, or if the candidate equals the state. Neil,
Lee, Delbruck and Liu (2017), "Delta networks for optimized recurrent network computation", skip
changes below a threshold; the share of such changes is what a delta network could save.

N steps, H units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import PREVIOUS, SequenceSegment
from grutrace.analysis.engine.site_data import SiteLike, as_site_data
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Default threshold. Hidden states are in (-1, 1).
DEFAULT_THRESHOLD = 0.01


@dataclass(frozen=True, eq=False)
class UpdateSparsity(Result):
    """Update sparsity of a site. NaN where there are no steps.

    Attributes:
        steps: N, number of steps of all sequences.
        threshold: Changes smaller than this count as near zero.
        near_zero: Share of all changes, of all units, that are near zero.
        units: (H,) numbers of the units.
        share: (H,) share of the unit's changes that are near zero.
        size: (H,) mean of ``|h(t) - h(t - 1)|``.
        not_finite: (H,) number of changes that are not finite. They are skipped.
    """

    steps: int
    threshold: float
    near_zero: float
    units: Integers
    share: Array
    size: Array
    not_finite: Integers


def update_sparsity(site: SiteLike, threshold: float = DEFAULT_THRESHOLD) -> UpdateSparsity:
    """Compute the share of steps that change each unit by less than a threshold.

    Args:
        site: A site with hidden states.
        threshold: Threshold for ``|h(t) - h(t - 1)|``.

    Returns:
        The shares of each unit and of all units.

    Raises:
        NotRecordedError: The hidden states were not recorded.
        OptionError: The threshold is not above 0.

    Examples:
        The initial state is 0, so the first step is a change too.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, update_sparsity
        >>> states = np.array([[0.5, 0.0], [0.5, 0.3], [0.5, -0.3], [0.5, 0.6]])
        >>> update_sparsity(SiteArrays(hidden=states)).share
        array([0.75, 0.25])
    """
    if not threshold > 0:
        raise OptionError(f"threshold: expected a number above 0, found {short_repr(threshold)}")
    data = as_site_data(site)
    sums = reduce_sequences(data, (PREVIOUS,), partial(_UpdateCounts, len(data.units), threshold))
    count = data.steps - sums.not_finite
    known = np.where(count > 0, count, np.nan)
    return UpdateSparsity(
        site=data.name,
        steps=data.steps,
        threshold=threshold,
        near_zero=float(sums.small.sum() / count.sum()) if count.any() else np.nan,
        units=data.units,
        share=sums.small / known,
        size=sums.total / known,
        not_finite=sums.not_finite,
    )


class _UpdateCounts:
    """Number of small changes, sum of sizes and number of non-finite changes: (H,) each."""

    def __init__(self, width: int, threshold: float) -> None:
        self._threshold = threshold
        self.small, self.not_finite = np.zeros(width, np.int64), np.zeros(width, np.int64)
        self.total = np.zeros(width)

    def add(self, segment: SequenceSegment) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.abs(segment.values["hidden"] - segment.previous)
        self.small += np.count_nonzero(size < self._threshold, axis=0)
        total = size.sum(0, dtype=np.float64)
        if not np.isfinite(total).all():
            finite = np.isfinite(size)
            self.not_finite += np.count_nonzero(~finite, axis=0)
            total = np.where(finite, size, 0).sum(0, dtype=np.float64)
        self.total += total

    def merge(self, later: _UpdateCounts) -> None:
        self.small += later.small
        self.not_finite += later.not_finite
        self.total += later.total
