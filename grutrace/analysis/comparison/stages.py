"""Change of the units over the course of a recording, such as a training run.

The sequences, in the order of recording, are divided into equal stages. The mean of each unit in
each stage shows the course. Whether a unit changed is tested on the correlation between the means
of single sequences and their order. If nothing changed, every order of the sequences is equally
likely, so the null distribution is that of permuted orders; steps of one sequence may resemble each
other. The p-value is corrected for the number of units by the largest correlation of all units in
each permutation (Westfall and Young 1993, "Resampling-based multiple testing").

S sequences, K stages, G groups of consecutive sequences, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import SequenceSegment
from grutrace.analysis.engine.site_data import SiteLike, as_site_data, unit_quantities
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Default number of stages.
STAGES = 10

#: Largest number of groups of sequences whose order is permuted.
MAX_GROUPS = 128

#: Number of permutations that are computed at once.
PERMUTED_AT_ONCE = 64

#: Correlations that differ by less are equal: their sums may be rounded differently.
SAME_TREND = 1e-9


@dataclass(frozen=True, eq=False)
class Stages(Result):
    """Means of the units of a site in consecutive stages of a recording, by quantity.

    Values are NaN where a sequence of the unit has a value that is not finite.

    Attributes:
        sequences: S, number of sequences with steps.
        groups: G, number of groups of sequences whose order is permuted: S, or `MAX_GROUPS`.
        permutations: Number of permutations.
        stages: (K,) numbers of the stages.
        first: (K,) number of the first sequence of each stage.
        units: (H,) numbers of the units.
        mean: (K, H) mean over the sequences of each stage, every sequence with the same weight.
        moved: (H,) mean of the last stage minus that of the first.
        trend: (H,) correlation between the means of the groups and their order. NaN for a unit
            whose means are all equal.
        p: (H,) p-value of `trend`, corrected for the number of units: (1 + number of permutations
            in which the largest correlation of all units was as large) / (1 + permutations).
    """

    array_only_fields: ClassVar[tuple[str, ...]] = ("mean",)
    excluded_columns: ClassVar[tuple[str, ...]] = ("mean", "stages", "first")

    sequences: int
    groups: int
    permutations: int
    stages: Integers
    first: Integers
    units: Integers
    mean: Mapping[str, Array]
    moved: Mapping[str, Array]
    trend: Mapping[str, Array]
    p: Mapping[str, Array]


def stages(
    site: SiteLike, count: int = STAGES, *, permutations: int = 999, seed: int = 0
) -> Stages:
    """Compare the units of a site between the stages of a recording.

    The sequences should be alike: the same inputs, or inputs drawn at random. A change of the
    inputs over the recording is a change, too.

    Args:
        site: A site with gates or states.
        count: K, at most the number of sequences.
        permutations: Number of permutations of the test.
        seed: Seed of the permutations.

    Returns:
        Means by stage, and the test, for each quantity and unit.

    Raises:
        NotRecordedError: Neither gates nor states were recorded.
        OptionError: `count` or `permutations` is not an integer of 1 or more.

    Examples:
        Unit 0 grows from sequence to sequence, unit 1 does not.

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, stages
        >>> update = np.random.default_rng(0).uniform(0.4, 0.5, (200, 2))
        >>> update[:, 0] += np.arange(200) / 400
        >>> found = stages(SiteArrays(update=update, lengths=[10] * 20), 4)
        >>> float(found.moved["update"][0].round(1)), found.p["update"] < 0.05
        (0.4, array([ True, False]))
    """
    for name, value in {"count": count, "permutations": permutations}.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}: expected a number, 1 or more; found {short_repr(value)}")
    data = as_site_data(site)
    quantities = unit_quantities(data)
    numbers = np.flatnonzero(data.lengths > 0)
    total = len(numbers)
    stage_count, group_count = max(1, min(count, total)), max(1, min(MAX_GROUPS, total))
    width = len(data.units)
    position = np.cumsum(data.lengths > 0) - 1
    stage_of = position * stage_count // max(1, total)
    group_of = position * group_count // max(1, total)
    stage_sizes = np.bincount(np.arange(total) * stage_count // max(1, total))
    group_sizes = np.bincount(np.arange(total) * group_count // max(1, total))
    shapes = (stage_count, width), (group_count, width)
    make_reducer = partial(_Means, quantities, stage_of, group_of, *shapes)
    sums = reduce_sequences(data, quantities, make_reducer)
    by_stage, by_group = sums.by_stage, sums.by_group
    mean = {name: _divided(sums, stage_sizes) for name, sums in by_stage.items()}
    tests = {
        name: _trend(_divided(sums, group_sizes), permutations, seed)
        for name, sums in by_group.items()
    }
    stage_numbers = np.arange(stage_count)
    return Stages(
        site=data.name,
        sequences=total,
        groups=group_count,
        permutations=permutations,
        stages=stage_numbers,
        first=numbers[-(-stage_numbers * total // stage_count)] if total else stage_numbers,
        units=data.units,
        mean=mean,
        moved={name: means[-1] - means[0] for name, means in mean.items()},
        trend={name: test[0] for name, test in tests.items()},
        p={name: test[1] for name, test in tests.items()},
    )


class _Means:
    """Sums over sequences of the means of each, by stage and by group."""

    def __init__(
        self,
        quantities: tuple[str, ...],
        stage_of: Integers,
        group_of: Integers,
        stages_shape: tuple[int, int],
        groups_shape: tuple[int, int],
    ) -> None:
        self._stage_of, self._group_of = stage_of, group_of
        self.by_stage = {name: np.zeros(stages_shape) for name in quantities}
        self.by_group = {name: np.zeros(groups_shape) for name in quantities}

    def add(self, segment: SequenceSegment) -> None:
        """Add the share of some steps in the mean of their sequence."""
        stage, group = self._stage_of[segment.sequence], self._group_of[segment.sequence]
        with np.errstate(invalid="ignore", over="ignore"):
            for name, rows in segment.values.items():
                share = rows.sum(axis=0, dtype=np.float64) / segment.length
                self.by_stage[name][stage] += share
                self.by_group[name][group] += share

    def merge(self, later: _Means) -> None:
        """Add the sums of later sequences."""
        for own, others in (
            (self.by_stage, later.by_stage),
            (self.by_group, later.by_group),
        ):
            for name, sums in others.items():
                own[name] += sums


def _divided(sums: Array, counts: Integers) -> Array:
    if not len(counts):
        return np.full(sums.shape, np.nan)
    return np.asarray(sums / counts[:, np.newaxis])


def _trend(means: Array, permutations: int, seed: int) -> tuple[Array, Array]:
    """Correlate (G, H) means with their order; return the correlations and p-values, (H,) each."""
    groups, width = means.shape
    order = np.arange(groups) - (groups - 1) / 2
    deviation = means - means.mean(axis=0)
    size = np.sqrt((deviation**2).sum(axis=0))
    # Means of equal values may differ by rounding.
    moves = np.isfinite(size) & (size > 1e-9 * np.sqrt(groups) * (1 + np.abs(means).max(axis=0)))
    if groups < 2 or not moves.any():
        return np.full((2, width), np.nan)[0], np.full(width, np.nan)
    unit = np.where(moves, deviation, 0.0) / np.where(moves, size, 1.0)
    order = order / np.sqrt((order**2).sum())
    trend = order @ unit
    random = np.random.default_rng(seed)
    reached = np.zeros(width, np.int64)
    for start in range(0, permutations, PERMUTED_AT_ONCE):
        count = min(PERMUTED_AT_ONCE, permutations - start)
        orders = random.permuted(np.tile(order, (count, 1)), axis=1)
        largest = np.abs(orders @ unit).max(axis=1)
        reached += (largest[:, np.newaxis] >= np.abs(trend) - SAME_TREND).sum(axis=0)
    p = (1 + reached) / (1 + permutations)
    return np.where(moves, trend, np.nan), np.where(moves, p, np.nan)
