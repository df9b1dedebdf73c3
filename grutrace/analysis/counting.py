"""How often each unit is in each bin of its values, at steps of each class of a label.

n rows of a block, H units, C classes, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grutrace.analysis.chance import Arrangements
from grutrace.record import Array
from grutrace.statistics.reductions import reduce_rows
from grutrace.storage.index import Integers

#: Levels of a unit, for what bins are too many.
LEVELS = 8

#: Bins of a unit, at most and at least.
BINS, LEAST_BINS = 1024, 64

#: What counts of all units may take, which decides how many bins there are. Bytes.
MEMORY = 32 * 1024 * 1024

#: What one product of labels and levels brings into memory. Bytes.
PRODUCT = 16 * 1024 * 1024


class Ranges:
    """Extremes of each unit at steps with a label.

    Attributes:
        least, largest: (H,) of what is finite; infinities the other way round where nothing is.
        left_out: (H,) how many values are not finite.
    """

    def __init__(self, width: int) -> None:
        self.least, self.largest = np.full(width, np.inf), np.full(width, -np.inf)
        self.left_out = np.zeros(width, np.int64)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in a block: ``code``, and the values."""
        values, _ = _labelled(rows)
        if not len(values):
            return
        least, largest = reduce_rows(np.minimum, values), reduce_rows(np.maximum, values)
        if not (np.isfinite(least).all() and np.isfinite(largest).all()):
            finite = np.isfinite(values)
            self.left_out += np.count_nonzero(~finite, axis=0)
            least = np.where(finite, values, np.inf).min(0)
            largest = np.where(finite, values, -np.inf).max(0)
        np.minimum(self.least, least, out=self.least)
        np.maximum(self.largest, largest, out=self.largest)

    def merge(self, later: Ranges) -> None:
        """Take in those of later rows."""
        np.minimum(self.least, later.least, out=self.least)
        np.maximum(self.largest, later.largest, out=self.largest)
        self.left_out += later.left_out


class Bins:
    """Equal bins between the extremes of each unit.

    Args:
        ranges: The extremes.
        classes: C.

    Attributes:
        count: B, the same for all units.
    """

    def __init__(self, ranges: Ranges, classes: int) -> None:
        width = len(ranges.least)
        self.count = int(np.clip(MEMORY // (8 * classes * max(1, width)), LEAST_BINS, BINS))
        some = ranges.least <= ranges.largest
        self.low = np.where(some, ranges.least, 0.0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            scale = self.count / np.where(some, ranges.largest - ranges.least, 0.0)
        self._scale = np.where(np.isfinite(scale), scale, 0.0)
        self._finite = not ranges.left_out.any()

    def __len__(self) -> int:
        return len(self.low)

    def __call__(self, values: Array) -> Integers:
        """(n, H) the bin of each value; B for what is not finite."""
        exact = np.result_type(values, np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            places = values - self.low.astype(exact)
            places *= self._scale.astype(exact)
            np.minimum(places, self.count - 1, out=places)
        if not self._finite:
            places[~np.isfinite(values)] = self.count
        return np.asarray(places.astype(np.int64))


class Counts:
    """How often each unit was in each bin at steps of each class.

    Attributes:
        counts: (C, H, B), without what is not finite.
    """

    def __init__(self, bins: Bins, classes: int) -> None:
        self._bins = bins
        self.counts = np.zeros((classes, len(bins), bins.count), np.int64)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in a block: ``code``, and the values."""
        values, codes = _labelled(rows)
        _, width, count = self.counts.shape
        places = self._bins(values)
        places += np.arange(width) * (count + 1)
        for code in np.unique(codes).tolist():
            found = np.bincount(places[codes == code].ravel(), minlength=width * (count + 1))
            self.counts[code] += found.reshape(width, count + 1)[:, :count]

    def merge(self, later: Counts) -> None:
        """Take in those of later rows."""
        self.counts += later.counts


class ArrangedCounts:
    """How often each unit was at each level with each class, where labels lie elsewhere.

    Counting is a product of two matrices of zeros and ones: which label each step has in each
    arrangement, and which level each unit has at each step. float32 holds such counts exactly. The
    first class is what is left of the total, which is the same in all arrangements.

    Args:
        arrangements: Of the labels.
        some: The numbers of those to count.
        bins: Of the units.
        levels: (H, B) the level of each bin.
        classes: C.
    """

    def __init__(
        self, arrangements: Arrangements, some: range, bins: Bins, levels: Integers, classes: int
    ) -> None:
        self._arrangements, self._some, self._bins = arrangements, some, bins
        self._sources: Array | None = None
        # What is not finite has a level that is none.
        self._levels = np.concatenate([levels, np.full((len(levels), 1), LEVELS)], axis=1)
        self._others = np.zeros((len(some), classes - 1, len(levels), LEVELS), np.int64)

    def counts(self, total: Integers) -> Integers:
        """(arrangements, C, H, LEVELS), given (H, LEVELS) of all classes together."""
        first = total - self._others.sum(1)
        return np.concatenate([first[:, np.newaxis], self._others], axis=1)

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in a block: ``row``, the number of each, and the values."""
        numbers = rows["row"][:, 0]
        (values,) = (block for name, block in rows.items() if name != "row")
        some = self._arrangements.labelled(numbers)
        numbers, values = numbers[some], values[some]
        permutations, others, width, _ = self._others.shape
        if self._sources is None:
            self._sources = self._arrangements.sources(self._some)
        step = max(1, PRODUCT // (4 * (permutations * others + width * LEVELS)))
        classes, of_unit = np.arange(1, others + 1)[:, np.newaxis], np.arange(width)
        for low in range(0, len(numbers), step):
            part = slice(low, low + step)
            level = self._levels[of_unit, self._bins(values[part])]
            levels = (level[..., np.newaxis] == np.arange(LEVELS)).astype(np.float32)
            codes = self._arrangements.codes(numbers[part], self._some, self._sources)
            labels = (codes[:, np.newaxis] == classes).astype(np.float32)
            found = labels.reshape(permutations * others, -1) @ levels.reshape(len(level), -1)
            self._others += found.reshape(self._others.shape).astype(np.int64)

    def merge(self, later: ArrangedCounts) -> None:
        """Take in those of later rows."""
        self._others += later._others

    def __getstate__(self) -> dict[str, Any]:
        # What follows from the rest need not travel.
        return self.__dict__ | {"_sources": None}


def _labelled(rows: Mapping[str, Array]) -> tuple[Array, Integers]:
    """The rows that have a label, and its code."""
    codes = rows["code"][:, 0]
    (values,) = (block for name, block in rows.items() if name != "code")
    some = codes >= 0
    return (values, codes) if some.all() else (values[some], codes[some])
