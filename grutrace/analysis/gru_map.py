"""The map from a state to the next at a constant input, and its Jacobian, in float64.

The equations are PyTorch's (docs/equations.md). K states, H units, I input size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grutrace.record import Array


class GRUMap:
    """F: (K, H) states to (K, H).

    Args:
        weights: By PyTorch's names without suffix.
        input: (I,) the constant input.
    """

    def __init__(self, weights: Mapping[str, Array], input: Array) -> None:
        exact = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self._from_input = np.split(exact["weight_ih"] @ input + exact.get("bias_ih", 0.0), 3)
        self._weights = np.split(exact["weight_hh"], 3)
        self._biases = np.split(exact.get("bias_hh", np.zeros(len(exact["weight_hh"]))), 3)

    def __call__(self, states: Array) -> Array:
        """The states after one step."""
        _, update, candidate, _ = self._gates(states)
        return np.asarray((states - candidate) * update + candidate)

    def jacobian(self, states: Array) -> Array:
        """(K, H, H) the derivative of each unit's next state, by row, by each state, by column.

        With r, z, n the gates and g = W_hn h + b_hn,

            dF/dh = diag(z) + diag((h - n) z (1 - z)) W_hz
                    + diag((1 - z) (1 - n^2)) (diag(r) W_hn + diag(g r (1 - r)) W_hr).
        """
        reset, update, candidate, proposal = self._gates(states)
        of_reset, of_update, of_candidate = self._weights
        found = ((states - candidate) * update * (1 - update))[..., np.newaxis] * of_update
        inner = (1 - update) * (1 - candidate**2)
        found += (inner * reset)[..., np.newaxis] * of_candidate
        found += (inner * proposal * reset * (1 - reset))[..., np.newaxis] * of_reset
        places = np.arange(states.shape[-1])
        found[..., places, places] += update
        return np.asarray(found)

    def _gates(self, states: Array) -> tuple[Array, Array, Array, Array]:
        """(K, H) each: reset, update, candidate, and g, which the reset gate is applied to."""
        from_h = [
            states @ weight.T + bias
            for weight, bias in zip(self._weights, self._biases, strict=True)
        ]
        reset = _sigmoid(self._from_input[0] + from_h[0])
        update = _sigmoid(self._from_input[1] + from_h[1])
        return reset, update, np.tanh(self._from_input[2] + reset * from_h[2]), from_h[2]


def _sigmoid(values: Array) -> Array:
    # By the tanh, which overflows nowhere.
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * values))
