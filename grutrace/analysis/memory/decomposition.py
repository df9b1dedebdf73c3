"""What each past step wrote into a state: exactly, unit by unit and summed.

    h(t) = w(0) h(0) + sum over s of w(s) n(s)      w(s) = (1 - z(s)) prod over k > s of z(k)

(the equations of `gru/cell.py`, written out). The products are taken from the right, from the state
backwards: each is the one before times a number from 0 to 1, so none is ever a quotient, a gate
that is exactly 0 ends them and one that is exactly 1 changes nothing. Sums of logarithms would fail
at 0, and products from the left would have to be divided by what came later.

What a step wrote is a vector, w(s) n(s), of H units. Its *share* is its part of the state, as long
as it points the same way: its scalar product with h(t) over that of h(t) with itself. Shares add up
to 1, and are negative for what later steps outweighed. Its *size* is the sum over units of
``|w(s) n(s)|``.

T steps, H units, n past steps, m states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: How much is brought into memory at once. Bytes of float64.
BLOCK_BYTES = 4 * 1024 * 1024

#: The most numbers that a map may have.
MAX_MAP_SIZE = 2**27

_REQUIRED = ("update", "candidate", "hidden")


@dataclass(frozen=True, eq=False)
class Decomposition(Result):
    """Of one state. Past steps are in time order.

    Attributes:
        sequence: Number of the sequence.
        step: After which of its steps the state is.
        units: (H,) numbers of the units.
        steps: (n,) the past steps: up to `step`, or, where the sequence was read backwards, from it
            on.
        written: (n, H) what is left of what each wrote, w(s) n(s).
        weights: (n, H) w(s).
        before: (H,) what is left of the state before all of them, w(0) h(0).
        before_weight: (H,) w(0). With `weights`, adds up to 1 in each unit.
        hidden: (H,) the state, as it was recorded.
        share: (n,) of each step.
        size: (n,) of each step.
        before_share: Of the state before all of them.
        difference: The largest difference, over units, between `hidden` and the sum of `written`
            and `before`: what rounding in the kernel has left. Each step rounds, and that is kept
            as long as what it wrote.
    """

    index_field: ClassVar[str] = "steps"
    array_only_fields: ClassVar[tuple[str, ...]] = ("written", "weights")

    sequence: int
    step: int
    units: Integers
    steps: Integers
    written: Array
    weights: Array
    before: Array
    before_weight: Array
    hidden: Array
    share: Array
    size: Array
    before_share: float
    difference: float


def decompose(
    site: SiteLike,
    sequence: int,
    step: int = -1,
    back: int | None = None,
    units: Sequence[int] | None = None,
) -> Decomposition:
    """Take one state apart into what each past step wrote. The work grows with the steps.

    Args:
        site: With update, candidate and hidden.
        sequence: Number of the sequence.
        step: After which step, in time order; negative numbers count from the last.
        back: So many steps at most; what came before them is one part then. All unless given.
        units: Columns of the site that are taken; all unless given. Shares and sizes are theirs.

    Raises:
        NotRecordedError: Something needed was not recorded, or there is no such step.
        OptionError: There cannot be so many steps, or there are no such units.
    """
    data = as_site_data(site)
    data.require(*_REQUIRED)
    sequence, made = _locate(data, sequence, step)
    columns = _columns(data, units)
    first = max(
        _first_steps(data, sequence, made, made + 1)[0], made + 1 - _max_steps(back, made + 1)
    )
    count, width = made + 1 - first, len(data.units[columns])
    written, weights = np.empty((2, count, width))
    kept = np.ones(width)
    block = max(1, BLOCK_BYTES // (8 * max(1, len(data.units))))
    for high in range(made + 1, first, -block):
        low = max(first, high - block)
        update, candidate = (
            _rows_made(data, name, sequence, low, high)[:, columns]
            for name in ("update", "candidate")
        )
        # What of each step is left when all later ones are made: from the last one backwards.
        later = np.concatenate([update[1:], kept[np.newaxis]])
        left = np.multiply.accumulate(later[::-1], axis=0)[::-1]
        part = slice(low - first, high - first)
        np.multiply(1 - update, left, out=weights[part])
        np.multiply(weights[part], candidate, out=written[part])
        kept = left[0] * update[0]
    hidden = _rows_made(data, "hidden", sequence, made, made + 1)[0, columns]
    before = kept * _state_before(data, sequence, first)[columns]
    square = hidden @ hidden
    with np.errstate(invalid="ignore", divide="ignore"):
        share, before_share = written @ hidden / square, float(before @ hidden / square)
    difference = np.abs(written.sum(axis=0) + before - hidden)
    way = slice(None, None, -1 if data.reverse else 1)
    return Decomposition(
        site=data.name,
        sequence=sequence,
        step=int(_in_time(data, sequence, np.array(made))),
        units=data.units[columns],
        steps=_in_time(data, sequence, np.arange(first, made + 1))[way],
        written=written[way],
        weights=weights[way],
        before=before,
        before_weight=kept,
        hidden=hidden,
        share=share[way],
        size=np.abs(written).sum(axis=1)[way],
        before_share=before_share,
        difference=float(difference.max(initial=0.0)),
    )


@dataclass(frozen=True, eq=False)
class MemoryMap(Result):
    """Of many states of one sequence: how much of each was written how many steps before.

    Attributes:
        sequence: Number of the sequence.
        steps: (m,) after which of its steps each state is, in time order.
        lags: (L,) 0 for the step that made the state, 1 for the one made before it, and so on.
        share: (m, L) of each past step in each state; 0 where there are not so many steps.
        size: (m, L) likewise.
        before_share: (m,) of the state before these L steps, or before the first step.
    """

    index_field: ClassVar[str] = "steps"
    array_only_fields: ClassVar[tuple[str, ...]] = ("share", "size")

    sequence: int
    steps: Integers
    lags: Integers
    share: Array
    size: Array
    before_share: Array


def memory_map(
    site: SiteLike,
    sequence: int,
    first: int = 0,
    last: int | None = None,
    back: int | None = None,
) -> MemoryMap:
    """Take all states of a sequence apart, summed over units.

    The work grows with the states times the past steps: 2 nanoseconds a state, past step and unit.

    Args:
        site: With update, candidate and hidden.
        sequence: Number of the sequence.
        first: The first state, in time order.
        last: The one before which to end; after the last unless given.
        back: L; all past steps unless given.

    Raises:
        NotRecordedError: Something needed was not recorded, or there is no such sequence.
        OptionError: There cannot be so many steps, or the map would have more than 2^27 numbers.
    """
    data = as_site_data(site)
    data.require(*_REQUIRED)
    sequence, _ = _locate(data, sequence, None)
    length = int(data.lengths[sequence])
    steps = range(length)[first:last]
    lags = _max_steps(back, length)
    if len(steps) * lags > MAX_MAP_SIZE:
        raise OptionError(
            f"a map of {len(steps)} states and {lags} past steps would have more than "
            f"{MAX_MAP_SIZE} numbers; ask for fewer states (first, last) or past steps (back)"
        )
    share, size = np.zeros((2, len(steps), lags))
    before_share = np.zeros(len(steps))
    block = max(1, BLOCK_BYTES // (8 * max(1, len(data.units))))
    low, high = steps.start, steps.stop
    if data.reverse:
        low, high = length - high, length - low
    for start in range(low, high, block):
        stop = min(start + block, high)
        part = slice(start - low, stop - low)
        before_share[part] = _map_block(data, sequence, start, stop, share[part], size[part])
    way = slice(None, None, -1 if data.reverse else 1)
    return MemoryMap(
        site=data.name,
        sequence=sequence,
        steps=np.array(steps),
        lags=np.arange(lags),
        share=share[way],
        size=size[way],
        before_share=before_share[way],
    )


def _map_block(
    site: SiteData, sequence: int, start: int, stop: int, share: Array, size: Array
) -> Array:
    """Fill the rows of the states made as `start` to `stop`; return (m,) what is left over."""
    lags = share.shape[1]
    low = max(0, start + 1 - lags)
    update = _rows_made(site, "update", sequence, low, stop)
    candidate = _rows_made(site, "candidate", sequence, low, stop)
    hidden = _rows_made(site, "hidden", sequence, start, stop)
    with np.errstate(invalid="ignore", divide="ignore"):
        towards = hidden / np.einsum("mh,mh->m", hidden, hidden)[:, np.newaxis]
    kept = np.ones_like(hidden)
    # How many steps each state has behind it.
    behind = np.arange(start, stop) + 1 - _first_steps(site, sequence, start, stop)
    for lag in range(min(lags, stop)):
        # Those states that have as many steps.
        some = slice(max(0, lag - start), None)
        past = slice(max(0, start - lag) - low, stop - lag - low)
        there = (behind[some] > lag)[:, np.newaxis]
        written = np.where(there, (1 - update[past]) * kept[some] * candidate[past], 0.0)
        share[some, lag] = np.einsum("mh,mh->m", written, towards[some])
        size[some, lag] = np.abs(written).sum(axis=1)
        kept[some] *= np.where(there, update[past], 1.0)
    before = np.empty_like(hidden)
    within = min(stop - start, max(0, lags - start))
    if within < stop - start:
        before[within:] = _rows_made(site, "hidden", sequence, start + within - lags, stop - lags)
    first = np.arange(start, stop) + 1 - behind
    for step in np.unique(first[behind <= lags]).tolist():
        before[(first == step) & (behind <= lags)] = _state_before(site, sequence, step)
    return np.asarray(np.einsum("mh,mh->m", kept * before, towards))


def _rows_made(site: SiteData, quantity: str, sequence: int, low: int, high: int) -> Array:
    """(high - low, H) float64 rows of the steps that were made as number `low` to `high` - 1."""
    rows, length = site.rows_between(sequence, sequence + 1), int(site.lengths[sequence])
    if site.reverse:
        low, high = length - high, length - low
    part = slice(rows.start + low, rows.start + high) if isinstance(rows, slice) else rows[low:high]
    found = np.asarray(site.rows(quantity)[part], np.float64)
    return np.asarray(found[:: -1 if site.reverse else 1])


def _state_before(site: SiteData, sequence: int, made: int) -> Array:
    """(H,) float64, the state from which the step that was made as this number started."""
    restarts = site.restarts(sequence, sequence + 1)
    if made in restarts.steps:
        return np.asarray(restarts.states[restarts.steps == made][-1], np.float64)
    if made:
        return np.asarray(_rows_made(site, "hidden", sequence, made - 1, made)[0])
    return np.asarray(site.initial(sequence, sequence + 1)[0], np.float64)


def _first_steps(site: SiteData, sequence: int, low: int, high: int) -> Integers:
    """(high - low,) for steps made as `low` to `high` - 1, the one with which the sequence began.

    Or the last one up to then that started from another state than the sequence had ended with.
    """
    begins = np.concatenate([[0], site.restarts(sequence, sequence + 1).steps])
    return np.asarray(begins[np.searchsorted(begins, np.arange(low, high), side="right") - 1])


def _in_time(site: SiteData, sequence: int, made: Integers) -> Integers:
    """Which step in time order was made as this number, or the other way round."""
    return np.asarray(site.lengths[sequence] - 1 - made if site.reverse else made)


def _locate(site: SiteData, sequence: int, step: int | None) -> tuple[int, int]:
    """The number of a sequence, and as which number a step of it was made."""
    count = len(site.lengths)
    if not -count <= sequence < count:
        raise NotRecordedError(f"{site.name!r} has no sequence {sequence}; it has {count}")
    sequence %= count
    length = int(site.lengths[sequence])
    if step is None:
        return sequence, 0
    if not -length <= step < length:
        raise NotRecordedError(
            f"sequence {sequence} of {site.name!r} has no step {step}; it has {length}"
        )
    return sequence, int(_in_time(site, sequence, np.array(step % length)))


def _max_steps(back: int | None, all_of_them: int) -> int:
    if back is None:
        return all_of_them
    if not isinstance(back, int) or back < 1:
        raise OptionError(f"back: expected a number of steps, 1 or more; found {short_repr(back)}")
    return min(back, all_of_them)


def _columns(site: SiteData, units: Sequence[int] | None) -> slice | Integers:
    if units is None:
        return slice(None)
    columns = np.asarray(units)
    width = len(site.units)
    if (
        columns.ndim != 1
        or columns.dtype.kind not in "iu"
        or ((columns < 0) | (columns >= width)).any()
    ):
        raise OptionError(
            f"units: expected columns from 0 to {width - 1}; found {short_repr(units)}"
        )
    return columns
