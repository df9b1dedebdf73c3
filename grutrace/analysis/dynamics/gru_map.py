"""The map F from a state to the next at a constant input, to first order.

Its equations are PyTorch's (docs/equations.md). With g = W_hn h + b_hn:

    F(h) = z h + (1 - z) n,   n = tanh(W_in x + b_in + r g)

`Linearization` holds values of a function of the states, and products with its Jacobians. The
Jacobians themselves, H^2 numbers a state, are made only where a linear system is solved.

H units, K states, I input size. All in float64, unless `GRUMap.astype` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np

from grutrace.records import Array


class Linearization(Protocol):
    """A function of states to first order, at K states."""

    @property
    def value(self) -> Array:
        """Return the values: (K, H)."""

    def pull_back(self, vectors: Array) -> Array:
        """Return J^T v for each state: (K, H) to (K, H)."""

    def matrix(self, row: int) -> Array:
        """Return the Jacobian at one of the states: (H, H), one value of the function a row."""


@dataclass(frozen=True, eq=False)
class OneStep:
    """A function whose Jacobian has rows of the recurrent weights, scaled, and a diagonal.

    Attributes:
        value: (K, H) its values.
        factors: (K, G, H) of the rows of each of G matrices.
        diagonal: (K, H)
        weights: (G, H, H) W_hr, W_hz and W_hn, or some of them.
    """

    value: Array
    factors: Array
    diagonal: Array
    weights: Array

    def pull_back(self, vectors: Array) -> Array:
        """Return J^T v for each state: (K, H) to (K, H)."""
        scaled = (self.factors * vectors[:, np.newaxis]).reshape(len(vectors), -1)
        product = scaled @ self.weights.reshape(-1, vectors.shape[1])
        product += self.diagonal * vectors
        return np.asarray(product)

    def matrix(self, row: int) -> Array:
        """Return the Jacobian at one of the states: (H, H)."""
        first, *others = zip(self.factors[row, :, :, np.newaxis], self.weights, strict=True)
        matrix = first[0] * first[1]
        for factors, weights in others:
            matrix += factors * weights
        matrix.flat[:: len(matrix) + 1] += self.diagonal[row]
        return np.asarray(matrix)


@dataclass(frozen=True, eq=False)
class Loop:
    """F^k(h) - h, from k linearizations of F along the way.

    Attributes:
        value: (K, H) F^k(h) - h.
        steps: The linearizations, in the order of the steps.
    """

    value: Array
    steps: Sequence[OneStep]

    def pull_back(self, vectors: Array) -> Array:
        """Return J^T v for each state: (K, H) to (K, H)."""
        pulled = reduce(lambda v, step: step.pull_back(v), reversed(self.steps), vectors)
        return np.asarray(pulled - vectors)

    def matrix(self, row: int) -> Array:
        """Return the Jacobian at one of the states: (H, H)."""
        matrices = [step.matrix(row) for step in self.steps]
        matrix = reduce(lambda product, matrix: matrix @ product, matrices)
        matrix.flat[:: len(matrix) + 1] -= 1.0
        return np.asarray(matrix)


class GRUMap:
    """The map F from a state to the next at a constant input, (K, H) to (K, H).

    Args:
        weights: By PyTorch's names without suffix.
        input: (I,) the constant input.
    """

    def __init__(self, weights: Mapping[str, Array], input: Array) -> None:
        named = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        recurrent = named["weight_hh"]
        self.size = recurrent.shape[1]
        self._recurrent = np.ascontiguousarray(recurrent).reshape(3, self.size, self.size)
        self._without_update = np.ascontiguousarray(self._recurrent[[0, 2]])
        self._input_weights = named["weight_ih"]
        none = np.zeros(3 * self.size)
        from_input = self._input_weights @ input + named.get("bias_ih", none)
        from_state = named.get("bias_hh", none)
        both = 2 * self.size
        self._gate_bias = from_input[:both] + from_state[:both]
        self._candidate_input, self._candidate_bias = from_input[both:], from_state[both:]

    def astype(self, dtype: type[np.floating[Any]]) -> GRUMap:
        """Return the same map, computed in another type."""
        converted = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(converted, name, value.astype(dtype))
        return converted

    def __call__(self, states: Array) -> Array:
        """Return the states after one step: (K, H)."""
        _, z, _, n = self._gates(states)
        return np.asarray((states - n) * z + n)

    def jacobian(self, states: Array) -> Array:
        """Return the Jacobians at these states: (K, H, H), one next unit a row."""
        step = self.step(states)
        matrices = [step.matrix(row) for row in range(len(states))]
        return np.array(matrices).reshape(len(states), self.size, self.size)

    def step(self, states: Array) -> OneStep:
        """Linearize F."""
        r, z, g, n = self._gates(states)
        away = states - n
        return OneStep(away * z + n, self._factors(r, z, g, n, away), z, self._recurrent)

    def motion(self, states: Array, period: int = 1) -> Linearization:
        """Linearize F^k(h) - h, how far `period` steps move a state."""
        if period == 1:
            r, z, g, n = self._gates(states)
            away, rest = states - n, z - 1
            return OneStep(away * rest, self._factors(r, z, g, n, away), rest, self._recurrent)
        steps = [self.step(states)]
        while len(steps) < period:
            steps.append(self.step(steps[-1].value))
        return Loop(steps[-1].value - states, steps)

    def candidate_gap(self, states: Array, scale: Array) -> OneStep:
        """Linearize ``scale (n(h) - h)``, with constant (K, H) scales."""
        size, weights = self.size, self._without_update
        product = states @ weights.reshape(-1, size).T
        r = _sigmoid(product[:, :size] + self._gate_bias[:size])
        g = product[:, size:] + self._candidate_bias
        n = np.tanh(self._candidate_input + r * g)
        factors = np.empty((len(states), 2, size), states.dtype)
        factors[:, 1] = slope = (1 - n * n) * scale * r
        factors[:, 0] = slope * g * (1 - r)
        return OneStep((n - states) * scale, factors, -scale, weights)

    def update(self, states: Array) -> Array:
        """Return the update gate z: (K, H)."""
        return self._gates(states)[1]

    def input_jacobian(self, state: Array) -> Array:
        """Return the derivative of the next state by the input, at one state (H,): (H, I)."""
        r, z, g, n = self._gates(state[np.newaxis])
        factors = self._factors(r, z, g, n, state - n)[0]
        # The reset gate does not multiply the input.
        factors[2] = ((1 - z) * (1 - n * n))[0]
        by_gate = self._input_weights.reshape(3, self.size, -1)
        return np.asarray(np.einsum("gh,ghi->hi", factors, by_gate))

    def _factors(self, r: Array, z: Array, g: Array, n: Array, away: Array) -> Array:
        """(K, 3, H) of the rows of the recurrent weights in F's Jacobian."""
        factors = np.empty((len(r), 3, self.size), r.dtype)
        slope = (1 - z) * (1 - n * n) * r
        factors[:, 0] = slope * g * (1 - r)
        factors[:, 1] = away * z * (1 - z)
        factors[:, 2] = slope
        return factors

    def _gates(self, states: Array) -> tuple[Array, Array, Array, Array]:
        """r, z, g and n, (K, H) each."""
        both = 2 * self.size
        product = states @ self._recurrent.reshape(-1, self.size).T
        gates = _sigmoid(product[:, :both] + self._gate_bias)
        r, z = gates[:, : self.size], gates[:, self.size :]
        g = product[:, both:] + self._candidate_bias
        return r, z, g, np.tanh(self._candidate_input + r * g)


def _sigmoid(values: Array) -> Array:
    """Compute 1 / (1 + exp(-x)) in place."""
    # By tanh, which never overflows.
    values *= 0.5
    np.tanh(values, out=values)
    values *= 0.5
    values += 0.5
    return values
