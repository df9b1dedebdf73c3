"""`Window`: a part of a trace, reduced to the pixels of a picture, block by block."""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import item_bytes, items_per_block
from grutrace.storage.read.sequence_index import Integers
from grutrace.view.live.engine.step_axis import StepAxis

Statistic = Literal["mean", "min", "max"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

#: Bytes of rows that are read and reduced at once.
BLOCK = 256 * 1024


class Span(NamedTuple):
    """A window: positions on the axis of steps, and places in the order of the units."""

    start: int
    stop: int
    first: int
    last: int


class Window:
    """Mean, least and greatest value of every pixel of a window. W x H pixels at most.

    `advance` reads the window for a limited time, in blocks of steps. The blocks are spread evenly
    over what is not read yet, so that the picture is a sample of the whole window from the first
    moment, and exact in the end. NaN and infinite values are left out. Memory does not depend on
    the size of the window.

    Args:
        rows: (N, U) rows of the quantity.
        axis: The axis of steps.
        span: The window; it is cut to what exists.
        width: W, the number of pixels of the axis of steps.
        height: H, the number of pixels of the axis of units.
        order: (U,) the units from bottom to top; by number by default.

    Attributes:
        span: The window.
        steps: (columns + 1,) bounds of the columns of pixels, on the axis of steps.
        units: (rows + 1,) bounds of the rows of pixels, in the order of the units.
        steps_read: Number of steps that are read.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> from grutrace.view.live.engine.step_axis import step_axis
        >>> from grutrace.view.live.engine.window import Span, Window
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))  # 20 steps
        >>> site = trace["l0"]
        >>> window = Window(site.update, step_axis(site), Span(0, 20, 0, 3), width=4, height=3)
        >>> window.advance(seconds=1)
        True
        >>> window.image("mean").shape, window.steps
        ((3, 4), array([ 0,  5, 10, 15, 20]))
    """

    def __init__(
        self,
        rows: Rows,
        axis: StepAxis,
        span: Span,
        *,
        width: int,
        height: int,
        order: Array | None = None,
    ) -> None:
        start, stop = (min(max(0, int(position)), len(axis)) for position in span[:2])
        first, last = (min(max(0, int(place)), rows.shape[1]) for place in span[2:])
        self.span = Span(start, max(start, stop), first, max(first, last))
        self._rows, self._axis = rows, axis
        self._columns = slice(self.span.first, self.span.last)
        self._order = None if order is None else np.asarray(order)[self._columns]
        self.steps = _pixel_bounds(self.span.start, self.span.stop, width)
        self.units = _pixel_bounds(self.span.first, self.span.last, height)
        shape = len(self.steps) - 1, len(self.units) - 1
        self._sums = np.zeros(shape, np.float64)
        self._counts = np.zeros(shape, np.int64)
        self._least = np.full(shape, np.inf, np.float32)
        self._greatest = np.full(shape, -np.inf, np.float32)
        self._is_read = np.zeros(shape[0], bool)
        self._block_steps = items_per_block(BLOCK, item_bytes(rows))
        blocks = -(-(self.span.stop - self.span.start) // self._block_steps)
        self._blocks = _spread(blocks if 0 not in shape else 0)
        self._next = 0
        self.steps_read = 0

    @property
    def complete(self) -> bool:
        """Whether every step of the window is read."""
        return self._next == len(self._blocks)

    @property
    def sequences_read(self) -> int:
        """Number of sequences of which at least one step is read."""
        starts = self.span.start + self._blocks[: self._next] * self._block_steps
        stops = np.minimum(starts + self._block_steps, self.span.stop)
        firsts, lasts = self._axis.places_between_all(starts, stops)
        begins_less_ends = np.zeros(len(self._axis.sequences) + 1, np.int64)
        np.add.at(begins_less_ends, firsts, 1)
        np.add.at(begins_less_ends, lasts, -1)
        return int(np.count_nonzero(np.cumsum(begins_less_ends)))

    @property
    def sequences(self) -> int:
        """Number of sequences in the window."""
        first, last = self._axis.places_between(self.span.start, self.span.stop)
        return last - first

    def advance(self, seconds: float) -> bool:
        """Read for about this time, at least one block. Return whether the window is complete."""
        deadline = time.perf_counter() + seconds
        while not self.complete:
            self._read(*self._block_bounds(int(self._blocks[self._next])))
            self._next += 1
            if time.perf_counter() >= deadline:
                break
        return self.complete

    def image(self, statistic: Statistic = "mean") -> npt.NDArray[np.float32]:
        """Return the pixels, (rows, columns), with the first unit in row 0.

        A column of which no step is read yet shows the nearest column that is. A pixel without any
        finite value is NaN.
        """
        empty = self._counts == 0
        if statistic == "mean":
            values = (self._sums / np.maximum(self._counts, 1)).astype(np.float32)
        else:
            values = (self._least if statistic == "min" else self._greatest).copy()
        values[empty] = np.nan
        read = np.flatnonzero(self._is_read)
        if len(read) and len(read) < len(values):
            columns = np.arange(len(values))
            after = np.minimum(np.searchsorted(read, columns), len(read) - 1)
            before = np.maximum(after - 1, 0)
            is_before_nearer = columns - read[before] < read[after] - columns
            values = values[np.where(is_before_nearer, read[before], read[after])]
        return np.ascontiguousarray(values.T)

    def _block_bounds(self, block: int) -> tuple[int, int]:
        start = self.span.start + block * self._block_steps
        return start, min(start + self._block_steps, self.span.stop)

    def _read(self, start: int, stop: int) -> None:
        rows = self._axis.rows(start, stop)
        if self._order is None:
            values = np.asarray(self._rows[rows, self._columns])
        else:
            values = np.asarray(self._rows[rows])[:, self._order]
        first = int(np.searchsorted(self.steps, start, side="right")) - 1
        last = int(np.searchsorted(self.steps, stop, side="left"))
        columns = slice(first, last)
        steps = np.maximum(self.steps[first:last], start) - start
        units = self.units[:-1] - self.span.first
        values = values.astype(np.float32, copy=False)
        # Infinities of both signs are NaN together.
        with np.errstate(invalid="ignore"):
            sums = _reduce(np.add, values, steps, units, np.dtype(np.float64))
        if np.isfinite(sums).all():
            bounds = np.append(steps, stop - start)
            self._counts[columns] += np.outer(np.diff(bounds), np.diff(self.units))
            least = greatest = values
        else:
            finite = np.isfinite(values)
            sums = _reduce(np.add, np.where(finite, values, 0), steps, units, sums.dtype)
            self._counts[columns] += _reduce(np.add, finite, steps, units, np.dtype(np.int64))
            least, greatest = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
        self._sums[columns] += sums
        least, greatest = (
            _reduce(function, array, steps, units, None)
            for function, array in ((np.minimum, least), (np.maximum, greatest))
        )
        self._least[columns] = np.minimum(self._least[columns], least)
        self._greatest[columns] = np.maximum(self._greatest[columns], greatest)
        self._is_read[columns] = True
        self.steps_read += stop - start


def _reduce(
    function: np.ufunc, values: Array, steps: Integers, units: Integers, dtype: Any
) -> Array:
    """Reduce steps, then units, from each of these starts to the next."""
    for axis, starts in enumerate((steps, units)):
        if len(starts) < values.shape[axis]:
            values = function.reduceat(values, starts, axis=axis, dtype=dtype)
    return values


def _pixel_bounds(start: int, stop: int, pixels: int) -> Integers:
    """Return bounds that split a range into at most this many parts of nearly equal size."""
    parts = min(max(1, pixels), stop - start)
    return start + np.arange(parts + 1) * (stop - start) // max(1, parts)


def _spread(count: int) -> Integers:
    """Return 0 to `count` - 1 in an order that is spread evenly, however far it is followed."""
    numbers = np.arange(count)
    bits = max(1, count - 1).bit_length()
    reversed_bits = np.zeros(count, np.int64)
    for bit in range(bits):
        reversed_bits |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return np.argsort(reversed_bits, kind="stable")
