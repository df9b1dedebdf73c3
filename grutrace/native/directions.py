"""Multiply directions by the Jacobians of steps, compiled.

H units, k directions, n steps.
"""

from __future__ import annotations

import ctypes

import numpy as np

from grutrace.native.library import DirectionSteps, ReplayTargets, load
from grutrace.records import Array

#: Number of columns that are multiplied together; DIRECTION_GROUP in kernels.c.
GROUP = 8


def is_available() -> bool:
    """Return whether there is a compiled library."""
    return load() is not None


def advance(
    weights: Array,
    factors: tuple[Array, Array, Array, Array],
    directions: Array,
    interval: int,
    longest: int,
    spread: tuple[float, float],
) -> tuple[Array, Array, int] | None:
    """Multiply directions by the Jacobians of steps, with modified Gram-Schmidt every few steps.

    Args:
        weights: (3H, H) float64, contiguous: the recurrent weights.
        factors: (n, H) float64 each, contiguous: the factors of the identity and of the weights'
            rows, as in `grutrace.analysis.dynamics.jacobian.Factors`.
        directions: (k, H) orthonormal rows.
        interval: Number of steps until the directions are made orthonormal.
        longest: Its largest value; 0 to leave it as it is.
        spread: Log ratio of the largest to the smallest growth in an interval: to aim at, and not
            to exceed. An interval that exceeds it is repeated in shorter ones.

    Returns:
        The new directions, the (k,) sums of the logarithms of their growth, and the new interval.
        None if the growth is zero, not finite, or has no normal square.
    """
    library = load()
    assert library is not None
    count, units = directions.shape
    columns = -(-count // GROUP) * GROUP
    padded = np.zeros((units, columns))
    padded[:, :count] = directions.T
    logs, memory = np.zeros(count), np.empty(2 * units * columns + GROUP * units + 2 * columns)
    keep, *gates = (each.ctypes.data for each in factors)
    steps = DirectionSteps(
        weights.ctypes.data,
        keep,
        ReplayTargets(*gates),
        *(each.ctypes.data for each in (padded, logs, memory)),
        *(len(factors[0]), units, columns, count),
        *(interval, longest, *spread),
    )
    if not library.directions(ctypes.addressof(steps)):
        return None
    return np.ascontiguousarray(padded[:, :count].T), logs, int(steps.interval)
