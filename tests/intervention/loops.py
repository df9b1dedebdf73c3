"""A GRU with settings, as a float64 NumPy loop over single units of time, from the equations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from tests import oracles

#: Takes site, quantity, step, sequence and values (H,), and returns values (H,).
Edit = Callable[[str, str, int, int, np.ndarray], np.ndarray]


def suffixes(layer: nn.GRU | nn.GRUCell) -> list[tuple[str, int, bool]]:
    if isinstance(layer, nn.GRUCell):
        return [("cell", 0, False)]
    directions = 2 if layer.bidirectional else 1
    return [
        (f"l{number}{'_reverse' * reverse}", number, bool(reverse))
        for number in range(layer.num_layers)
        for reverse in range(directions)
    ]


def run_loop(
    layer: nn.GRU | nn.GRUCell,
    inputs: list[np.ndarray],
    initial: np.ndarray | None,
    edit: Edit,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Outputs (T, D * H) of each sequence, and the final states (L * D, B, H).

    Args:
        layer: Without dropout.
        inputs: (T, I) of each sequence.
        initial: (L * D, B, H), or None for zeros.
        edit: Sets quantities.
    """
    sites = suffixes(layer)
    size, batch = layer.hidden_size, len(inputs)
    final = np.zeros((len(sites), batch, size))
    current = [values.astype(np.float64) for values in inputs]
    for number in range(max(number for _, number, _ in sites) + 1):
        outputs: list[list[np.ndarray]] = [[] for _ in inputs]
        for index, (suffix, at, reverse) in enumerate(sites):
            if at != number:
                continue
            weights = {
                n: w.astype(np.float64) for n, w in oracles.weights_of(layer, suffix).items()
            }
            for b, x in enumerate(current):
                state = np.zeros(size) if initial is None else initial[index, b].astype(np.float64)
                states = np.zeros((len(x), size))
                for t in range(len(x))[:: -1 if reverse else 1]:

                    def change(name: str, values: np.ndarray, t: int = t, b: int = b) -> np.ndarray:
                        return edit(suffix, name, t, b, values)  # noqa: B023

                    state = step(weights, x[t], state, change)
                    states[t] = state
                final[index, b] = state
                outputs[b].append(states)
        current = [np.concatenate(parts, 1) for parts in outputs]
    return current, final


def step(
    weights: oracles.Weights,
    x: np.ndarray,
    state: np.ndarray,
    change: Callable[[str, np.ndarray], np.ndarray],
) -> np.ndarray:
    size = len(state)
    zeros = np.zeros(3 * size)
    from_input = weights["weight_ih"] @ x + weights.get("bias_ih", zeros)
    from_hidden = weights["weight_hh"] @ state + weights.get("bias_hh", zeros)
    i_r, i_z, i_n = np.split(from_input, 3)
    h_r, h_z, h_n = np.split(from_hidden, 3)
    reset = change("reset", oracles.sigmoid(change("reset_preactivation", i_r + h_r)))
    update = change("update", oracles.sigmoid(change("update_preactivation", i_z + h_z)))
    candidate = change("candidate", np.tanh(change("candidate_preactivation", i_n + reset * h_n)))
    return change("hidden", (1 - update) * candidate + update * state)


def initial_states(layer: nn.GRU | nn.GRUCell, initial: Tensor | None) -> np.ndarray | None:
    """(L * D, B, H) of the state that a call was given, in any of its forms."""
    if initial is None:
        return None
    values = initial.detach().numpy()
    count = len(suffixes(layer))
    if isinstance(layer, nn.GRUCell):
        return values.reshape(1, -1, layer.hidden_size)
    return values.reshape(count, -1, layer.hidden_size)
