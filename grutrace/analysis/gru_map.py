"""The map from a state to the next at a constant input, and its Jacobian, in float64.

The equations are PyTorch's (docs/equations.md). K states, H units, I input size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grutrace.analysis.jacobian import factors, jacobians
from grutrace.record import Array


class GRUMap:
    """F: (K, H) states to (K, H).

    Args:
        weights: By PyTorch's names without suffix.
        input: (I,) the constant input.
    """

    def __init__(self, weights: Mapping[str, Array], input: Array) -> None:
        self._weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self._from_input = self._weights["weight_ih"] @ input + self._weights.get("bias_ih", 0.0)

    def __call__(self, states: Array) -> Array:
        """The states after one step."""
        gates = self._gates(states)
        update, candidate = gates["update"], gates["candidate"]
        return np.asarray((states - candidate) * update + candidate)

    def jacobian(self, states: Array) -> Array:
        """(K, H, H) the derivative of each unit's next state, by row, by each state, by column."""
        return jacobians(factors(self._gates(states), states, self._weights), self._weights)

    def _gates(self, states: Array) -> dict[str, Array]:
        """(K, H) each."""
        from_h = states @ self._weights["weight_hh"].T + self._weights.get("bias_hh", 0.0)
        parts = np.split(from_h, 3, axis=1)
        x = np.split(self._from_input, 3)
        reset = _sigmoid(x[0] + parts[0])
        return {
            "reset": reset,
            "update": _sigmoid(x[1] + parts[1]),
            "candidate": np.tanh(x[2] + reset * parts[2]),
        }


def _sigmoid(values: Array) -> Array:
    # By the tanh, which overflows nowhere.
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * values))
