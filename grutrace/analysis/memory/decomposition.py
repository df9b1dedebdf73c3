"""Exact decomposition of a state into the contributions of past steps, by unit and summed.

    h(t) = w(0) h(0) + sum over s of w(s) n(s)      w(s) = (1 - z(s)) prod over k > s of z(k)

(the equations of `gru/cell.py`, unrolled). The products run backwards from the state. Each is the
previous product times a number in [0, 1], so no quotient is taken: a gate of exactly 0 ends the
products, and a gate of exactly 1 changes nothing. Sums of logarithms would fail at 0, and products
from the left would have to be divided.

The contribution of a step is a vector, w(s) n(s), of H units. Its *share* is its scalar product
with h(t) over that of h(t) with itself. Shares sum to 1, and are negative for contributions that
later steps outweighed. Its *size* is the sum over units of ``|w(s) n(s)|``.

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

#: Size of a block in memory, in bytes.
BLOCK_BYTES = 4 * 1024 * 1024

#: Largest number of entries of a map.
MAX_MAP_SIZE = 2**27

_REQUIRED = ("update", "candidate", "hidden")


@dataclass(frozen=True, eq=False)
class Decomposition(Result):
    """Decomposition of one state. Past steps are in time order.

    Attributes:
        sequence: Number of the sequence.
        step: The step whose resulting state is decomposed.
        units: (H,) numbers of the units.
        steps: (n,) the past steps: up to `step`, or from it on for a reverse direction.
        written: (n, H) remaining contribution of each step, w(s) n(s).
        weights: (n, H) w(s).
        before: (H,) remaining contribution of the state before these steps, w(0) h(0).
        before_weight: (H,) w(0). Together with `weights` it sums to 1 for each unit.
        hidden: (H,) the recorded state.
        share: (n,) share of each step.
        size: (n,) size of each step.
        before_share: Share of the state before these steps.
        difference: Largest difference, over units, between `hidden` and the sum of `written` and
            `before`. It is the accumulated rounding of the kernel.
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
    """Decompose one state into the contributions of past steps. The cost grows with the steps.

    Args:
        site: A site with update, candidate and hidden.
        sequence: Number of the sequence.
        step: The step whose resulting state is decomposed, in time order; negative numbers count
            from the last.
        back: Largest number of past steps; earlier steps are summed into `before`. Default: all.
        units: Columns of the site to use; shares and sizes are of these. Default: all.

    Returns:
        The contributions. The equations are those of the module.

    Raises:
        NotRecordedError: A required quantity was not recorded, or there is no such step.
        OptionError: `back` is not an integer of 1 or more, or there are no such units.

    Example:
        >>> import torch, grutrace
        >>> from grutrace.analysis import decompose
        >>> layer = torch.nn.GRU(3, 4, dtype=torch.float64)
        >>> with grutrace.trace(layer) as trace:
        ...     _ = layer(torch.randn(5, 1, 3, dtype=torch.float64))
        >>> parts = decompose(trace["l0"], sequence=0, step=-1)
        >>> parts.steps
        array([0, 1, 2, 3, 4])
        >>> round(float(parts.share.sum() + parts.before_share), 9)
        1.0
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
        # Product of the later gates, from the last step backwards.
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
    """Age profile of many states of one sequence.

    Attributes:
        sequence: Number of the sequence.
        steps: (m,) the steps whose resulting states are decomposed, in time order.
        lags: (L,) 0 for the step that made the state, 1 for the step before it, and so on.
        share: (m, L) share of each past step in each state; 0 before the start of the sequence.
        size: (m, L) size of each past step, likewise.
        before_share: (m,) share of the state before these L steps, or before the first step.
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
    """Decompose all states of a sequence, summed over units.

    The cost grows with the states times the past steps: 2 nanoseconds a state, past step and unit.

    Args:
        site: A site with update, candidate and hidden.
        sequence: Number of the sequence.
        first: The first state, in time order.
        last: End of the range of states, exclusive. Default: the end of the sequence.
        back: L, number of past steps. Default: all.

    Returns:
        The shares and sizes by state and lag.

    Raises:
        NotRecordedError: A required quantity was not recorded, or there is no such sequence.
        OptionError: `back` is not an integer of 1 or more, or the map would have more than 2^27
            numbers.

    Example:
        >>> import torch, grutrace
        >>> from grutrace.analysis import memory_map
        >>> layer = torch.nn.GRU(3, 4)
        >>> with grutrace.trace(layer) as trace:
        ...     _ = layer(torch.randn(5, 1, 3))
        >>> memory_map(trace["l0"], sequence=0, back=3).share.shape
        (5, 3)
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
    """Fill the rows of the states made as `start` to `stop`; return the remaining share: (m,)."""
    lags = share.shape[1]
    low = max(0, start + 1 - lags)
    update = _rows_made(site, "update", sequence, low, stop)
    candidate = _rows_made(site, "candidate", sequence, low, stop)
    hidden = _rows_made(site, "hidden", sequence, start, stop)
    with np.errstate(invalid="ignore", divide="ignore"):
        towards = hidden / np.einsum("mh,mh->m", hidden, hidden)[:, np.newaxis]
    kept = np.ones_like(hidden)
    # Number of steps before each state.
    behind = np.arange(start, stop) + 1 - _first_steps(site, sequence, start, stop)
    for lag in range(min(lags, stop)):
        # States with at least this many steps before them.
        some = slice(max(0, lag - start), None)
        past = slice(max(0, start - lag) - low, stop - lag - low)
        there = (behind[some] > lag)[:, np.newaxis]
        written = np.where(there, (1 - update[past]) * kept[some] * candidate[past], 0.0)
        share[some, lag] = np.einsum("mh,mh->m", written, towards[some])
        size[some, lag] = np.abs(written).sum(axis=1)
        kept[some] *= np.where(there, update[past], 1.0)
    before = np.empty_like(hidden)
    near_start = min(stop - start, max(0, lags - start))
    if near_start < stop - start:
        before[near_start:] = _rows_made(
            site, "hidden", sequence, start + near_start - lags, stop - lags
        )
    first = np.arange(start, stop) + 1 - behind
    for step in np.unique(first[behind <= lags]).tolist():
        before[(first == step) & (behind <= lags)] = _state_before(site, sequence, step)
    return np.asarray(np.einsum("mh,mh->m", kept * before, towards))


def _rows_made(site: SiteData, quantity: str, sequence: int, low: int, high: int) -> Array:
    """Read the rows of the steps computed as `low` to `high` - 1: (high - low, H) float64."""
    rows, length = site.rows_between(sequence, sequence + 1), int(site.lengths[sequence])
    if site.reverse:
        low, high = length - high, length - low
    part = slice(rows.start + low, rows.start + high) if isinstance(rows, slice) else rows[low:high]
    found = np.asarray(site.rows(quantity)[part], np.float64)
    return np.asarray(found[:: -1 if site.reverse else 1])


def _state_before(site: SiteData, sequence: int, made: int) -> Array:
    """Return the state that the step computed as number `made` started from: (H,) float64."""
    restarts = site.restarts(sequence, sequence + 1)
    if made in restarts.steps:
        return np.asarray(restarts.states[restarts.steps == made][-1], np.float64)
    if made:
        return np.asarray(_rows_made(site, "hidden", sequence, made - 1, made)[0])
    return np.asarray(site.initial(sequence, sequence + 1)[0], np.float64)


def _first_steps(site: SiteData, sequence: int, low: int, high: int) -> Integers:
    """For steps computed as `low` to `high` - 1, return the step their sequence started with.

    That is the last step, up to then, that started from another state than the sequence had
    reached.
    """
    begins = np.concatenate([[0], site.restarts(sequence, sequence + 1).steps])
    return np.asarray(begins[np.searchsorted(begins, np.arange(low, high), side="right") - 1])


def _in_time(site: SiteData, sequence: int, made: Integers) -> Integers:
    """Convert between time order and the order of computation, in either direction."""
    return np.asarray(site.lengths[sequence] - 1 - made if site.reverse else made)


def _locate(site: SiteData, sequence: int, step: int | None) -> tuple[int, int]:
    """Return the number of a sequence, and the position of a step in the order of computation."""
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
