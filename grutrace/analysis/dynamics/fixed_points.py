"""Fixed points, slow points and short cycles of a GRU at a constant input.

Sussillo and Barak (2013), "Opening the black box: low-dimensional dynamics in high-dimensional
recurrent neural networks"; Golub and Sussillo (2018), "FixedPointFinder". With F the map from a
state to the next at a constant input x, the search minimizes

    q(h) = 1/2 |F(h) - h|^2

from recorded states. Where q is 0 the state is fixed; where it is small it moves slowly. The
eigenvalues of F's Jacobian at a point describe the dynamics near it.

A search from states that a network visits leads to points that attract, and misses many of those
that divide their basins. These lie between the others, so the search goes on from the midpoints of
pairs of points until it finds no more. In a GRU that stores three bits, this leads from 10 points
to all 27.

Cycles of k steps are the fixed points of k steps, F^k. `slow_points` has the search.

K initial states, P points, H units, I input size.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.gru_map import GRUMap, Linearization
from grutrace.analysis.dynamics.slow_points import STACK, half_square, minimise
from grutrace.analysis.engine.blas import single_blas_thread
from grutrace.analysis.engine.map_reduce import run_on_threads, summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import Array
from grutrace.statistics.moments import merge_stats, unit_stats
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.sequence_index import Integers

#: Largest q of a fixed point: no unit moves by more than 1.5e-8 a step, the square root of the
#: epsilon of float64.
FIXED_Q = 1e-16

#: Eigenvalues whose magnitude is this close to 1 count as marginal.
MARGIN = 1e-3

#: Number of initial states that are read at a time.
READ = 16

#: Points are equal if no unit differs by more than this.
SAME_POINT = 1e-3

#: Largest number of searches from midpoints, and of midpoints in one where there are fewer starts.
ROUNDS, PAIRS = 5, 64


@dataclass(frozen=True, eq=False)
class FixedPoints(Result):
    """Fixed and slow points for one version of the weights at one input, by increasing q.

    Of cycles, each is one point: its state with the smallest q.

    Attributes:
        period: k, number of steps that a point returns after.
        starts: K, number of initial states.
        usual_speed: Median of ``|F^k(h) - h| / k`` over these states, for comparison.
        fixed_points: Number of fixed points; the other points are slow.
        stable_points: Number of stable fixed points.
        input: (I,) the constant input.
        points: (P,) numbers of the points.
        states: (P, H) float64.
        q: (P,) ``1/2 |F^k(h) - h|^2``.
        speed: (P,) ``|F^k(h) - h| / k`` = sqrt(2 q) / k, per step.
        periods: (P,) number of steps after which the point is itself again, a divisor of k: 1 for a
            fixed point.
        fixed: (P,) whether q is at most `FIXED_Q`.
        stable: (P,) whether all eigenvalues have a magnitude below 1 - `MARGIN`.
        unstable: (P,) number of eigenvalues with a magnitude above 1 + `MARGIN`: unstable
            directions.
        marginal: (P,) number of eigenvalues with a magnitude of 1 within `MARGIN`: directions along
            a line or ring of points, or undecided.
        radius: (P,) spectral radius.
        timescale: (P,) number of steps in which a deviation along the leading eigenvector changes
            by a factor e, k / |log radius|. Not meaningful at a slow point, where the eigenvalue in
            the direction of motion is 1.
        reached: (P,) number of initial states that led to it; 0 for a point that only midpoints
            between others led to.
        nearest: (P,) largest difference in a unit from the nearest initial state. A point far from
            all of them says little about the network.
        eigenvalues: (P, H) complex, of the Jacobian of F^k, by decreasing magnitude.
    """

    index_field: ClassVar[str] = "points"
    excluded_columns: ClassVar[tuple[str, ...]] = ("input",)

    period: int
    starts: int
    usual_speed: float
    fixed_points: int
    stable_points: int
    input: Array
    points: Integers
    states: Array
    q: Array
    speed: Array
    periods: Integers
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
    period: int = 1,
) -> FixedPoints:
    """Find the fixed and slow points, or short cycles, that the states of a trace lead to.

    States closer than 0.001 in every unit (`SAME_POINT`) are one point. Isolated fixed points are
    also searched from the midpoints of pairs of them.

    Args:
        site: A site with hidden states of all units, and weights.
        input: (I,) the constant input; ``mean`` for the mean of all recorded inputs; None for
            zeros.
        starts: Number of initial states, drawn from all steps; or (K, H) states. States that are
            not finite are skipped.
        slow: Largest q of a point that is kept. Default: that of a tenth of the usual speed,
            ``(usual_speed / 10)^2 / 2``, times the square of `period`.
        version: Version of the weights; -1 for the last.
        seed: Seed of the draw.
        period: k. Above 1, states are searched that k steps map to themselves: cycles of k steps,
            and fixed points, which are among them (`FixedPoints.periods`).

    Returns:
        The points, by increasing q.

    Raises:
        NotRecordedError: The states, the weights or the inputs are missing, or not of all units.
        OptionError: The input or the states have another shape, there is no finite state, or
            `period` is not an integer of 1 or more.

    Examples:
        Without weights and biases, the candidate is 0 and the state decays to 0.

        >>> import torch, grutrace
        >>> from grutrace.analysis import fixed_points
        >>> layer = torch.nn.GRU(2, 3)
        >>> for parameter in layer.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> with torch.no_grad(), grutrace.trace(layer) as trace:
        ...     _ = layer(torch.zeros(5, 1, 2), torch.rand(1, 1, 3))
        >>> result = fixed_points(trace["l0"])
        >>> result.stable_points, bool(abs(result.states).max() < 1e-6), result.radius
        (1, True, array([0.5]))
    """
    if not isinstance(period, int) or period < 1:
        raise OptionError(
            f"period: expected a number of steps, 1 or more; found {short_repr(period)}"
        )
    data = as_site_data(site)
    weights = data.weights(version)
    width = weights["weight_hh"].shape[1]
    constant = _input(data, input, weights["weight_ih"].shape[1])
    initial = _starts(data, starts, width, seed)
    step = GRUMap(weights, constant)
    motion = partial(step.motion, period=period)
    usual = float(np.median(np.linalg.norm(motion(initial).value, axis=1)))
    minima = minimise(step, initial, period=period, advance=data.advance)
    bound = max(FIXED_Q, (usual / 10) ** 2 / 2) if slow is None else slow
    minima = _search_between(step, minima, period)
    states, reached = _distinct(step, minima, bound, period, len(initial))
    moved = np.linalg.norm(motion(states).value, axis=1)
    eigenvalues = sorted_eigenvalues(motion(states))
    size = np.abs(eigenvalues)
    with np.errstate(divide="ignore"):
        timescale = period / np.abs(np.log(size[:, 0]))
    fixed = np.asarray(moved**2 / 2 <= FIXED_Q)
    stable = np.asarray((size < 1 - MARGIN).all(1))
    return FixedPoints(
        site=data.name,
        period=period,
        starts=len(initial),
        usual_speed=usual / period,
        fixed_points=int(np.count_nonzero(fixed)),
        stable_points=int(np.count_nonzero(fixed & stable)),
        input=constant,
        points=np.arange(len(states)),
        states=states,
        q=moved**2 / 2,
        speed=moved / period,
        periods=_smallest_periods(step, states, period),
        fixed=fixed,
        stable=stable,
        unstable=np.count_nonzero(size > 1 + MARGIN, axis=1),
        marginal=np.count_nonzero(np.abs(size - 1) <= MARGIN, axis=1),
        radius=size[:, 0],
        timescale=timescale,
        reached=reached,
        nearest=np.array([np.abs(initial - state).max(1).min() for state in states]),
        eigenvalues=eigenvalues,
    )


def _input(data: SiteData, input: Array | str | None, size: int) -> Array:
    if input is None:
        return np.zeros(size)
    if isinstance(input, str):
        if input != "mean":
            raise OptionError(f"input: expected values, 'mean' or None; found {short_repr(input)}")
        units = summarize_rows(data, ("input",), unit_stats, merge_stats)
        if not units["count"].all():
            raise OptionError(f"input: {data.name!r} has no inputs to take the mean of")
        return np.asarray(units["mean"])
    constant = np.asarray(input, np.float64)
    if constant.shape != (size,):
        raise OptionError(f"input: expected shape ({size},), found {constant.shape}")
    return constant


def _starts(data: SiteData, starts: int | Array, width: int, seed: int) -> Array:
    if isinstance(starts, (int, np.integer)):
        data.require("hidden")
        if len(data.units) != width:
            raise NotRecordedError(
                f"{data.name!r} has the states of {len(data.units)} of {width} units; fixed "
                f"points need all: pass complete states, starts=(K, {width})"
            )
        drawn = np.sort(np.random.default_rng(seed).permutation(data.steps)[:starts])
        rows = data.rows("hidden")
        # A few at a time: the rows between them may be read, too.
        parts = [np.asarray(rows[drawn[at : at + READ]]) for at in range(0, len(drawn), READ)]
        states = np.concatenate([np.empty((0, width)), *parts])
    else:
        states = np.asarray(starts, np.float64)
        if states.ndim != 2 or states.shape[1] != width:
            raise OptionError(f"starts: expected shape (K, {width}), found {states.shape}")
    states = states[np.isfinite(states).all(1)]
    if not len(states):
        raise OptionError(f"starts: {data.name!r} has no finite state to begin from")
    return np.asarray(states)


def _search_between(step: GRUMap, minima: Array, period: int) -> Array:
    """Append isolated fixed points that the midpoints between others lead to: (K, H) to (M, H)."""
    most, known, isolated = max(PAIRS, len(minima)), minima[:0], minima[:0]
    for _ in range(ROUNDS):
        points, _ = _distinct(step, minima, FIXED_Q, period, 0)
        new = [bool((np.abs(known - point).max(1) > SAME_POINT).all()) for point in points]
        known, before = points, len(isolated)
        isolated = np.concatenate([isolated, _isolated(step, points[new], period)])
        first, second = np.triu_indices(len(isolated), 1)
        # Pairs of points that were known before have been tried.
        first, second = first[second >= before], second[second >= before]
        if not len(first):
            break
        square = half_square(isolated)
        distance = square[first] + square[second] - (isolated @ isolated.T)[first, second]
        nearest = np.argsort(distance, kind="stable")[:most]
        between = (isolated[first[nearest]] + isolated[second[nearest]]) / 2
        found, _ = _distinct(step, minimise(step, between, period=period), FIXED_Q, period, 0)
        minima = np.concatenate([minima, _isolated(step, found, period)])
    return minima


def _isolated(step: GRUMap, points: Array, period: int) -> Array:
    """Return those of (P, H) points that are not part of a line, and have no closed gates.

    There, the Jacobian of F^k(h) - h is singular.
    """
    motion, isolated = step.motion(points, period), np.zeros(len(points), bool)
    for row in range(len(points)):
        with suppress(np.linalg.LinAlgError):
            isolated[row] = np.linalg.norm(np.linalg.inv(motion.matrix(row))) < 1 / MARGIN
    return points[isolated]


def _distinct(
    step: GRUMap, minima: Array, bound: float, period: int, starts: int
) -> tuple[Array, Integers]:
    """Merge equal points, keeping the best of each, by increasing q.

    All points of a cycle are equal. Of each point's members, those are counted that are among the
    first `starts`.
    """
    q = half_square(step.motion(minima, period).value)
    order = np.argsort(q, kind="stable")
    order = order[q[order] <= bound]
    points: list[Array] = []
    reached: list[int] = []
    while len(order):
        points.append(minima[order[0]])
        same = np.zeros(len(order), bool)
        place = minima[order[:1]]
        for _ in range(period):
            same |= np.abs(minima[order] - place).max(1) <= SAME_POINT
            place = step(place) if period > 1 else place
        reached.append(int(np.count_nonzero(order[same] < starts)))
        order = order[~same]
    return np.array(points).reshape(-1, minima.shape[1]), np.array(reached, np.int64)


def _smallest_periods(step: GRUMap, states: Array, period: int) -> Integers:
    """(P,) after how many steps each state is itself again, at most `period`."""
    periods, place = np.full(len(states), period), states
    for steps in range(1, period):
        place = step(place)
        if period % steps == 0:
            same = np.abs(place - states).max(1, initial=0.0) <= SAME_POINT
            periods[same & (periods == period)] = steps
    return periods


def sorted_eigenvalues(motion: Linearization) -> Array:
    """Return the eigenvalues of the map's Jacobians, (P, H), by decreasing magnitude."""

    def of_states(rows: slice) -> Array:
        matrices = np.array([motion.matrix(row) for row in range(rows.start, rows.stop)])
        matrices += np.eye(matrices.shape[1])
        return np.linalg.eigvals(matrices).astype(np.complex128)

    count, size = motion.value.shape
    with single_blas_thread():
        stacks = run_on_threads(
            [partial(of_states, part) for part in block_slices(count, STACK, 1)]
        )
        found = np.concatenate([np.empty((0, size), np.complex128), *stacks])
    return np.take_along_axis(found, np.argsort(-np.abs(found), axis=1, kind="stable"), axis=1)
