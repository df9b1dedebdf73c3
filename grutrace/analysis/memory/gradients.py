"""Gradients through time: how fast the gradient of a loss vanishes, or grows, from step to step.

The total gradient of a state is dL/dh(t). Its norm is compared at equal distances from the loss: d
steps before the last step that has a gradient at all. If the norm falls by a constant factor per
step, |dL/dh| = c * f^d, then it halves every ln 2 / -ln f steps. Bengio, Simard and Frasconi
(1994), "Learning long-term dependencies with gradient descent is difficult", show why it vanishes
or explodes.

The direct path through h(t) = (1 - z) n + z h(t - 1) has the factor z. So a unit whose update gate
is z keeps a gradient as long as it keeps its state (`timescales`), apart from what flows through
the gates and the candidate. Tallec and Ollivier (2018), "Can recurrent neural networks warp time?",
choose the biases of the gates by it (chrono initialization).

N rows, S sequences, H units, D distances, K stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import items_per_block
from grutrace.storage.read.sequence_index import Integers

#: Bytes of the rows that are read at once.
BLOCK_BYTES = 16 * 1024 * 1024

#: Steps further from the loss than this are left out.
MAX_DISTANCE = 10_000

#: Largest number of stages of a run.
STAGES = 10


@dataclass(frozen=True, eq=False)
class Gradients(Result):
    """How the gradient of a loss changes from step to step, away from the loss.

    Attributes:
        sequences: Number of sequences with a gradient.
        without_gradient: Number of sequences without one: no backward pass reached them (NaN), or
            the loss does not depend on them (0).
        factor: Factor of the norm per step away from the loss, fitted to `norms`. Below 1 the
            gradient vanishes, above 1 it explodes. NaN with fewer than two distances.
        half_life: Steps in which the norm halves. Infinite if it does not fall.
        first_half_life: `half_life` in the first stage of the run.
        last_half_life: `half_life` in its last stage.
        units: (H,) numbers of the units.
        unit_norm: (H,) root mean square of the gradient of each unit, at distance 0.
        unit_factor: (H,) `factor` of each unit's gradient alone.
        unit_half_life: (H,) `half_life` of each unit's gradient alone.
        norms: (D,) root mean square over sequences of |dL/dh|, at each distance from the loss.
        counts: (D,) number of sequences with a step at each distance.
        stage_norm: (K,) `norms` at distance 0 in each stage of the run: the sequences in their
            order, in at most `STAGES` equal parts.
        stage_half_life: (K,) `half_life` in each stage.
    """

    array_only_fields: ClassVar[tuple[str, ...]] = ("norms", "counts")
    excluded_columns: ClassVar[tuple[str, ...]] = (
        *("norms", "counts", "stage_norm", "stage_half_life"),
    )

    sequences: int
    without_gradient: int
    factor: float
    half_life: float
    first_half_life: float
    last_half_life: float
    units: Integers
    unit_norm: Array
    unit_factor: Array
    unit_half_life: Array
    norms: Array
    counts: Integers
    stage_norm: Array
    stage_half_life: Array


def gradients(site: SiteLike) -> Gradients:
    """Measure how fast the gradient of a loss vanishes or explodes through time.

    The loss should depend on the end of the sequences: on the final state, or on one late step. A
    loss of every step adds a gradient at every step, and the norm says little about time. Where the
    state of a sequence was detached between two calls, the steps before are measured from the last
    one that has a gradient, like a sequence of their own.

    Args:
        site: A site of a trace with ``record="gradient"``, or `SiteArrays` with `gradient`, the
            total gradients of the states.

    Returns:
        Norms by distance, with the fitted factor and half-life, of all units together and of each.

    Raises:
        NotRecordedError: The gradient was not recorded.

    Examples:
        A gradient that halves every two steps:

        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, gradients
        >>> steps = np.arange(10)[:, np.newaxis]
        >>> found = gradients(SiteArrays(gradient=0.5 ** ((9 - steps) / 2) * np.ones((1, 3))))
        >>> round(found.half_life, 6), round(found.factor, 6)
        (2.0, 0.707107)
    """
    data = as_site_data(site)
    if "gradient" not in data.quantities:
        raise NotRecordedError(
            f"{data.name!r} has no gradients: record them with record=('hidden', 'gradient')"
        )
    count = len(data.lengths)
    stages = max(1, min(STAGES, count))
    longest = min(int(data.lengths.max(initial=0)), MAX_DISTANCE)
    sums = np.zeros((stages, longest, len(data.units)))
    counts = np.zeros((stages, longest), np.int64)
    with_gradient = _add_sequences(data, sums, counts)
    norms = _rms(sums.sum((0, 2)), counts.sum(0))
    factor, half_life = _decay(norms, counts.sum(0))
    unit_norms = _rms(sums.sum(0), counts.sum(0)[:, np.newaxis])
    by_unit = [_decay(unit, counts.sum(0)) for unit in unit_norms.T]
    stage_norms = [
        _rms(total.sum(1), of_stage) for total, of_stage in zip(sums, counts, strict=True)
    ]
    stage_half_lives = np.array(
        [_decay(norm, number)[1] for norm, number in zip(stage_norms, counts, strict=True)]
    )
    return Gradients(
        site=data.name,
        sequences=with_gradient,
        without_gradient=count - with_gradient,
        factor=factor,
        half_life=half_life,
        first_half_life=float(stage_half_lives[0]),
        last_half_life=float(stage_half_lives[-1]),
        units=data.units,
        unit_norm=unit_norms[0] if longest else np.full(len(data.units), np.nan),
        unit_factor=np.array([unit[0] for unit in by_unit]),
        unit_half_life=np.array([unit[1] for unit in by_unit]),
        norms=norms,
        counts=counts.sum(0),
        stage_norm=np.array([of_stage[0] if longest else np.nan for of_stage in stage_norms]),
        stage_half_life=stage_half_lives,
    )


def _add_sequences(
    data: SiteData, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> int:
    """Add the squares of all sequences by stage and distance; return how many have a gradient."""
    rows, detached = data.total_gradient(), data.detached_steps()
    lengths, count = data.lengths, len(data.lengths)
    at_once = items_per_block(BLOCK_BYTES, 8 * max(1, len(data.units)))
    ends, found, first = np.cumsum(lengths), 0, 0
    while first < count:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + at_once, "right")))
        block = np.asarray(rows[data.rows_between(first, last)], np.float64)
        start = 0
        for sequence in range(first, last):
            values = block[start : start + lengths[sequence]]
            start += int(lengths[sequence])
            stage = sequence * len(sums) // count
            # A list: all parts are added.
            parts = np.split(values, detached.get(sequence, ()))
            found += any([_add_part(p, data.reverse, sums[stage], counts[stage]) for p in parts])
        first = last
        if data.advance is not None:
            data.advance(first, count)
    return found


def _add_part(
    values: Array, reverse: bool, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> bool:
    """Add the squares of a part of a sequence, (n, H), by distance, (D, H) and (D,).

    Gradients flow through all of it. Returns whether it has a gradient.
    """
    # From the end of the computation to its beginning.
    values = values if reverse else values[::-1]
    reached = np.flatnonzero(values.any(axis=1))
    if not len(reached) or np.isnan(values).any():
        return False
    values = values[reached[0] :][: len(sums)]
    sums[: len(values)] += values * values
    counts[: len(values)] += 1
    return True


def _rms(sums: Array, counts: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(sums / counts))


def _decay(norms: Array, counts: Array) -> tuple[float, float]:
    """Fit the logarithm of norms by a line over the distance; return factor and half-life."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(norms)
    known = np.flatnonzero(np.isfinite(logs) & (counts > 0))
    if len(known) < 2:
        return float("nan"), float("nan")
    weights = counts[known] / counts[known].sum()
    distance = known - (weights * known).sum()
    slope = float((weights * distance * logs[known]).sum() / (weights * distance**2).sum())
    return float(np.exp(slope)), float(np.log(2) / -slope) if slope < 0 else float("inf")
