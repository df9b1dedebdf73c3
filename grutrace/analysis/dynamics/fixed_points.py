"""Where the state would stay, or almost: fixed and slow points of a GRU at a constant input.

Sussillo and Barak (2013), "Opening the black box: low-dimensional dynamics in high-dimensional
recurrent neural networks"; Golub and Sussillo (2018), "FixedPointFinder". With F the map from a
state to the next at a constant input x, points are sought where

    q(h) = 1/2 |F(h) - h|^2

is smallest, from states that the network has been in. Where q is 0 the state stays; where it is
small but not 0 it moves slowly. The eigenvalues of F's Jacobian there say how it behaves nearby.

q is a sum of squares, so it is minimised by the method of Levenberg and Marquardt (Marquardt 1963,
"An algorithm for least-squares estimation of nonlinear parameters"), from all states at once.

K states to begin from, P points, H units, I input size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.jacobian import GRUMap
from grutrace.analysis.engine.map_reduce import reduce_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import Array
from grutrace.statistics.moments import empty_stats, merge_stats, summarize_block
from grutrace.storage.read.sequence_index import Integers

#: A point with q up to this is fixed: no unit moves by more than 1.5e-8 a step, which is the square
#: root of the spacing of float64 at 1.
FIXED_Q = 1e-16

#: Eigenvalues of a size this close to 1 count as neither growing nor shrinking.
MARGIN = 1e-3

#: Points of which no unit differs by more than this are one.
SAME_POINT = 1e-3

#: How many steps the minimisation makes at most.
ITERATIONS = 100

#: What is added to the diagonal, which is of the order of 1, at least.
MIN_DAMPING = 1e-12

#: Jacobians that are worked on at once. Bytes.
BLOCK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class FixedPoints(Result):
    """Of one version of the weights at one input. Points come in the order of q.

    Attributes:
        starts: K, how many states were begun from.
        usual_speed: Median over these states of ``|F(h) - h|``, for comparison.
        fixed_points: How many points are fixed; the others are slow.
        stable_points: How many of these are stable.
        input: (I,) the constant input.
        points: (P,) their numbers.
        states: (P, H) float64.
        q: (P,)
        speed: (P,) ``|F(h) - h|`` = sqrt(2 q), a step.
        fixed: (P,) whether q is at most `FIXED_Q`.
        stable: (P,) whether all eigenvalues are smaller than 1 in size, by `MARGIN`.
        unstable: (P,) how many are larger than 1, by `MARGIN`: directions in which it is left.
        marginal: (P,) how many are 1 in size within `MARGIN`: directions along which points lie, a
            line or a ring, or too close to tell.
        radius: (P,) the size of the largest eigenvalue.
        timescale: (P,) steps until a deviation along it has changed e-fold, 1 / |log radius|. At a
            slow point the eigenvalue in the direction of the motion is 1, so it says nothing there.
        reached: (P,) from how many of the states it was reached.
        nearest: (P,) largest difference in a unit from the nearest of the states begun from. Far
            from all of them, a point says little of what the network does.
        eigenvalues: (P, H) complex, the largest in size first.
    """

    index_field: ClassVar[str] = "points"
    excluded_columns: ClassVar[tuple[str, ...]] = ("input",)

    starts: int
    usual_speed: float
    fixed_points: int
    stable_points: int
    input: Array
    points: Integers
    states: Array
    q: Array
    speed: Array
    fixed: Array
    stable: Array
    unstable: Array
    marginal: Array
    radius: Array
    timescale: Array
    reached: Array
    nearest: Array
    eigenvalues: Array


def fixed_points(
    site: SiteLike,
    input: Array | str | None = None,
    *,
    starts: int | Array = 128,
    slow: float | None = None,
    version: int = -1,
    seed: int = 0,
) -> FixedPoints:
    """Find the fixed and slow points that the states of a trace lead to.

    Args:
        site: With hidden, of all units, and weights.
        input: (I,) the constant input; ``mean`` for that of all recorded inputs; None for zeros.
        starts: How many states to begin from, drawn from all steps; or (K, H) states of your own.
            States with values that are not finite are left out.
        slow: The largest q of a point that is kept; by default a tenth of the usual speed, so
            ``(usual_speed / 10)^2 / 2``.
        version: Which version of the weights, the last unless asked otherwise.
        seed: Of the draw.

    Raises:
        NotRecordedError: The states, the weights or the inputs are not there, or not of all units.
        OptionError: The input or the states have another shape, or there is no state.
    """
    data = as_site_data(site)
    weights = data.weights(version)
    width = weights["weight_hh"].shape[1]
    constant = _input(data, input, weights["weight_ih"].shape[1])
    begun = _starts(data, starts, width, seed)
    step = GRUMap(weights, constant)
    usual = float(np.median(np.linalg.norm(step(begun) - begun, axis=1)))
    each = max(1, BLOCK_BYTES // (8 * width**2))
    found = np.empty_like(begun)
    for low in range(0, len(begun), each):
        found[low : low + each] = minimise(step, begun[low : low + each])
        if data.advance is not None:
            data.advance(min(low + each, len(begun)), len(begun))
    bound = max(FIXED_Q, (usual / 10) ** 2 / 2) if slow is None else slow
    states, reached = _distinct(step, found, bound)
    return _describe_points(data, step, constant, begun, usual, states, reached)


def minimise(step: GRUMap, states: Array, limit: float | None = None) -> Array:
    """(K, H) to (K, H): from each state down to where q is smallest nearby, in `ITERATIONS` steps.

    The search stays in the box from -`limit` to `limit`; that which the network cannot leave,
    unless given: a state is a mean of the one before and of a candidate, which lies between -1 and
    1. Outside, where gates saturate, z comes so near to 1 that everything looks slow.
    """
    states = states.copy()
    if limit is None:
        limit = max(1.0, float(np.abs(states).max(initial=0.0)))
    damping = np.full(len(states), 1e-3)
    active = np.arange(len(states))
    identity = np.eye(states.shape[1])
    for _ in range(ITERATIONS):
        here = states[active]
        residual, jacobian = step(here) - here, step.jacobian(here) - identity
        q = 0.5 * np.square(residual).sum(1)
        slope = np.einsum("kij,ki->kj", jacobian, residual)
        normal = np.matmul(jacobian.transpose(0, 2, 1), jacobian)
        normal += damping[active, np.newaxis, np.newaxis] * identity
        tried = here - np.linalg.solve(normal, slope[..., np.newaxis])[..., 0]
        # With enough damping this is a step down the slope along the walls: it wins in the end.
        np.clip(tried, -limit, limit, out=tried)
        better = 0.5 * np.square(step(tried) - tried).sum(1)
        won = better < q
        states[active[won]] = tried[won]
        factor = np.where(won, 0.1, 10.0)
        # Never so small that a direction without slope makes the matrix singular.
        damping[active] = np.clip(damping[active] * factor, MIN_DAMPING, 1 / MIN_DAMPING)
        # Nothing left to win: q is rounding, or nothing within reach of the spacing is better.
        moved = np.abs(tried - here).max(1)
        done = (np.minimum(q, better) < 1e-28) | (moved < 1e-12) | (won & (q - better < 1e-9 * q))
        active = active[~done]
        if not len(active):
            break
    return states


def _input(data: SiteData, given: Array | str | None, size: int) -> Array:
    if given is None:
        return np.zeros(size)
    if isinstance(given, str):
        if given != "mean":
            raise OptionError(f"input: expected values, 'mean' or None; found {short_repr(given)}")
        units = reduce_rows(data, ("input",), partial(_Units, size)).units
        if not units["count"].all():
            raise OptionError(f"input: {data.name!r} has no inputs to take the mean of")
        return np.asarray(units["mean"])
    constant = np.asarray(given, np.float64)
    if constant.shape != (size,):
        raise OptionError(f"input: expected shape ({size},), found {constant.shape}")
    return constant


class _Units:
    """Moments of each feature; see `statistics.moments`. What is not finite is left out."""

    def __init__(self, width: int) -> None:
        self.units = empty_stats(width)

    def add(self, rows: Mapping[str, Array]) -> None:
        (block,) = rows.values()
        merge_stats(self.units, summarize_block(np.ascontiguousarray(block))[0])

    def merge(self, later: _Units) -> None:
        merge_stats(self.units, later.units)


def _starts(data: SiteData, starts: int | Array, width: int, seed: int) -> Array:
    if isinstance(starts, (int, np.integer)):
        data.require("hidden")
        if len(data.units) != width:
            raise NotRecordedError(
                f"{data.name!r} has the states of {len(data.units)} of {width} units; a point "
                f"needs all: give states of your own, starts=(K, {width})"
            )
        drawn = np.random.default_rng(seed).permutation(data.steps)[:starts]
        states = np.asarray(data.rows("hidden")[np.sort(drawn)], np.float64)
    else:
        states = np.asarray(starts, np.float64)
        if states.ndim != 2 or states.shape[1] != width:
            raise OptionError(f"starts: expected shape (K, {width}), found {states.shape}")
    states = states[np.isfinite(states).all(1)]
    if not len(states):
        raise OptionError(f"starts: {data.name!r} has no finite state to begin from")
    return states


def _distinct(step: GRUMap, found: Array, bound: float) -> tuple[Array, Integers]:
    """Of points that are one the best, in the order of q; and how many each was."""
    q = 0.5 * np.square(step(found) - found).sum(1)
    order = np.argsort(q, kind="stable")
    left = found[order[q[order] <= bound]]
    points: list[Array] = []
    reached: list[int] = []
    while len(left):
        same = np.abs(left - left[0]).max(1) <= SAME_POINT
        points.append(left[0])
        reached.append(int(np.count_nonzero(same)))
        left = left[~same]
    return np.array(points).reshape(-1, found.shape[1]), np.array(reached, np.int64)


def _describe_points(
    data: SiteData,
    step: GRUMap,
    constant: Array,
    begun: Array,
    usual: float,
    states: Array,
    reached: Integers,
) -> FixedPoints:
    speed = np.linalg.norm(step(states) - states, axis=1)
    eigenvalues = np.array([_eigenvalues(step, state) for state in states])
    eigenvalues = eigenvalues.reshape(states.shape).astype(np.complex128)
    size = np.abs(eigenvalues)
    radius = size[:, 0]
    with np.errstate(divide="ignore"):
        timescale = 1 / np.abs(np.log(radius))
    fixed, stable = speed**2 / 2 <= FIXED_Q, (size < 1 - MARGIN).all(1)
    return FixedPoints(
        site=data.name,
        starts=len(begun),
        usual_speed=usual,
        fixed_points=int(np.count_nonzero(fixed)),
        stable_points=int(np.count_nonzero(fixed & stable)),
        input=constant,
        points=np.arange(len(states)),
        states=states,
        q=speed**2 / 2,
        speed=speed,
        fixed=fixed,
        stable=stable,
        unstable=np.count_nonzero(size > 1 + MARGIN, axis=1),
        marginal=np.count_nonzero(np.abs(size - 1) <= MARGIN, axis=1),
        radius=radius,
        timescale=timescale,
        reached=reached,
        nearest=np.array([np.abs(begun - state).max(1).min() for state in states]),
        eigenvalues=eigenvalues,
    )


def _eigenvalues(step: GRUMap, state: Array) -> Array:
    found = np.linalg.eigvals(step.jacobian(state[np.newaxis])[0])
    return np.asarray(found[np.argsort(-np.abs(found), kind="stable")])
