"""Iterate over sequences in the order in which the network computed them.

H units, n steps of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from grutrace.analysis.engine.site_data import SiteData, row_bytes
from grutrace.analysis.engine.steps import row_numbers
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import items_per_block
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.snapshot import Restarts

#: Size of a block in memory, in bytes.
BLOCK_BYTES = 16 * 1024 * 1024

#: Computed from stored data: the state before each step; the weights of each step; and whether a
#: step started from another state than the sequence had reached, which splits a segment.
PREVIOUS, WEIGHTS, RESTARTS = "previous", "weights", "restarts"
DERIVED_INPUTS = (PREVIOUS, WEIGHTS, RESTARTS)


@dataclass(frozen=True, eq=False)
class SequenceSegment:
    """Consecutive steps of one sequence, in the order of computation.

    For a reverse direction that is from the last step to the first.

    Attributes:
        sequence: Number of the sequence.
        start: Number of its steps computed before these.
        length: Number of steps of the whole sequence.
        values: By quantity, (n, H), or (n, I) for the input.
        previous: (n, H) the state that each step started from, if requested.
        weights: The weights that computed all of these steps, if requested.
        restarts: Whether the first step started from another state than the sequence had reached,
            if requested.
    """

    sequence: int
    start: int
    length: int
    values: Mapping[str, Array]
    previous: Array | None = None
    weights: Mapping[str, Array] | None = None
    restarts: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def is_first(self) -> bool:
        """Whether its first step is the sequence's first, or restarts from another state."""
        return self.start == 0 or self.restarts

    @property
    def ends(self) -> bool:
        """Whether its last step is the sequence's last."""
        return self.start + len(self) == self.length


def iter_segments(
    site: SiteData, quantities: Sequence[str], first: int = 0, last: int | None = None
) -> Iterator[SequenceSegment]:
    """Yield the segments of sequences in order, in blocks of bounded size.

    A sequence is one segment unless it is longer than `BLOCK_BYTES`, or, if requested, its weights
    or its state were changed between two steps. Sequences without steps are skipped.

    Args:
        site: The site.
        quantities: Names of the quantities, and `PREVIOUS`, `WEIGHTS` and `RESTARTS` where needed.
        first: The first sequence.
        last: End of the range of sequences, exclusive. Default: all.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    last = len(site.lengths) if last is None else last
    stored = [name for name in quantities if name not in DERIVED_INPUTS]
    if PREVIOUS in quantities and "hidden" not in stored:
        stored.append("hidden")
    site.require(*stored)
    rows_per_block = items_per_block(BLOCK_BYTES, row_bytes(site, stored))
    ends = np.cumsum(site.lengths[first:last])
    start = first
    while start < last:
        before = int(ends[start - first - 1]) if start > first else 0
        stop = first + int(np.searchsorted(ends, before + rows_per_block, "right"))
        if stop > start:
            yield from _read_together(site, stored, quantities, start, stop)
        else:
            stop = start + 1
            yield from _read_in_blocks(site, stored, quantities, start, rows_per_block)
        start = stop


def _read_together(
    site: SiteData, stored: Sequence[str], requested: Sequence[str], first: int, last: int
) -> Iterator[SequenceSegment]:
    """Yield the segments of several sequences that fit one block."""
    rows = site.rows_between(first, last)
    values = {name: np.asarray(site.rows(name)[rows]) for name in stored}
    initial = site.initial(first, last) if PREVIOUS in requested else None
    versions = site.versions(rows) if WEIGHTS in requested else None
    restarts = _restarts(site, requested, first, last)
    start = 0
    for number in range(first, last):
        length = int(site.lengths[number])
        part = slice(start, start + length)
        start += length
        if not length:
            continue
        before = None if initial is None else initial[number - first]
        own = None if versions is None else versions[part]
        piece = {name: value[part] for name, value in values.items()}
        starts = _restarts_in(restarts, number)
        yield from _split_segments(site, number, 0, length, piece, before, own, starts, requested)


def _read_in_blocks(
    site: SiteData,
    stored: Sequence[str],
    requested: Sequence[str],
    number: int,
    rows_per_block: int,
) -> Iterator[SequenceSegment]:
    """Yield the segments of one sequence that exceeds one block."""
    length = int(site.lengths[number])
    before = site.initial(number, number + 1)[0] if PREVIOUS in requested else None
    restarts = _restarts_in(_restarts(site, requested, number, number + 1), number)
    for start in range(0, length, rows_per_block):
        count = min(rows_per_block, length - start)
        part = row_numbers(site, number, start, start + count)
        values = {name: np.asarray(site.rows(name)[part]) for name in stored}
        versions = site.versions(part) if WEIGHTS in requested else None
        for segment in _split_segments(
            site, number, start, length, values, before, versions, restarts, requested
        ):
            yield segment
        if before is not None:
            before = segment.values["hidden"][-1]


def _split_segments(
    site: SiteData,
    number: int,
    start: int,
    length: int,
    values: Mapping[str, Array],
    before: Array | None,
    versions: Integers | None,
    restarts: Restarts | None,
    requested: Sequence[str],
) -> Iterator[SequenceSegment]:
    """Put rows into the order of computation and split them where weights or states change."""
    if site.reverse:
        values = {name: value[::-1] for name, value in values.items()}
        versions = None if versions is None else versions[::-1]
    previous = None
    if before is not None:
        previous = np.concatenate([before[np.newaxis], values["hidden"][:-1]])
        previous = previous.astype(values["hidden"].dtype, copy=False)
    count = len(next(iter(values.values())))
    changed = set[int]()
    if restarts is not None:
        # A reverse direction never continues a sequence.
        steps = restarts.steps - start
        here = (steps >= 0) & (steps < count)
        if previous is not None:
            previous[steps[here]] = restarts.states[here]
        changed = set(steps[here].tolist()) if RESTARTS in requested else changed
    if versions is None and not changed:
        yield SequenceSegment(number, start, length, values, previous)
        return
    bounds = {0, count, *changed}
    if versions is not None:
        bounds |= set((np.flatnonzero(np.diff(versions)) + 1).tolist())
    for low, high in pairwise(sorted(bounds)):
        yield SequenceSegment(
            number,
            start + low,
            length,
            {name: value[low:high] for name, value in values.items()},
            None if previous is None else previous[low:high],
            None if versions is None else site.weights(int(versions[low])),
            low in changed,
        )


def _restarts(site: SiteData, requested: Sequence[str], first: int, last: int) -> Restarts | None:
    """Return the steps of these sequences that restart from another state; None if none."""
    if PREVIOUS not in requested and RESTARTS not in requested:
        return None
    restarts = site.restarts(first, last)
    return restarts if len(restarts.steps) else None


def _restarts_in(restarts: Restarts | None, number: int) -> Restarts | None:
    """Return the restarts of one sequence; None if it has none."""
    if restarts is None:
        return None
    low, high = np.searchsorted(restarts.sequences, [number, number + 1])
    return Restarts(*(column[low:high] for column in restarts)) if low < high else None
