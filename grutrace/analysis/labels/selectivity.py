"""Selectivity: how well each unit tells the values of a label apart, compared with chance.

For each value of the label and each unit, the area under the ROC curve is the probability that the
unit is larger at a step with this value than at a step with another, counting ties as half (Hanley
and McNeil 1982, "The meaning and use of the area under a receiver operating characteristic curve").
It is 0.5 for an uninformative unit, and 0 or 1 for one that decides alone.

The mutual information of the label and the unit, in `LEVELS` levels of equal frequency, is positive
by chance too. Its null distribution is computed from permutations of the labels. Steps of one
sequence resemble each other, so labels are not shuffled step by step, which would find every slow
unit selective for every slow label (Harris 2020, "Nonsense correlations in neuroscience");
`label_coding` describes the permutations.

N steps with the label, H units, C classes, B bins, n rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from grutrace.analysis.engine.map_reduce import reduce_rows, summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import (
    SiteData,
    SiteLike,
    as_site_data,
    sequence_ids,
    step_ids,
    with_columns,
)
from grutrace.analysis.labels.label_coding import LabelPermutations, encode_classes
from grutrace.records import Array
from grutrace.statistics.moments import merge_stats, summarize_block
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.sequence_index import Integers

#: Number of levels of a unit for the mutual information.
LEVELS = 8

#: Largest and smallest number of bins of a unit.
MAX_BINS, MIN_BINS = 1024, 64

#: Size of the counts of all units, which determines the number of bins, in bytes.
COUNT_BYTES = 32 * 1024 * 1024

#: Size of one product of labels and levels, in bytes.
PRODUCT_BYTES = 16 * 1024 * 1024


def labelled_range(rows: Mapping[str, Array]) -> Array:
    """Return the extremes of each unit at labelled steps, (H,) of type `moments.UNIT_DTYPE`.

    Args:
        rows: The values of one quantity, (n, H), and ``code``.
    """
    values, _ = _labelled(rows)
    return summarize_block(np.ascontiguousarray(values), shares=False, moments=False)[0]


class Bins:
    """Equal bins between the minimum and the maximum of each unit.

    Args:
        ranges: (H,) of type `moments.UNIT_DTYPE`.
        classes: C.

    Attributes:
        count: B, the same for all units.
    """

    def __init__(self, ranges: Array, classes: int) -> None:
        minimum, maximum = ranges["minimum"], ranges["maximum"]
        width = len(minimum)
        self.count = int(np.clip(COUNT_BYTES // (8 * classes * max(1, width)), MIN_BINS, MAX_BINS))
        has_values = minimum <= maximum
        self.low = np.where(has_values, minimum, 0.0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            scale = self.count / np.where(has_values, maximum - minimum, 0.0)
        self._scale = np.where(np.isfinite(scale), scale, 0.0)
        self._finite = not (ranges["nan"] + ranges["infinite"]).any()

    def __len__(self) -> int:
        return len(self.low)

    def __call__(self, values: Array) -> Integers:
        """Return the bin of each value: (n, H); B for values that are not finite."""
        exact = np.result_type(values, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            positions = values - self.low.astype(exact)
            positions *= self._scale.astype(exact)
            np.minimum(positions, self.count - 1, out=positions)
        if not self._finite:
            positions[~np.isfinite(values)] = self.count
        return np.asarray(positions.astype(np.int64))


class ClassHistogram:
    """Histogram of each unit at the steps of each class.

    Attributes:
        counts: (C, H, B), of finite values.
    """

    def __init__(self, bins: Bins, classes: int) -> None:
        self._bins = bins
        self.counts = np.zeros((classes, len(bins), bins.count), np.int64)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Add a block: ``code``, and the values."""
        values, codes = _labelled(rows)
        _, width, count = self.counts.shape
        positions = self._bins(values)
        positions += np.arange(width) * (count + 1)
        for code in np.unique(codes).tolist():
            counts = np.bincount(positions[codes == code].ravel(), minlength=width * (count + 1))
            self.counts[code] += counts.reshape(width, count + 1)[:, :count]

    def merge(self, later: ClassHistogram) -> None:
        """Add the counts of later rows."""
        self.counts += later.counts


class PermutedHistogram:
    """Counts of each unit's levels by class, for permuted labels.

    The counts are a product of two matrices of zeros and ones: the label of each step in each
    permutation, and the level of each unit at each step. float32 holds such counts exactly. The
    first class is the remainder of the total, which is the same in all permutations.

    Args:
        label_permutations: The permutations of the labels.
        numbers: Numbers of the permutations to count.
        bins: Bins of the units.
        levels: (H, B) the level of each bin.
        classes: C.
    """

    def __init__(
        self,
        label_permutations: LabelPermutations,
        numbers: range,
        bins: Bins,
        levels: Integers,
        classes: int,
    ) -> None:
        self._label_permutations, self._numbers, self._bins = label_permutations, numbers, bins
        self._sources: Array | None = None
        # Non-finite values get a level that is not counted.
        self._levels = np.concatenate([levels, np.full((len(levels), 1), LEVELS)], axis=1)
        self._others = np.zeros((len(numbers), classes - 1, len(levels), LEVELS), np.int64)

    def counts(self, total: Integers) -> Integers:
        """Return (permutations, C, H, LEVELS), given (H, LEVELS) for all classes together."""
        first = total - self._others.sum(1)
        return np.concatenate([first[:, np.newaxis], self._others], axis=1)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Add a block: ``row``, the number of each row, and the values."""
        numbers = rows["row"][:, 0]
        (values,) = (block for name, block in rows.items() if name != "row")
        is_labelled = self._label_permutations.labelled(numbers)
        numbers, values = numbers[is_labelled], values[is_labelled]
        permutations, others, width, _ = self._others.shape
        if self._sources is None:
            self._sources = self._label_permutations.sources(self._numbers)
        row_bytes = 4 * (permutations * others + width * LEVELS)
        classes, of_unit = np.arange(1, others + 1)[:, np.newaxis], np.arange(width)
        for part in block_slices(len(numbers), PRODUCT_BYTES, row_bytes):
            level = self._levels[of_unit, self._bins(values[part])]
            levels = (level[..., np.newaxis] == np.arange(LEVELS)).astype(np.float32)
            codes = self._label_permutations.codes(numbers[part], self._numbers, self._sources)
            labels = (codes[:, np.newaxis] == classes).astype(np.float32)
            counts = labels.reshape(permutations * others, -1) @ levels.reshape(len(level), -1)
            self._others += counts.reshape(self._others.shape).astype(np.int64)

    def merge(self, later: PermutedHistogram) -> None:
        """Add the counts of later rows."""
        self._others += later._others

    def __getstate__(self) -> dict[str, Any]:
        # Recomputed after unpickling.
        return self.__dict__ | {"_sources": None}


def _labelled(rows: Mapping[str, Array]) -> tuple[Array, Integers]:
    """Return the rows that have a label, and its code."""
    codes = rows["code"][:, 0]
    (values,) = (block for name, block in rows.items() if name != "code")
    labelled = codes >= 0
    return (values, codes) if labelled.all() else (values[labelled], codes[labelled])


@dataclass(frozen=True, eq=False)
class Selectivity(Result):
    """Selectivity of the units of a site for a label.

    Attributes:
        label: Name of the label.
        quantity: The quantity: hidden, a gate, or input.
        steps: N, number of steps that have the label.
        null: How labels were permuted: ``swapped`` between sequences, ``rotated`` within each, or
            ``both``; see `label_coding.LabelPermutations`.
        permutations: Number of permutations.
        selective: Number of units with `p` below 0.05.
        classes: (C,) the values of the label, or groups of them; see `label_coding.encode_classes`.
        counts: (C,) number of steps of each class.
        units: (H,) numbers of the units.
        best: (H,) class that the unit separates best from all others.
        auc: (H,) area under the ROC curve of that class. Below 0.5 the unit is smaller there.
        auc_error: (H,) largest error of an area due to binning: half the share of pairs in the same
            bin, the maximum over classes.
        information: (H,) mutual information, in bits.
        null_mean: (H,) mean information over permutations: the chance level to subtract.
        p: (H,) p-value, corrected for the number of units: (1 + number of permutations in which the
            largest information of all units was as large) / (1 + permutations).
        aucs: (C, H) area under the ROC curve of each class against all others.
        not_finite: (H,) number of values that are not finite. They are skipped. The area is NaN
            where no finite value is left.
    """

    excluded_columns: ClassVar[tuple[str, ...]] = ("counts",)

    label: str
    quantity: str
    steps: int
    null: str
    permutations: int
    selective: int
    classes: tuple[str | float, ...]
    counts: Integers
    units: Integers
    best: Array
    auc: Array
    auc_error: Array
    information: Array
    null_mean: Array
    p: Array
    aucs: Array
    not_finite: Integers

    @property
    def ranking(self) -> Integers:
        """(H,) numbers of the units, by decreasing information above chance."""
        above = np.nan_to_num(self.information - self.null_mean, nan=-np.inf)
        return np.asarray(self.units[np.argsort(-above, kind="stable")])


def selectivity(
    site: SiteLike,
    label: str,
    quantity: str = "hidden",
    *,
    permutations: int = 100,
    seed: int = 0,
) -> Selectivity:
    """Find the units that follow a label.

    The rows are read three times, or more often if H, C and the permutations are many: for the
    range of each unit, for the counts, and for the permutations, which take longest.

    Args:
        site: A site with the quantity, and labels or tokens.
        label: Name of the label, or ``tokens``.
        quantity: hidden, a gate, or input.
        permutations: Number of permutations; 0 for no test.
        seed: Seed of the permutations.

    Returns:
        Areas, information and p-values of each unit.

    Raises:
        NotRecordedError: The quantity was not recorded, or there is no such label.
        OptionError: The label has fewer than two values.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, selectivity
        >>> states = np.random.default_rng(0).uniform(-1, 1, (400, 3))
        >>> labels = {"sign": np.where(states[:, 1] > 0, "plus", "minus")}
        >>> site = SiteArrays(hidden=states, lengths=[10] * 40, labels=labels)
        >>> result = selectivity(site, "sign")
        >>> int(result.ranking[0]), bool(result.p[1] < 0.05)
        (1, True)
    """
    data = as_site_data(site)
    data.require(quantity)
    classes = encode_classes(data.labels(label))
    codes = classes.codes.astype(np.int32)
    with_label = with_columns(data, {"code": codes[:, np.newaxis]})
    width, count = data.rows(quantity).shape[1], len(classes.names)
    quantities = (quantity, "code")
    ranges = summarize_rows(with_label, quantities, labelled_range, merge_stats)
    bins = Bins(ranges, count)
    counts = reduce_rows(with_label, quantities, partial(ClassHistogram, bins, count)).counts
    aucs, errors = _auc(counts)
    levels = _levels(counts)
    information = _information(_bins_to_levels(counts, levels))
    label_permutations = LabelPermutations(
        codes, sequence_ids(data), step_ids(data), len(data.lengths), permutations, seed
    )
    null = _null_information(data, quantity, label_permutations, bins, levels, counts)
    largest = np.array([0.0, *np.nanmax(null, axis=1, initial=0.0)])[1:]
    with np.errstate(invalid="ignore"):
        p = (1 + (largest[:, np.newaxis] >= information - 1e-12).sum(0)) / (1 + permutations)
    known = counts.sum((0, 2)) > 0
    best = np.abs(np.nan_to_num(aucs, nan=0.5) - 0.5)[::-1].argmax(0)
    best = count - 1 - best
    return Selectivity(
        site=data.name,
        label=label,
        quantity=quantity,
        steps=int(np.count_nonzero(codes >= 0)),
        null=label_permutations.kind,
        permutations=permutations,
        selective=int(np.count_nonzero(known & (p < 0.05))),
        classes=classes.names,
        counts=classes.counts,
        units=data.units if quantity != "input" else np.arange(width),
        best=np.array(classes.names, object)[best],
        auc=aucs[best, np.arange(width)],
        auc_error=errors,
        information=np.where(known, information, np.nan),
        null_mean=null.mean(0) if permutations else np.full(width, np.nan),
        p=np.where(known & (permutations > 0), p, np.nan),
        aucs=aucs,
        not_finite=ranges["nan"] + ranges["infinite"],
    )


def _auc(counts: Array) -> tuple[Array, Array]:
    """Compute the areas under the ROC curves, (C, H), and their largest errors, (H,)."""
    total = counts.sum(0)
    aucs, errors = np.full(counts.shape[:2], np.nan), np.zeros(counts.shape[1])
    for code, own in enumerate(counts):
        others = total - own
        pairs = own.sum(1, dtype=np.float64) * others.sum(1)
        below = np.cumsum(others, axis=1) - others
        equal = (own * others.astype(np.float64)).sum(1) / 2
        won = (own * below.astype(np.float64)).sum(1) + equal
        np.divide(won, pairs, out=aucs[code], where=pairs > 0)
        part = np.divide(equal, pairs, out=np.zeros(len(pairs)), where=pairs > 0)
        errors = np.maximum(errors, part)
    return aucs, errors


def _levels(counts: Array) -> Integers:
    """Return the level of each bin, by its middle among all steps: (H, B)."""
    total = counts.sum(0)
    middle = np.cumsum(total, axis=1) - total / 2
    whole = np.maximum(total.sum(1, keepdims=True), 1)
    return np.asarray(np.minimum((middle * LEVELS / whole).astype(np.int64), LEVELS - 1))


def _bins_to_levels(counts: Array, levels: Integers) -> Array:
    """Sum counts of bins to counts of levels: (C, H, LEVELS)."""
    joined = np.empty((*counts.shape[:2], LEVELS), np.int64)
    for level in range(LEVELS):
        joined[..., level] = np.where(levels == level, counts, 0).sum(2)
    return joined


def _information(joint: Array) -> Array:
    """Compute the mutual information in bits from (C, H, LEVELS) counts: (H,)."""
    count = np.maximum(joint.sum((0, 2)), 1)[np.newaxis, :, np.newaxis]
    share = joint / count
    of_class, of_level = share.sum(2, keepdims=True), share.sum(0, keepdims=True)
    occurs = share > 0
    ratio = np.divide(share, of_class * of_level, out=np.ones_like(share), where=occurs)
    return np.asarray((share * np.log2(ratio)).sum((0, 2)))


def _null_information(
    data: SiteData,
    quantity: str,
    label_permutations: LabelPermutations,
    bins: Bins,
    levels: Integers,
    counts: Array,
) -> Array:
    """Compute the information for permuted labels: (permutations, H)."""
    classes, width, _ = counts.shape
    total = _bins_to_levels(counts, levels).sum(0)
    permutation_bytes = 8 * classes * width * LEVELS + 4 * label_permutations.total
    rows = np.arange(data.steps, dtype=np.int64)[:, np.newaxis]
    with_row = with_columns(data, {"row": rows})
    information = np.empty((label_permutations.count, width))
    for part in block_slices(label_permutations.count, COUNT_BYTES, permutation_bytes):
        numbers = range(part.start, part.stop)
        make_reducer = partial(
            PermutedHistogram, label_permutations, numbers, bins, levels, classes
        )
        joint = reduce_rows(with_row, (quantity, "row"), make_reducer).counts(total)
        for number, permuted_counts in zip(numbers, joint, strict=True):
            information[number] = _information(permuted_counts)
    return information
