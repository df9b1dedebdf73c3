"""Gradients from recorded arrays: those of the states, gates and inputs of one call.

B sequences of a call, n rows of all its sequences, I input size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from grutrace.gradients.backward import call_gradients, gate_gradients, input_gradient
from grutrace.gru.kernel import CellWeights
from grutrace.gru.recompute import isolated_context
from grutrace.records import WEIGHTS, Array


@isolated_context()
def recorded_gradients(
    input: Array,
    previous: Array,
    weights: Mapping[str, Array],
    arriving: Array,
    steps: Array,
    quantity: str,
    *,
    reverse: bool,
    preactivation: bool = False,
) -> Array:
    """Return the gradients of a quantity for the rows of a call, (n, H), or (n, I) for the input.

    Rows are in the order of a trace: sequence by sequence, each in time order.

    Args:
        input: (n, I).
        previous: (n, H), the state before each step.
        weights: By PyTorch's names without suffix.
        arriving: (n, H), the gradient that arrives at each state from outside the recurrence.
        steps: (B,) number of rows of each sequence.
        quantity: hidden, reset, update, candidate or input. Hidden is the total gradient.
        reverse: Whether the layer reads from the last step to the first.
        preactivation: Whether to return the gradient of the gate's pre-activation.
    """
    dtype = torch.promote_types(_tensor(arriving).dtype, torch.float32)
    dtype = torch.promote_types(dtype, _tensor(weights["weight_hh"]).dtype)
    order, batch_sizes = _kernel_order(steps)
    rows = [_tensor(array).to(dtype)[order] for array in (input, previous, arriving)]
    cell_weights = CellWeights(
        *(_tensor(weights[name]).to(dtype) for name in WEIGHTS if name in weights)
    )
    final = rows[1].new_zeros(len(steps), previous.shape[1])
    total, _, derivatives = call_gradients(
        rows[0], rows[1], cell_weights, rows[2], final, batch_sizes, reverse=reverse
    )
    if quantity == "hidden":
        values = total
    elif quantity == "input":
        values = input_gradient(total, derivatives, cell_weights.weight_ih)
    else:
        gates = gate_gradients(total, derivatives, preactivations=preactivation)
        values = getattr(gates, quantity)
    result = torch.empty_like(values)
    result[order] = values
    array: Array = result.numpy()
    return array


def _kernel_order(steps: Array) -> tuple[Tensor, list[int]]:
    """Return the rows in the order of time, longer sequences first, and the batch sizes."""
    steps = np.asarray(steps, np.int64)
    by_length = np.argsort(-steps, kind="stable")
    ranks = np.empty_like(by_length)
    ranks[by_length] = np.arange(len(steps))
    starts = np.cumsum(steps) - steps
    times = np.arange(int(steps.sum())) - np.repeat(starts, steps)
    order = np.lexsort((np.repeat(ranks, steps), times))
    batch_sizes = np.bincount(times, minlength=int(steps.max(initial=0)))
    return torch.from_numpy(order), batch_sizes.tolist()


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
