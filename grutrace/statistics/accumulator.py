"""Accumulators of running statistics: one for each quantity of a site, and one for a whole run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from grutrace.errors import OptionError
from grutrace.native.counting import count_rows
from grutrace.records import Array, TraceHeader
from grutrace.statistics.histogram import quantity_bins
from grutrace.statistics.moments import HIGH, LOW, empty_stats, merge_stats, summarize_block
from grutrace.statistics.results import SiteStatistics, UnitStatistics
from grutrace.storage.format.schema import width

#: Number of elements that are counted at a time: many for NumPy, few enough for the CPU cache.
BLOCK_ELEMENTS = 128 * 1024


class QuantityAccumulator:
    """Accumulates the values of one quantity, unit by unit, in constant memory.

    Args:
        quantity: Name of the quantity.
        width: Number of units (or of features of the input).
        bins: Number of bins of the histogram.
        shares: Whether to count values below `LOW` and above `HIGH`.
        moments: Whether to compute the moments.
        block_elements: Number of elements that are processed at a time.

    Attributes:
        bins: Bins of the histogram; None for the input.
        units: (width,) of type `moments.UNIT_DTYPE`.
        histogram: (width, bins); (width, 0) for the input.
    """

    def __init__(
        self,
        quantity: str,
        width: int,
        bins: int,
        *,
        shares: bool = True,
        moments: bool = True,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        self.bins = quantity_bins(quantity, bins)
        self._shares, self._moments, self._block_elements = shares, moments, block_elements
        self.units = empty_stats(width)
        self.histogram = np.zeros((width, bins if self.bins else 0), np.int64)

    @property
    def width(self) -> int:
        """Number of units."""
        return len(self.units)

    def add(self, rows: Array) -> None:
        """Add (n, width) rows."""
        rows = np.ascontiguousarray(rows)
        if count_rows(
            rows,
            self.units,
            self.histogram,
            self.bins,
            (LOW, HIGH),
            shares=self._shares,
            moments=self._moments,
        ):
            return
        step = max(1, self._block_elements // max(1, self.width))
        # In a diverged model a gate can have any value, and its squares overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                self._add(rows[start : start + step])

    def _add(self, block: Array) -> None:
        units, values, missing = summarize_block(block, shares=self._shares, moments=self._moments)
        if self.bins is not None:
            counts, units["underflow"], units["overflow"] = self.bins.histogram(
                values, units["minimum"].min(), units["maximum"].max()
            )
            # Non-finite values were replaced by 0.
            zero = int(np.searchsorted(self.bins.edges, 0.0, "right")) - 1
            counts[:, zero] -= missing
            self.histogram += counts
        merge_stats(self.units, units)

    def clear(self) -> None:
        """Remove all values."""
        self.units[:] = empty_stats(self.width)
        self.histogram[:] = 0

    def merge(self, other: QuantityAccumulator) -> None:
        """Add the values of another accumulator of the same shape."""
        with np.errstate(over="ignore", invalid="ignore"):
            merge_stats(self.units, other.units)
        self.histogram += other.histogram


#: Counts of one module.
MODULE_DTYPE = np.dtype(
    [("calls", "<i8"), ("sequences", "<i8"), ("steps", "<i8"), ("versions", "<i8")]
)

#: Checks of one site: the largest residual of a call; the number of that call among all modules, -1
#: for none; and the number of calls without a replay.
CHECK_DTYPE = np.dtype([("residual", "<f4"), ("call", "<i8"), ("unchecked", "<i8")])


@dataclass(frozen=True)
class SiteLayout:
    """The shape of the statistics of a site.

    Attributes:
        name: Name of the site.
        module: Index of its module.
        widths: (quantity, number of units) of each quantity.
    """

    name: str
    module: int
    widths: tuple[tuple[str, int], ...]


def site_layouts(header: TraceHeader) -> tuple[SiteLayout, ...]:
    """Return the layout of every site of a trace, with all readable quantities."""
    return tuple(
        SiteLayout(
            site.name,
            number,
            tuple((name, width(module, site, name)) for name in site.available_quantities),
        )
        for number, module in enumerate(header.modules)
        for site in module.sites
    )


class Accumulator:
    """Accumulates the statistics of a run in constant memory. Not thread-safe: the owner locks it.

    Args:
        model: Qualified name of the model's class.
        created: Start of counting, in seconds since the epoch.
        layout: Layout of each site.
        bins: Number of bins of each histogram.

    Attributes:
        modules: (modules,) of type `MODULE_DTYPE`.
        checked: (sites,) of type `CHECK_DTYPE`.
        annotations: Number of annotations.
        accumulators: Accumulators by site, then by quantity.
    """

    def __init__(self, model: str, created: float, layout: Sequence[SiteLayout], bins: int) -> None:
        self.model, self.created, self.bins = model, created, bins
        self.layout = tuple(layout)
        self.modules = np.zeros(1 + max((site.module for site in layout), default=-1), MODULE_DTYPE)
        self.checked = np.zeros(len(self.layout), CHECK_DTYPE)
        self.checked["call"] = -1
        self.annotations = 0
        self.accumulators = tuple(
            {name: QuantityAccumulator(name, units, bins) for name, units in site.widths}
            for site in self.layout
        )

    @property
    def calls(self) -> int:
        """Number of calls of all modules."""
        return int(self.modules["calls"].sum())

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        accumulators = [counts for site in self.accumulators for counts in site.values()]
        inside = sum(counts.units.nbytes + counts.histogram.nbytes for counts in accumulators)
        return inside + self.modules.nbytes + self.checked.nbytes

    def count_calls(self, module: int, calls: int, sequences: int, steps: int) -> None:
        """Add to the counts of a module."""
        entry = self.modules[module]
        entry["calls"] += calls
        entry["sequences"] += sequences
        entry["steps"] += steps

    def check(self, site: int, residual: float, call: int) -> None:
        """Record the residual of the call with this number at a site."""
        entry, residual = self.checked[site], float(np.float32(residual))
        if np.isnan(residual):
            entry["unchecked"] += 1
        elif entry["call"] < 0 or residual > entry["residual"]:
            entry["residual"], entry["call"] = residual, call

    def check_calls(self, site: int, residuals: Array, calls: Array) -> None:
        """Record the residuals of several calls, (n,), with these numbers, (n,), at a site."""
        is_known = ~np.isnan(residuals)
        self.checked[site]["unchecked"] += np.count_nonzero(~is_known)
        if is_known.any():
            # Compared in the stored type, so that the first of equal residuals is found.
            largest = int(np.argmax(np.where(is_known, residuals, -1).astype(np.float32)))
            self.check(site, float(residuals[largest]), int(calls[largest]))

    def clear(self) -> None:
        """Count from 0 again."""
        self.modules[:] = 0
        self.checked[:] = 0
        self.checked["call"] = -1
        self.annotations, self.created = 0, time.time()
        for site in self.accumulators:
            for counts in site.values():
                counts.clear()

    def merge(self, other: Accumulator) -> None:
        """Add the statistics of another accumulator, whose calls follow these.

        Raises:
            OptionError: Its layout or its bins differ.
        """
        self.require_same(other.layout, other.bins)
        before = self.calls
        for site, entry in enumerate(other.checked):
            if entry["call"] >= 0:
                self.check(site, float(entry["residual"]), before + int(entry["call"]))
            self.checked[site]["unchecked"] += entry["unchecked"]
        for name in MODULE_DTYPE.names or ():
            self.modules[name] += other.modules[name]
        self.annotations += other.annotations
        self.created = min(self.created, other.created)
        for ours, theirs in zip(self.accumulators, other.accumulators, strict=True):
            for name, counts in ours.items():
                counts.merge(theirs[name])

    def require_same(self, layout: Sequence[SiteLayout], bins: int | None = None) -> None:
        """Check that a layout and a number of bins are the same.

        Raises:
            OptionError: They differ; the message says what was expected, found, and where.
        """
        for where, expected, actual in self._differences(layout, bins):
            raise OptionError(
                f"statistics do not match: {where}: expected {expected}, found {actual}"
            )

    def _differences(
        self, layout: Sequence[SiteLayout], bins: int | None
    ) -> Iterator[tuple[str, object, object]]:
        if bins not in (None, self.bins):
            yield "bins", self.bins, bins
        names = [site.name for site in self.layout]
        if names != [site.name for site in layout]:
            yield "sites", names, [site.name for site in layout]
        for ours, theirs in zip(self.layout, layout, strict=False):
            if ours.widths != theirs.widths:
                yield f"units of {ours.name!r}", dict(ours.widths), dict(theirs.widths)
            if ours.module != theirs.module:
                yield f"module of {ours.name!r}", ours.module, theirs.module

    def site(self, number: int) -> SiteStatistics:
        """Return a frozen copy of the statistics of a site."""
        layout, checked = self.layout[number], self.checked[number]
        module = self.modules[layout.module]
        has_none = checked["call"] < 0 and checked["unchecked"] > 0
        return SiteStatistics(
            site=layout.name,
            calls=int(module["calls"]),
            sequences=int(module["sequences"]),
            steps=int(module["steps"]),
            versions=int(module["versions"]),
            residual=float("nan") if has_none else float(checked["residual"]),
            residual_call=int(checked["call"]),
            quantities={
                name: _unit_statistics(name, counts, self.bins)
                for name, counts in self.accumulators[number].items()
            },
        )


def _unit_statistics(quantity: str, counts: QuantityAccumulator, bins: int) -> UnitStatistics:
    units, of_bins = counts.units, quantity_bins(quantity, bins)
    count = np.maximum(units["count"], 1)

    def where_counted(values: Array) -> Array:
        return np.where(units["count"] > 0, values, np.nan)

    def share(name: str) -> Array | None:
        return where_counted(units[name] / count) if of_bins else None

    values: dict[str, Array | None] = {
        "count": units["count"].copy(),
        "nan": units["nan"].copy(),
        "infinite": units["infinite"].copy(),
        "mean": where_counted(units["mean"]),
        "variance": where_counted(units["squares"] / count),
        "minimum": where_counted(units["minimum"]),
        "maximum": where_counted(units["maximum"]),
        "below": share("below"),
        "above": share("above"),
        "histogram": counts.histogram.copy() if of_bins else None,
        "edges": of_bins.edges if of_bins else None,
        "underflow": units["underflow"].copy() if of_bins else None,
        "overflow": units["overflow"].copy() if of_bins else None,
    }
    for array in values.values():
        if array is not None:
            array.flags.writeable = False
    return UnitStatistics(quantity=quantity, **values)  # type: ignore[arg-type]
