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
from grutrace.analysis.engine.steps import locate_step, read_steps, state_before, to_time_order
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import items_per_block
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

    Examples:
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
    sequence, last = locate_step(data, sequence, step)
    columns = _columns(data, units)
    first = max(
        _first_steps(data, sequence, last, last + 1)[0], last + 1 - _max_steps(back, last + 1)
    )
    count, width = last + 1 - first, len(data.units[columns])
    written, weights = np.empty((2, count, width))
    remaining = np.ones(width)
    block = items_per_block(BLOCK_BYTES, 8 * len(data.units))
    for high in range(last + 1, first, -block):
        low = max(first, high - block)
        update, candidate = (
            read_steps(data, name, sequence, low, high)[:, columns]
            for name in ("update", "candidate")
        )
        # Product of the later gates, from the last step backwards.
        later = np.concatenate([update[1:], remaining[np.newaxis]])
        products = np.multiply.accumulate(later[::-1], axis=0)[::-1]
        part = slice(low - first, high - first)
        np.multiply(1 - update, products, out=weights[part])
        np.multiply(weights[part], candidate, out=written[part])
        remaining = products[0] * update[0]
    hidden = read_steps(data, "hidden", sequence, last, last + 1)[0, columns]
    before = remaining * state_before(data, sequence, first)[columns]
    square = hidden @ hidden
    with np.errstate(invalid="ignore", divide="ignore"):
        share, before_share = written @ hidden / square, float(before @ hidden / square)
    difference = np.abs(written.sum(axis=0) + before - hidden)
    way = slice(None, None, -1 if data.reverse else 1)
    return Decomposition(
        site=data.name,
        sequence=sequence,
        step=int(to_time_order(data, sequence, np.array(last))),
        units=data.units[columns],
        steps=to_time_order(data, sequence, np.arange(first, last + 1))[way],
        written=written[way],
        weights=weights[way],
        before=before,
        before_weight=remaining,
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

    Examples:
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
    sequence, _ = locate_step(data, sequence, None)
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
    block = items_per_block(BLOCK_BYTES, 8 * len(data.units))
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
    update = read_steps(site, "update", sequence, low, stop)
    candidate = read_steps(site, "candidate", sequence, low, stop)
    hidden = read_steps(site, "hidden", sequence, start, stop)
    with np.errstate(invalid="ignore", divide="ignore"):
        towards = hidden / np.einsum("mh,mh->m", hidden, hidden)[:, np.newaxis]
    remaining = np.ones_like(hidden)
    # Number of steps before each state.
    behind = np.arange(start, stop) + 1 - _first_steps(site, sequence, start, stop)
    for lag in range(min(lags, stop)):
        # States with at least this many steps before them.
        reached = slice(max(0, lag - start), None)
        past = slice(max(0, start - lag) - low, stop - lag - low)
        exists = (behind[reached] > lag)[:, np.newaxis]
        written = np.where(exists, (1 - update[past]) * remaining[reached] * candidate[past], 0.0)
        share[reached, lag] = np.einsum("mh,mh->m", written, towards[reached])
        size[reached, lag] = np.abs(written).sum(axis=1)
        remaining[reached] *= np.where(exists, update[past], 1.0)
    before = np.empty_like(hidden)
    near_start = min(stop - start, max(0, lags - start))
    if near_start < stop - start:
        before[near_start:] = read_steps(
            site, "hidden", sequence, start + near_start - lags, stop - lags
        )
    first = np.arange(start, stop) + 1 - behind
    for step in np.unique(first[behind <= lags]).tolist():
        before[(first == step) & (behind <= lags)] = state_before(site, sequence, step)
    return np.asarray(np.einsum("mh,mh->m", remaining * before, towards))


def _first_steps(site: SiteData, sequence: int, low: int, high: int) -> Integers:
    """For steps computed as `low` to `high` - 1, return the step their sequence started with.

    That is the last step, up to then, that started from another state than the sequence had
    reached.
    """
    begins = np.concatenate([[0], site.restarts(sequence, sequence + 1).steps])
    return np.asarray(begins[np.searchsorted(begins, np.arange(low, high), side="right") - 1])


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
