"""Search for states that k steps of a GRU move little.

Minimizes q(h) = 1/2 |F^k(h) - h|^2 from many states at once, in three stages:

1. For k = 1, the distance between the state and its candidate, |s (n(h) - h)|^2. It is zero
   at the same states, since F(h) - h = (1 - z) (n(h) - h), and it has no minima where the update
   gates merely close. The scales s are constant, and near 0 where a gate is closed at the start, so
   that a unit that keeps its value stays where it is. In a random network of 256 units the second
   stage then ends at a tenth of the q that it reaches by itself.
2. q, by L-BFGS (Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
   optimization"), which needs two matrix products for all states together, and no linear system.
   It goes on as long as it gains.
3. Where q is small, the Levenberg-Marquardt method (Marquardt 1963), with the damping proportional
   to q, which converges quadratically also to points of a line (Yamashita and Fukushima 2001, "On
   the rate of convergence of the Levenberg-Marquardt method"). States that are close to each
   other share one factorization; those for which that does not work get their own.

H units, K states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np

from grutrace.analysis.dynamics.gru_map import GRUMap, Linearization
from grutrace.analysis.engine.blas import single_blas_thread
from grutrace.analysis.engine.map_reduce import run_on_threads
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.sequence_index import Integers

#: Number of past steps that approximate the curvature.
HISTORY = 4

#: Largest number of steps of each of the first two stages.
ITERATIONS = 1000

#: A stage ends for a state that did not halve its objective in this number of steps.
PATIENCE = 40

#: Length of the next trial, relative to one that was not better.
SHORTER = 0.3

#: Smallest curvature along a step that counts as convex, relative to that across it.
MIN_CURVATURE = 1e-10

#: Objective at which the third stage takes over, at first, and again where it failed.
SMALL_Q = (1e-6, 1e-12)

#: Largest q from which the third stage starts.
NEAR_Q = 1e-5

#: Largest number of steps of the third stage.
NEWTON_ITERATIONS = 50

#: The third stage ends for a state whose q did not fall to a tenth in this number of steps.
NEWTON_PATIENCE = 5

#: q at which it consists of rounding.
ROUNDING_Q = 1e-28

#: Damping: smallest value, added to a diagonal of order 1; multiple of q at first.
MIN_DAMPING, FIRST_DAMPING = 1e-12, 2.0

#: States share a factorization if no unit differs by more than this.
SHARED_RADIUS = 5e-2

#: Gates that are further open than this count as open in the first stage.
OPEN = 0.1

#: Number of matrices in one call of LAPACK. NumPy releases the GIL for two or more.
STACK = 4

#: Number of values of the states that are minimized together. They stay in the cache.
BLOCK_VALUES = 64 * 256

#: Returns the objective of some of the states, (K,), and its gradient, (K, H).
Objective = Callable[[Array, Integers], tuple[Array, Array]]


def minimise(
    step: GRUMap,
    states: Array,
    limit: float | None = None,
    period: int = 1,
    advance: Callable[[int, int], None] | None = None,
) -> Array:
    """Minimize q from each state: (K, H) to (K, H).

    The search stays in the box from -`limit` to `limit`. Default: the box that the network cannot
    leave, since a state is a weighted mean of the previous state and a candidate between -1 and 1.
    Outside it gates saturate and z is so close to 1 that every state is slow.

    Args:
        step: The map.
        states: (K, H) where to start.
        limit: Half the width of the box.
        period: k.
        advance: Called with the number of finished states and of all states.
    """
    if limit is None:
        limit = max(1.0, float(np.abs(states).max(initial=0.0)))
    motion = partial(step.motion, period=period)
    per_block = max(1, BLOCK_VALUES // states.shape[1])
    blocks = [states[part] for part in block_slices(len(states), per_block, 1)]
    tasks = [partial(_descend, step, block, limit, period) for block in blocks]
    minima: list[Array] = []
    # One block has the BLAS to itself.
    with single_blas_thread() if len(tasks) > 1 else nullcontext():
        for block in run_on_threads(tasks):
            minima.append(block)
            if advance is not None:
                advance(sum(map(len, minima)), len(states))
    found = _polish(motion, np.concatenate([states[:0], *minima]), limit)
    q = half_square(motion(found).value)
    failed = np.flatnonzero((q > ROUNDING_Q) & (q <= SMALL_Q[0]))
    if len(failed):
        again = lbfgs(lambda h, _: objective(motion(h)), found[failed], limit, SMALL_Q[1])
        found[failed] = _polish(motion, again, limit)
    return found


def objective(motion: Linearization) -> tuple[Array, Array]:
    """Return half the squared size of a function, (K,), and its gradient, (K, H)."""
    return half_square(motion.value), motion.pull_back(motion.value)


def half_square(vectors: Array) -> Array:
    """Return half the squared length of (K, H) vectors: (K,)."""
    return np.asarray(0.5 * np.einsum("kh,kh->k", vectors, vectors))


def _descend(step: GRUMap, states: Array, limit: float, period: int) -> Array:
    """The first two stages."""
    if period == 1:
        # Where this ends is only a start, so single precision is enough.
        coarse, single = step.astype(np.float32), states.astype(np.float32)
        scale = np.minimum(1.0, (1 - coarse.update(single)) / OPEN)
        ends = lbfgs(
            lambda h, rows: objective(coarse.candidate_gap(h, scale[rows])),
            single,
            limit,
            SMALL_Q[0],
        )
        states = ends.astype(np.float64)
    return lbfgs(lambda h, _: objective(step.motion(h, period)), states, limit, SMALL_Q[0])


def lbfgs(evaluate: Objective, states: Array, limit: float, small: float) -> Array:
    """Minimize an objective from each state, within the box, as long as it is worth it.

    It is not where the objective is at most `small`, or falls too slowly (`PATIENCE`).

    A trial that is not better is not taken, and the next one is shorter; what it says about
    the curvature is used.
    """
    result = states.copy()
    rows = np.arange(len(states))
    q, gradient = evaluate(states, rows)
    steps = np.zeros((HISTORY, *states.shape), states.dtype)
    changes, inverses = np.zeros_like(steps), np.zeros((HISTORY, *q.shape), q.dtype)
    scale, length, reference = np.ones_like(q), np.ones_like(q), q
    for iteration in range(ITERATIONS):
        going = q > small
        if iteration % PATIENCE == 0 and iteration:
            going &= q < 0.5 * reference
            reference = q
        # Copying the rest to leave out a few takes longer than to go on with them.
        if np.count_nonzero(going) < 0.9 * len(going) or iteration % PATIENCE == 0:
            result[rows[~going]] = states[~going]
            rows, states, gradient, q = rows[going], states[going], gradient[going], q[going]
            scale, length, reference = scale[going], length[going], reference[going]
            steps, changes, inverses = steps[:, going], changes[:, going], inverses[:, going]
            if not len(rows):
                break
        recent = [(iteration - 1 - back) % HISTORY for back in range(min(iteration, HISTORY))]
        direction = _direction(gradient, steps, changes, inverses, scale, recent)
        trial = np.clip(states - length[:, np.newaxis] * direction, -limit, limit)
        trial_q, trial_gradient = evaluate(trial, rows)
        step, change = trial - states, trial_gradient - gradient
        along, square = np.einsum("kh,kh->k", step, change), np.einsum("kh,kh->k", change, change)
        convex = along > np.maximum(MIN_CURVATURE * square, np.finfo(q.dtype).tiny)
        slot = iteration % HISTORY
        inverses[slot] = np.divide(1.0, along, out=np.zeros_like(along), where=convex)
        np.divide(along, square, out=scale, where=convex)
        steps[slot], changes[slot] = step, change
        better = trial_q < q
        length *= SHORTER
        length[better] = 1.0
        if better.all():
            states, q, gradient = trial, trial_q, trial_gradient
        else:
            taken = better[:, np.newaxis]
            states, gradient = (
                np.where(taken, trial, states),
                np.where(taken, trial_gradient, gradient),
            )
            q = np.where(better, trial_q, q)
    result[rows] = states
    return result


def _direction(
    gradient: Array, steps: Array, changes: Array, inverses: Array, scale: Array, recent: list[int]
) -> Array:
    """Return the approximate Newton direction by the two-loop recursion: (K, H).

    `recent` numbers the entries of the history, the last one first. Entries with an inverse of 0
    are left out.
    """
    direction, weights = gradient.copy(), []
    for slot in recent:
        weight = inverses[slot] * np.einsum("kh,kh->k", steps[slot], direction)
        direction -= weight[:, np.newaxis] * changes[slot]
        weights.append(weight)
    direction *= scale[:, np.newaxis]
    for slot, weight in zip(reversed(recent), reversed(weights), strict=True):
        other = inverses[slot] * np.einsum("kh,kh->k", changes[slot], direction)
        direction += (weight - other)[:, np.newaxis] * steps[slot]
    return direction


def _polish(linearize: Callable[[Array], Linearization], states: Array, limit: float) -> Array:
    """The third stage: (K, H) to (K, H)."""
    q = half_square(linearize(states).value)
    active = np.flatnonzero((q <= NEAR_Q) & (q > ROUNDING_Q))
    factor = np.full(len(states), FIRST_DAMPING)
    leaders = np.arange(len(states))
    leaders[active] = active[_leaders(states[active], q[active])]
    reference = q.copy()
    for iteration in range(NEWTON_ITERATIONS):
        if iteration and iteration % NEWTON_PATIENCE == 0:
            active = active[q[active] < 0.1 * reference[active]]
            reference = q.copy()
        if not len(active):
            break
        here = states[active]
        motion = linearize(here)
        leading, groups = np.unique(leaders[active], return_inverse=True)
        own = np.searchsorted(active, leading)
        damping = np.clip(factor[leading] * q[leading], MIN_DAMPING, 1 / MIN_DAMPING)
        members = [np.flatnonzero(groups == group) for group in range(len(leading))]
        tasks = [
            partial(_newton_steps, motion, own[part], members[part], damping[part])
            for part in block_slices(len(leading), STACK, 1)
        ]
        trial = here.copy()
        with single_blas_thread():
            steps = [step for stack in run_on_threads(tasks) for step in stack]
        for rows, step in zip(members, steps, strict=True):
            trial[rows] += step
        # With enough damping this is a gradient step along the walls of the box, which succeeds.
        np.clip(trial, -limit, limit, out=trial)
        trial_q = half_square(linearize(trial).value)
        before = q[active]
        better = trial_q < before
        states[active[better]], q[active[better]] = trial[better], trial_q[better]
        factor[active] *= np.where(better, 0.2, 10.0)
        moved = np.abs(trial - here).max(1)
        done = (q[active] < ROUNDING_Q) | (moved < 1e-12)
        done |= better & (before - trial_q < 1e-9 * before)
        # A state that another's factorization does not serve gets its own.
        alone = ~(trial_q < 0.25 * before)
        leaders[active[alone]] = active[alone]
        # Those whose leader is done follow another.
        left = active[~done & ~alone & done[own[groups]]]
        leaders[left] = left[_leaders(states[left], q[left])]
        active = active[~done]
    return states


def _newton_steps(
    motion: Linearization, leaders: Integers, members: Sequence[Integers], damping: Array
) -> list[Array]:
    """Return the steps of groups of states, each (members, H), with the Jacobians of leaders."""
    size, most = motion.value.shape[1], max(map(len, members))
    normal, slopes = np.empty((len(leaders), size, size)), np.zeros((len(leaders), size, most))
    for leader, rows, matrix, slope in zip(leaders.tolist(), members, normal, slopes, strict=True):
        jacobian = motion.matrix(leader)
        # `dot` computes half of a symmetric product.
        np.dot(jacobian.T, jacobian, out=matrix)
        slope[:, : len(rows)] = jacobian.T @ motion.value[rows].T
    normal[:, np.arange(size), np.arange(size)] += damping[:, np.newaxis]
    solved = np.linalg.solve(normal, slopes)
    return [-step[:, : len(rows)].T for step, rows in zip(solved, members, strict=True)]


def _leaders(states: Array, q: Array) -> Integers:
    """Group states that are close together; return the number of the best of each one's group."""
    leaders = np.full(len(states), -1)
    for number in np.argsort(q, kind="stable"):
        if leaders[number] < 0:
            free = np.flatnonzero(leaders < 0)
            near = np.abs(states[free] - states[number]).max(1) <= SHARED_RADIUS
            leaders[free[near]] = number
    return leaders
