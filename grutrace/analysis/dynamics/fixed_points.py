"""Fixed and slow points of a GRU at a constant input.

Sussillo and Barak (2013), "Opening the black box: low-dimensional dynamics in high-dimensional
recurrent neural networks"; Golub and Sussillo (2018), "FixedPointFinder". With F the map from a
state to the next at a constant input x, the search minimizes

    q(h) = 1/2 |F(h) - h|^2

from recorded states. Where q is 0 the state is fixed; where it is small it moves slowly. The
eigenvalues of F's Jacobian at a point describe the dynamics near it.

q is a sum of squares, so it is minimized by the Levenberg-Marquardt method (Marquardt 1963, "An
algorithm for least-squares estimation of nonlinear parameters"), from all states at once.

K initial states, P points, H units, I input size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.jacobian import GRUMap
from grutrace.analysis.engine.map_reduce import summarize_rows
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

#: Points are equal if no unit differs by more than this.
SAME_POINT = 1e-3

#: Largest number of steps of the minimization.
ITERATIONS = 100

#: Smallest damping, added to a diagonal of order 1.
MIN_DAMPING = 1e-12

#: Size of the Jacobians that are computed together, in bytes.
BLOCK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class FixedPoints(Result):
    """Fixed and slow points for one version of the weights at one input, by increasing q.

    Attributes:
        starts: K, number of initial states.
        usual_speed: Median of ``|F(h) - h|`` over these states, for comparison.
        fixed_points: Number of fixed points; the other points are slow.
        stable_points: Number of stable fixed points.
        input: (I,) the constant input.
        points: (P,) numbers of the points.
        states: (P, H) float64.
        q: (P,) half the squared speed.
        speed: (P,) ``|F(h) - h|`` = sqrt(2 q), per step.
        fixed: (P,) whether q is at most `FIXED_Q`.
        stable: (P,) whether all eigenvalues have a magnitude below 1 - `MARGIN`.
        unstable: (P,) number of eigenvalues with a magnitude above 1 + `MARGIN`: unstable
            directions.
        marginal: (P,) number of eigenvalues with a magnitude of 1 within `MARGIN`: directions along
            a line or ring of points, or undecided.
        radius: (P,) spectral radius.
        timescale: (P,) number of steps in which a deviation along the leading eigenvector changes
            by a factor e, 1 / |log radius|. Not meaningful at a slow point, where the eigenvalue in
            the direction of motion is 1.
        reached: (P,) number of initial states that led to it.
        nearest: (P,) largest difference in a unit from the nearest initial state. A point far from
            all of them says little about the network.
        eigenvalues: (P, H) complex, by decreasing magnitude.
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
        site: A site with hidden states of all units, and weights.
        input: (I,) the constant input; ``mean`` for the mean of all recorded inputs; None for
            zeros.
        starts: Number of initial states, drawn from all steps; or (K, H) states. States that are
            not finite are skipped.
        slow: Largest q of a point that is kept. Default: that of a tenth of the usual speed,
            ``(usual_speed / 10)^2 / 2``.
        version: Version of the weights; -1 for the last.
        seed: Seed of the draw.

    Returns:
        The points, by increasing q.

    Raises:
        NotRecordedError: The states, the weights or the inputs are missing, or not of all units.
        OptionError: The input or the states have another shape, or there is no finite state.

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
    data = as_site_data(site)
    weights = data.weights(version)
    width = weights["weight_hh"].shape[1]
    constant = _input(data, input, weights["weight_ih"].shape[1])
    initial = _starts(data, starts, width, seed)
    step = GRUMap(weights, constant)
    usual = float(np.median(np.linalg.norm(step(initial) - initial, axis=1)))
    minima = np.empty_like(initial)
    for part in block_slices(len(initial), BLOCK_BYTES, 8 * width**2):
        minima[part] = minimise(step, initial[part])
        if data.advance is not None:
            data.advance(part.stop, len(initial))
    bound = max(FIXED_Q, (usual / 10) ** 2 / 2) if slow is None else slow
    states, reached = _distinct(step, minima, bound)
    return _describe_points(data, step, constant, initial, usual, states, reached)


def minimise(step: GRUMap, states: Array, limit: float | None = None) -> Array:
    """Minimize q from each state, in at most `ITERATIONS` steps: (K, H) to (K, H).

    The search stays in the box from -`limit` to `limit`. Default: the box that the network cannot
    leave, since a state is a weighted mean of the previous state and a candidate between -1 and 1.
    Outside it gates saturate and z is so close to 1 that every state is slow.
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
        # With enough damping this is a gradient step along the walls of the box, which succeeds.
        np.clip(tried, -limit, limit, out=tried)
        better = 0.5 * np.square(step(tried) - tried).sum(1)
        won = better < q
        states[active[won]] = tried[won]
        factor = np.where(won, 0.1, 10.0)
        # Bounded, so that a direction of zero gradient does not make the matrix singular.
        damping[active] = np.clip(damping[active] * factor, MIN_DAMPING, 1 / MIN_DAMPING)
        # Converged: q consists of rounding, or no representable state nearby is better.
        moved = np.abs(tried - here).max(1)
        done = (np.minimum(q, better) < 1e-28) | (moved < 1e-12) | (won & (q - better < 1e-9 * q))
        active = active[~done]
        if not len(active):
            break
    return states


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


def _distinct(step: GRUMap, minima: Array, bound: float) -> tuple[Array, Integers]:
    """Merge equal points, keeping the best of each, by increasing q; count the members of each."""
    q = 0.5 * np.square(step(minima) - minima).sum(1)
    order = np.argsort(q, kind="stable")
    remaining = minima[order[q[order] <= bound]]
    points: list[Array] = []
    reached: list[int] = []
    while len(remaining):
        same = np.abs(remaining - remaining[0]).max(1) <= SAME_POINT
        points.append(remaining[0])
        reached.append(int(np.count_nonzero(same)))
        remaining = remaining[~same]
    return np.array(points).reshape(-1, minima.shape[1]), np.array(reached, np.int64)


def _describe_points(
    data: SiteData,
    step: GRUMap,
    constant: Array,
    initial: Array,
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
        starts=len(initial),
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
        nearest=np.array([np.abs(initial - state).max(1).min() for state in states]),
        eigenvalues=eigenvalues,
    )


def _eigenvalues(step: GRUMap, state: Array) -> Array:
    eigenvalues = np.linalg.eigvals(step.jacobian(state[np.newaxis])[0])
    return np.asarray(eigenvalues[np.argsort(-np.abs(eigenvalues), kind="stable")])
