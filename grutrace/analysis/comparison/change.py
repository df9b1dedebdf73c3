"""Change of the units between two traces of one model.

The traces may be of before and after training, or of other inputs.

Sites are compared by unit and quantity. The difference of two means is given unscaled, and as
Cohen's d: divided by the pooled standard deviation, the root of the mean of both variances (Cohen
1988, "Statistical power analysis for the behavioral sciences", chapter 2; 0.2 is small, 0.8 large).

Steps of a sequence resemble each other, so the standard error is clustered by sequence. With s and
T the sum and the number of steps of each of S sequences, and m the mean of all N steps,

    error^2 = S / (S - 1) * sum over sequences of (s - T m)^2 / N^2

(the linearized variance of a ratio; Cochran 1977, "Sampling techniques", 3rd edition, section 6.3).

If both traces have the same inputs, they can be compared step by step: the root mean square
difference of each unit, and its correlation.

N steps, H units or columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import SequenceSegment
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data, with_columns
from grutrace.errors import NotRecordedError, OptionError
from grutrace.records import GATES, QUANTITIES, Array
from grutrace.storage.read.lazy_rows import SelectedRows
from grutrace.storage.read.sequence_index import Integers


class ClusteredSums:
    """Running sums of values minus an origin, with a variance clustered by sequence.

    Subtracting an origin near the values avoids cancellation.

    Args:
        origin: (H,) a value of each column, near the others.

    Attributes:
        count: N.
        sequences: S, number of sequences with steps.
    """

    def __init__(self, origin: Array) -> None:
        self._origin = origin
        self.count = self.sequences = 0
        self._total, self._squares = np.zeros_like(origin), np.zeros_like(origin)
        # Sums over complete sequences of s^2, s T and T^2; and s and T of the current sequence.
        self._sum_squares, self._sum_steps = np.zeros_like(origin), np.zeros_like(origin)
        self._steps_squares = 0.0
        self._own, self._steps = np.zeros_like(origin), 0

    def add(self, distance: Array, ends: bool) -> None:
        """Add steps of one sequence, the next ones of it or the first of another.

        Args:
            distance: (n, H) values minus the origin.
            ends: Whether they are the last of their sequence.
        """
        total = distance.sum(0)
        self.count += len(distance)
        self._total += total
        self._squares += np.einsum("nh,nh->h", distance, distance)
        self._own += total
        self._steps += len(distance)
        if ends:
            self.sequences += 1
            self._sum_squares += self._own**2
            self._sum_steps += self._own * self._steps
            self._steps_squares += float(self._steps) ** 2
            self._own, self._steps = np.zeros_like(self._own), 0

    def merge(self, later: ClusteredSums) -> None:
        """Add the sums of later sequences."""
        self.count += later.count
        self.sequences += later.sequences
        self._total += later._total
        self._squares += later._squares
        self._sum_squares += later._sum_squares
        self._sum_steps += later._sum_steps
        self._steps_squares += later._steps_squares

    @property
    def shift(self) -> Array:
        """(H,) mean distance from the origin; NaN where there are no steps."""
        return np.asarray(self._total / (self.count or np.nan))

    @property
    def mean(self) -> Array:
        """(H,) mean."""
        return np.asarray(self._origin + self.shift)

    @property
    def variance(self) -> Array:
        """(H,) variance over all steps, with N in the denominator."""
        of_squares = self._squares / (self.count or np.nan)
        return np.asarray(np.maximum(of_squares - self.shift**2, 0.0))

    @property
    def error(self) -> Array:
        """(H,) standard error of the mean; NaN for fewer than two sequences."""
        if self.sequences < 2:
            return np.full_like(self._origin, np.nan)
        rmse = (
            self._sum_squares
            - 2 * self.shift * self._sum_steps
            + self.shift**2 * self._steps_squares
        )
        factor = self.sequences / (self.sequences - 1)
        return np.asarray(np.sqrt(np.maximum(rmse, 0.0) * factor) / self.count)


#: The compared quantities: all but the input, which has no units.
QUANTITIES_COMPARED = tuple(name for name in QUANTITIES if name != "input")


#: Columns of quantities, by name.
Columns: TypeAlias = Sequence[tuple[str, Integers]]

#: Prefix of the names of the other trace's quantities.
_OTHER = "other "


@dataclass(frozen=True, eq=False)
class Change(Result):
    """Change of a site between two traces, by common quantity, (H,) each.

    Values are NaN where there are no steps, or where a value of the unit is NaN.

    Attributes:
        other: Name of the site in the later trace.
        steps_before, steps_after: Numbers of steps of all sequences.
        paired: Whether the traces were compared step by step.
        units: (H,) numbers of the common units.
        before, after: Means.
        moved: after - before.
        effect: Cohen's d; infinite where a constant unit moved.
        error: Standard error of `moved`, clustered by sequence; NaN for fewer than two sequences.
        rmse: Root mean square difference at the same step; only if paired.
        correlation: Correlation at the same step; only if paired. NaN where a unit is constant.
        weights: By gate, (H,) norm of the change of the unit's row of weights and biases, relative
            to its norm before; empty where weights were not recorded. The last versions are
            compared.
    """

    other: str
    steps_before: int
    steps_after: int
    paired: bool
    units: Integers
    before: Mapping[str, Array]
    after: Mapping[str, Array]
    moved: Mapping[str, Array]
    effect: Mapping[str, Array]
    error: Mapping[str, Array]
    rmse: Mapping[str, Array]
    correlation: Mapping[str, Array]
    weights: Mapping[str, Array]


def change(before: SiteLike, against: SiteLike, *, paired: bool = False) -> Change:
    """Compare the units of a site in two traces.

    Args:
        before: The site in the earlier trace.
        against: The same site in the later trace.
        paired: Whether both traces have the same inputs in the same order, so that they can be
            compared step by step. The sequences must have the same lengths; the inputs are not
            checked.

    Returns:
        The differences of each quantity and unit.

    Raises:
        NotRecordedError: The sites have no quantity or no unit in common.
        OptionError: `paired` is set and the sequences differ in length or direction.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, change
        >>> before = SiteArrays(update=np.array([[0.1], [0.3], [0.1], [0.3]]), lengths=[2, 2])
        >>> after = SiteArrays(update=np.array([[0.6], [0.8], [0.6], [0.8]]), lengths=[2, 2])
        >>> result = change(before, after)
        >>> result.moved["update"].round(6), result.effect["update"].round(6)
        (array([0.5]), array([5.]))
    """
    first, second = as_site_data(before), as_site_data(against)
    names = [
        name
        for name in QUANTITIES_COMPARED
        if name in first.quantities and name in second.quantities
    ]
    if not names:
        raise NotRecordedError(
            f"{first.name!r} has {', '.join(first.quantities) or 'nothing'}, the other has "
            f"{', '.join(second.quantities) or 'nothing'}: nothing in common to compare"
        )
    units, ours, theirs = np.intersect1d(first.units, second.units, return_indices=True)
    if not len(units):
        raise NotRecordedError(f"{first.name!r}: no unit was recorded in both")
    columns_before = [(name, ours) for name in names]
    if paired:
        site = _beside(first, second, names)
        both = _sums(site, columns_before, [(_OTHER + name, theirs) for name in names])
        sums = both.before, both.after
        error, rmse, correlation = both.difference.error, both.rmse, both.correlation
    else:
        sums = (
            _sums(first, columns_before).before,
            _sums(second, [(name, theirs) for name in names]).before,
        )
        error, rmse, correlation = np.hypot(sums[0].error, sums[1].error), None, None

    def by_name(values: Array | None) -> dict[str, Array]:
        if values is None:
            return {}
        return dict(zip(names, np.split(values, len(names)), strict=True))

    before_it, after_it = sums
    return Change(
        site=first.name,
        other=second.name,
        steps_before=first.steps,
        steps_after=second.steps,
        paired=paired,
        units=units,
        before=by_name(before_it.mean),
        after=by_name(after_it.mean),
        moved=by_name(after_it.mean - before_it.mean),
        effect=by_name(_effect(before_it, after_it)),
        error=by_name(error),
        rmse=by_name(rmse),
        correlation=by_name(correlation),
        weights=_weights(first, second, units),
    )


def _effect(before: ClusteredSums, after: ClusteredSums) -> Array:
    """Cohen's d."""
    moved = after.mean - before.mean
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = moved / np.sqrt((before.variance + after.variance) / 2)
    # A constant unit that did not move has no effect.
    return np.asarray(np.where(moved == 0, 0.0, effect))


def _weights(before: SiteData, after: SiteData, units: Integers) -> dict[str, Array]:
    try:
        one, other = before.weights(-1), after.weights(-1)
    except NotRecordedError:
        return {}
    names = [name for name in one if name in other and one[name].shape == other[name].shape]
    if "weight_hh" not in names:
        return {}
    size, moved = (np.zeros(len(one["weight_hh"])) for _ in range(2))
    for name in names:
        exact = [np.asarray(of[name], np.float64) for of in (one, other)]
        rows = [values.reshape(len(values), -1) for values in exact]
        size += np.square(rows[0]).sum(1)
        moved += np.square(rows[1] - rows[0]).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.sqrt(moved) / np.sqrt(size)
    relative[moved == 0] = 0.0
    return {
        gate: part[units] for gate, part in zip(GATES, np.split(relative, len(GATES)), strict=True)
    }


def _beside(first: SiteData, second: SiteData, names: Sequence[str]) -> SiteData:
    """The first site, with the rows of the second beside its own."""
    if not np.array_equal(first.lengths, second.lengths):
        raise OptionError(
            f"paired: expected sequences of the same lengths in both traces of {first.name!r}; "
            f"found {len(first.lengths)} with {first.steps} steps and {len(second.lengths)} with "
            f"{second.steps}"
        )
    if first.reverse != second.reverse:
        raise OptionError(f"paired: {first.name!r} and {second.name!r} go in opposite directions")
    ours, theirs = (of.rows_between(0, len(of.lengths)) for of in (first, second))
    if isinstance(ours, slice) and isinstance(theirs, slice):
        return with_columns(first, {_OTHER + name: second.rows(name) for name in names})
    numbers = np.arange(first.steps)
    order = np.empty(first.steps, np.int64)
    order[ours] = numbers[theirs]
    reordered = {_OTHER + name: SelectedRows(second.rows(name), order) for name in names}
    return with_columns(first, reordered)


def _sums(site: SiteData, before: Columns, after: Columns = ()) -> _PairedSums:
    quantities = [name for name, _ in (*before, *after)]
    origins = [
        np.concatenate(
            [
                np.asarray(site.rows(name)[:1], np.float64)[0, columns]
                if site.steps
                else np.zeros(len(columns))
                for name, columns in side
            ]
        )
        for side in (before, after)
        if side
    ]
    return reduce_sequences(site, quantities, partial(_PairedSums, before, after, origins))


class _PairedSums:
    """Sums of one trace; or of both, of their difference, and of their products."""

    def __init__(self, before: Columns, after: Columns, origins: Sequence[Array]) -> None:
        self._before, self._after, self._origins = before, after, origins
        self.before = ClusteredSums(origins[0])
        if after:
            self.after, self.difference = (
                ClusteredSums(origins[1]),
                ClusteredSums(origins[1] - origins[0]),
            )
            self._products = np.zeros(len(origins[0]))

    def add(self, segment: SequenceSegment) -> None:
        before = _distances(segment, self._before, self._origins[0])
        self.before.add(before, segment.ends)
        if self._after:
            after = _distances(segment, self._after, self._origins[1])
            self.after.add(after, segment.ends)
            self.difference.add(after - before, segment.ends)
            self._products += np.einsum("nh,nh->h", before, after)

    def merge(self, later: _PairedSums) -> None:
        self.before.merge(later.before)
        if self._after:
            self.after.merge(later.after)
            self.difference.merge(later.difference)
            self._products += later._products

    @property
    def rmse(self) -> Array:
        """Root mean square difference."""
        return np.asarray(np.sqrt(self.difference.variance + self.difference.mean**2))

    @property
    def correlation(self) -> Array:
        """Pearson correlation."""
        count = self.before.count or np.nan
        covariance = self._products / count - self.before.shift * self.after.shift
        scale = np.sqrt(self.before.variance * self.after.variance)
        correlation_of_units = np.full(len(scale), np.nan)
        np.divide(covariance, scale, out=correlation_of_units, where=scale > 0)
        return np.asarray(np.clip(correlation_of_units, -1.0, 1.0))


def _distances(segment: SequenceSegment, side: Columns, origin: Array) -> Array:
    """Subtract the origin from the values of all quantities: (n, columns) float64."""
    distances = np.empty((len(segment), len(origin)))
    start = 0
    for name, columns in side:
        values, part = segment.values[name], slice(start, start + len(columns))
        if len(columns) < values.shape[1] or np.any(np.diff(columns) != 1):
            values = values[:, columns]
        np.subtract(values, origin[part], out=distances[:, part])
        start += len(columns)
    return distances
