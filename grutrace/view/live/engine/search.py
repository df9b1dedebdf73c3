"""`Search`: all stretches of a trace in which the same units are on, ranked."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grutrace.errors import OptionError
from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import item_bytes, items_per_block
from grutrace.view.live.engine.step_axis import StepAxis
from grutrace.view.live.engine.stretches import Condition, Stretch

#: Bytes of rows that are read at once.
BLOCK = 1024 * 1024

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Match:
    """A stretch in which enough of the units are on.

    Attributes:
        stretch: The stretch.
        held: Number of the units that are on at every step of it.
        switched: Number of those that are off at the step before and at the step after.
    """

    stretch: Stretch
    held: int
    switched: int


#: A match while the search runs: a place on the axis, positions, and the rank's figures.
_FOUND = np.dtype(
    [("place", np.int64), ("start", np.int64), ("stop", np.int64), ("held", np.int64)]
    + [("switched", np.int64)]
)


@dataclass
class _OpenRun:
    """A run of steps that reaches the end of what is read."""

    place: int
    start: int
    held: Mask
    off_before: Mask


class Search:
    """An exact search of all sequences of an axis, in slices of time. k units.

    A match is a longest run of steps of one sequence at each of which at least `least` of the units
    are on. Matches are ranked by the number of units that are on throughout, then by the number of
    those that are off just before and just after, then by how near their length is to that of the
    example, then by their place in the file. Runs that overlap the example are left out.

    `advance` searches for a limited time, so that a program can show progress, and stop.

    Args:
        rows: (N, U) rows of the quantity.
        axis: The axis of steps.
        units: (k,) the units.
        condition: When a unit is on.
        example: The stretch to which others are similar.
        least: Number of units that are on at every step of a match; all by default.
        limit: Number of matches that are kept.

    Attributes:
        count: Number of matches so far, also of those that are not kept.
        position: Number of steps that are searched.

    Raises:
        OptionError: There is no unit, or `least` is not between 1 and k.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> from grutrace.view.live.engine.search import Search
        >>> from grutrace.view.live.engine.step_axis import step_axis
        >>> from grutrace.view.live.engine.stretches import Condition, Stretch
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> site = trace["l0"]
        >>> example = Stretch(sequence=0, start=0, stop=5)
        >>> search = Search(site.update, step_axis(site), [0, 2], Condition(0.0), example)
        >>> search.advance(seconds=1)
        True
        >>> [match.stretch.sequence for match in search.matches]
        [1, 2, 3]
    """

    def __init__(
        self,
        rows: Rows,
        axis: StepAxis,
        units: Array | list[int],
        condition: Condition,
        example: Stretch,
        *,
        least: int | None = None,
        limit: int = 50,
    ) -> None:
        self._units = np.asarray(units, np.int64)
        least = len(self._units) if least is None else least
        if not len(self._units) or not 1 <= least <= len(self._units):
            raise OptionError(
                f"search: expected at least one unit, and least from 1 to their number; found "
                f"{len(self._units)} units and least {least}"
            )
        self._rows, self._axis, self._condition = rows, axis, condition
        self._example, self._least, self._limit = example, least, limit
        self._open: _OpenRun | None = None
        self._last: tuple[int, Mask] = (-1, np.zeros(len(self._units), bool))
        self._block_steps = items_per_block(BLOCK, item_bytes(rows))
        self._found = np.zeros(0, _FOUND)
        self.count = 0
        self.position = 0

    @property
    def complete(self) -> bool:
        """Whether the whole axis is searched."""
        return self.position == len(self._axis)

    @property
    def progress(self) -> float:
        """The share of the axis that is searched, from 0 to 1."""
        return self.position / max(1, len(self._axis))

    @property
    def matches(self) -> list[Match]:
        """The best matches so far, the best first."""
        sequences = self._axis.sequences[self._found["place"]]
        firsts = self._axis.bounds[self._found["place"]]
        return [
            Match(
                Stretch(int(sequence), int(run["start"] - first), int(run["stop"] - first)),
                int(run["held"]),
                int(run["switched"]),
            )
            for sequence, first, run in zip(sequences, firsts, self._found, strict=True)
        ]

    def advance(self, seconds: float) -> bool:
        """Search for about this time, at least one block. Return whether the search is complete."""
        deadline = time.perf_counter() + seconds
        while not self.complete:
            stop = min(self.position + self._block_steps, len(self._axis))
            self._search(self.position, stop)
            self.position = stop
            if self.complete and self._open is not None:
                self._keep(self._close(np.ones(len(self._units), bool)))
            if time.perf_counter() >= deadline:
                break
        return self.complete

    def _search(self, start: int, stop: int) -> None:
        values = np.asarray(self._rows[self._axis.rows(start, stop)])[:, self._units]
        on = self._condition.is_on(values)
        places = self._axis.places(start, stop)
        last_place, last_on = self._last
        # Whether each step goes on from the step before, in the same sequence.
        goes_on = np.concatenate([[places[0] == last_place], places[1:] == places[:-1]])
        enough = np.count_nonzero(on, axis=1) >= self._least
        off_before = ~np.concatenate([[last_on], on[:-1]])
        off_before[~goes_on] = True
        joined = enough[1:] & enough[:-1] & goes_on[1:]
        starts = np.flatnonzero(enough & ~np.concatenate([[False], joined]))
        stops = np.flatnonzero(enough & ~np.concatenate([joined, [False]])) + 1
        found: list[Array] = []
        is_joined = self._open is not None and goes_on[0] and enough[0]
        if self._open is not None and not is_joined:
            found.append(self._close(off_before[0] if not goes_on[0] else ~on[0]))
        if len(starts):
            bounds = np.stack([starts, stops], axis=1).ravel()
            # The last bound may be the end of the array, which reduceat does not take.
            padded = np.concatenate([on, np.ones((1, on.shape[1]), bool)])
            held = np.logical_and.reduceat(padded, bounds, axis=0)[::2]
            before = off_before[starts]
            firsts = starts + start
            if is_joined and self._open is not None:
                held[0] &= self._open.held
                before[0], firsts[0] = self._open.off_before, self._open.start
                self._open = None
            after = np.ones_like(before)
            is_inside = stops < len(on)
            inside = stops[is_inside]
            after[is_inside] = ~on[inside] | ~goes_on[inside][:, np.newaxis]
            if stops[-1] == len(on):
                self._open = _OpenRun(int(places[-1]), int(firsts[-1]), held[-1], before[-1])
                starts, stops, firsts = starts[:-1], stops[:-1], firsts[:-1]
                held, before, after = held[:-1], before[:-1], after[:-1]
            runs = np.zeros(len(starts), _FOUND)
            runs["place"], runs["start"], runs["stop"] = places[starts], firsts, stops + start
            runs["held"] = held.sum(axis=1)
            runs["switched"] = (held & before & after).sum(axis=1)
            found.append(runs)
        self._last = int(places[-1]), on[-1]
        if found:
            self._keep(np.concatenate(found))

    def _close(self, off_after: Mask) -> Array:
        """Return the open run, which ends at `position`, as a match."""
        run = self._open
        assert run is not None
        self._open = None
        held, switched = run.held, run.held & run.off_before & off_after
        items = [(run.place, run.start, self.position, held.sum(), switched.sum())]
        return np.array(items, _FOUND)

    def _keep(self, runs: Array) -> None:
        """Count matches, and keep the best."""
        extent = self._axis.extent(self._example.sequence)
        if extent is not None:
            first = extent[0]
            overlaps = (runs["start"] < first + self._example.stop) & (
                runs["stop"] > first + self._example.start
            )
            runs = runs[~overlaps]
        self.count += len(runs)
        runs = np.concatenate([self._found, runs])
        distance = np.abs(runs["stop"] - runs["start"] - len(self._example))
        keys = (runs["start"], distance, -runs["switched"], -runs["held"])
        self._found = runs[np.lexsort(keys)[: self._limit]]
