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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data, unit_quantities
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import items_per_block
from grutrace.storage.read.sequence_index import Integers

#: Default number of stages.
STAGES = 10

#: Largest number of groups of sequences whose order is permuted.
MAX_GROUPS = 512

#: Bytes of the rows that are read at once.
BLOCK_BYTES = 16 * 1024 * 1024


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
    by_stage = {name: np.zeros((stage_count, width)) for name in quantities}
    by_group = {name: np.zeros((group_count, width)) for name in quantities}
    position = np.cumsum(data.lengths > 0) - 1
    stage_sizes = np.bincount(np.arange(total) * stage_count // max(1, total))
    group_sizes = np.bincount(np.arange(total) * group_count // max(1, total))
    for first, last in _blocks(data, quantities):
        chosen = numbers[(numbers >= first) & (numbers < last)]
        if len(chosen):
            starts = np.cumsum(data.lengths[chosen]) - data.lengths[chosen]
            at = position[chosen]
            for name in quantities:
                rows = np.asarray(data.rows(name)[data.rows_between(first, last)])
                with np.errstate(invalid="ignore", over="ignore"):
                    sums = np.add.reduceat(rows, starts, axis=0, dtype=np.float64)
                    means = sums / data.lengths[chosen][:, np.newaxis]
                    np.add.at(by_stage[name], at * stage_count // total, means)
                    np.add.at(by_group[name], at * group_count // total, means)
        if data.advance is not None:
            data.advance(last, len(data.lengths))
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


def _blocks(data: SiteData, quantities: tuple[str, ...] | list[str]) -> Iterator[tuple[int, int]]:
    """Yield ranges of sequences whose rows fit `BLOCK_BYTES`, or one sequence."""
    at_once = items_per_block(BLOCK_BYTES, 8 * max(1, len(data.units)) * len(quantities))
    ends, first = np.cumsum(data.lengths), 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + at_once, "right")))
        yield first, last
        first = last


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
    orders = random.permuted(np.tile(order, (permutations, 1)), axis=1)
    largest = np.abs(orders @ unit).max(axis=1)
    p = (1 + (largest[:, np.newaxis] >= np.abs(trend) - 1e-12).sum(axis=0)) / (1 + permutations)
    return np.where(moves, trend, np.nan), np.where(moves, p, np.nan)
