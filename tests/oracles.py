"""Expected values, computed without grutrace.

- A float64 NumPy GRU, written from the equations in torch.nn.GRU's documentation, with a rigorous
  bound on how far a computation in a smaller type may be from it.
- The gates that the CPU kernel itself used, read from its autograd graph.
- The user's view of a batch: a list of sequences, each (T, width), in the order given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Weights = dict[str, np.ndarray]
GATES = ("reset", "update", "candidate")


@dataclass(frozen=True)
class Expected:
    """Values in float64, and the error bound of a computation with unit roundoff ``eps``."""

    values: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def gates(weights: Weights, x: np.ndarray, previous: np.ndarray, eps: float) -> Expected:
    """Gates and states of steps with inputs x (N, I) and states before them previous (N, H)."""
    x, previous = x.astype(np.float64), previous.astype(np.float64)
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    hidden_size = wide["weight_hh"].shape[1]
    bias_ih = wide.get("bias_ih", np.zeros(3 * hidden_size))
    bias_hh = wide.get("bias_hh", np.zeros(3 * hidden_size))
    from_input = x @ wide["weight_ih"].T + bias_ih
    from_hidden = previous @ wide["weight_hh"].T + bias_hh
    input_r, input_z, input_n = np.split(from_input, 3, axis=1)
    hidden_r, hidden_z, hidden_n = np.split(from_hidden, 3, axis=1)
    reset = sigmoid(input_r + hidden_r)
    update = sigmoid(input_z + hidden_z)
    candidate = np.tanh(input_n + reset * hidden_n)
    hidden = (1 - update) * candidate + update * previous

    # A dot product of k terms in any order is off by at most k * eps * sum |terms|. Then the
    # sigmoid's slope is at most 1/4, the tanh's at most 1, and each function adds a few eps.
    terms = x.shape[1] + hidden_size + 8
    size_input = np.abs(x) @ np.abs(wide["weight_ih"]).T + np.abs(bias_ih)
    size_hidden = np.abs(previous) @ np.abs(wide["weight_hh"]).T + np.abs(bias_hh)
    off_r, off_z, off_n = np.split(terms * eps * (size_input + size_hidden), 3, axis=1)
    bound_reset = off_r / 4 + 4 * eps
    bound_update = off_z / 4 + 4 * eps
    bound_candidate = off_n + np.abs(hidden_n) * bound_reset + 4 * eps
    largest = 1 + np.abs(previous)
    bound_hidden = bound_candidate + 2 * largest * bound_update + 4 * eps * largest
    return Expected(
        {"reset": reset, "update": update, "candidate": candidate, "hidden": hidden},
        {
            "reset": bound_reset,
            "update": bound_update,
            "candidate": bound_candidate,
            "hidden": bound_hidden,
        },
    )


def weights_of(layer: nn.GRU | nn.GRUCell, suffix: str) -> Weights:
    """The weights of one site, by name, from the module's parameters."""
    ending = "" if suffix == "cell" else f"_{suffix}"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    results = {name: getattr(layer, name + ending, None) for name in names}
    return {name: w.detach().numpy() for name, w in results.items() if w is not None}


def previous_states(hidden: np.ndarray, initial: np.ndarray, reverse: bool) -> np.ndarray:
    """The state before each step of one sequence, by a loop over its steps."""
    steps = len(hidden)
    rows = []
    for t in range(steps):
        if reverse:
            rows.append(initial if t == steps - 1 else hidden[t + 1])
        else:
            rows.append(initial if t == 0 else hidden[t - 1])
    return np.array(rows).reshape(steps, -1)


def as_sequences(layer: nn.GRU | nn.GRUCell, value: Any, width: int) -> list[np.ndarray]:
    """The user's view of an input or output: one (T, width) array a sequence, in that order."""
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        return [padded[b, :length].detach().numpy() for b, length in enumerate(lengths)]
    value = value.detach()
    if isinstance(layer, nn.GRUCell):
        return [row.numpy().reshape(1, width) for row in value.reshape(-1, width)]
    if value.dim() == 2:
        return [value.numpy()]
    by_sequence = value if layer.batch_first else value.transpose(0, 1)
    return [by_sequence[b].numpy() for b in range(by_sequence.shape[0])]


def harvest_layers(node: Any, width: int) -> list[dict[str, Tensor]]:
    """The gates that the CPU kernel used in a call, of each layer from the lowest to the top.

    Args:
        node: Where the graph of the call's output ends.
        width: D * H, by which the output of a layer is told from other joined tensors.
    """
    while type(node).__name__.startswith(("Squeeze", "Transpose")):
        ((node, _),) = node.next_functions
    if (cell := _harvest_step(node)) is not None:
        return [cell]
    result, seen, waiting = [], {node}, [node]
    while waiting:
        node = waiting.pop(0)
        if (gates := harvest(node)) is not None and gates["update"].shape[-1] == width:
            result.append(gates)
        following = [child for child, _ in node.next_functions if child not in {None, *seen}]
        seen.update(following)
        waiting.extend(following)
    return result[::-1]


def harvest(node: Any) -> dict[str, Tensor] | None:
    """The gates that were used to make one layer's output; None if the node is not that."""
    kind = type(node).__name__
    if kind not in ("StackBackward0", "CatBackward0"):
        return None
    inner = [child for child, _ in node.next_functions if child is not None]
    parts = [_harvest_step(child) or harvest(child) for child in inner]
    if not parts or None in parts:
        return None
    dim = node._saved_dim - 2**64 if node._saved_dim >= 2**63 else node._saved_dim
    join = torch.stack if kind == "StackBackward0" else torch.cat
    return {name: join([part[name] for part in parts], dim) for name in GATES}


def _harvest_step(node: Any) -> dict[str, Tensor] | None:
    """The gates of one step; None if the node is not one.

    The graph of a step holds h' = (h - n) * z + n: an addition of a product, whose second factor
    is z's sigmoid, and of n's tanh, which leads to r's sigmoid.
    """
    inner = [child for child, _ in node.next_functions if child is not None]
    if [type(child).__name__ for child in inner] != ["MulBackward0", "TanhBackward0"]:
        return None
    product, candidate = inner
    ((total, _),) = candidate.next_functions
    (times_reset,) = _inner(total, "MulBackward0")
    nodes = {
        "reset": _inner(times_reset, "SigmoidBackward0")[0],
        "update": _inner(product, "SigmoidBackward0")[0],
        "candidate": candidate,
    }
    return {name: child._saved_result for name, child in nodes.items()}


def _inner(node: Any, kind: str) -> list[Any]:
    return [child for child, _ in node.next_functions if type(child).__name__ == kind]
