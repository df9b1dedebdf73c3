"""Gradients from recorded arrays: those of the states, gates and inputs of one call.

B sequences of a call, n rows of all its sequences, I input size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grutrace.gradients.backward import (
    call_gradients,
    gate_gradients,
    input_gradient,
    previous_gradient,
    select_steps,
    step_derivatives,
    total_gradients,
)
from grutrace.gru import cell
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
    dtype = _computing_type(arriving, weights)
    order, batch_sizes = _kernel_order(steps)
    rows = [_tensor(array).to(dtype)[order] for array in (input, previous, arriving)]
    cell_weights = _cell_weights(weights, dtype)
    final = rows[1].new_zeros(len(steps), previous.shape[1])
    inputs = rows[0], rows[1], cell_weights, rows[2], final, batch_sizes
    if quantity == "hidden":
        values, _ = total_gradients(*inputs, reverse=reverse)
    else:
        total, _, derivatives = call_gradients(*inputs, reverse=reverse)
        if quantity == "input":
            values = input_gradient(total, derivatives, cell_weights.weight_ih)
        else:
            gates = gate_gradients(total, derivatives, preactivations=preactivation)
            values = getattr(gates, quantity)
    result = torch.empty_like(values)
    result[order] = values
    array: Array = result.numpy()
    return array


class SequencePart(NamedTuple):
    """The steps of one sequence in one call, in time order.

    Attributes:
        input: (n, I).
        previous: (n, H), the state before each step.
        weights: By PyTorch's names without suffix.
        arriving: (n, H), the gradient that arrives at each state from outside the call.
    """

    input: Array
    previous: Array
    weights: Mapping[str, Array]
    arriving: Array


@isolated_context()
def source_gradients(parts: Sequence[SequencePart], step: int, *, reverse: bool) -> Array:
    """Return the parts of the total gradient of a state, by the step at which each arrived, (n, H).

    Args:
        parts: The steps of one sequence in consecutive calls, of which each starts from the state
            of the one before, with its gradient attached. n steps in all.
        step: The step whose state it is.
        reverse: Whether the layer reads from the last step to the first, in one call.
    """
    dtype = _computing_type(parts[0].arriving, parts[0].weights)
    weights = [_cell_weights(part.weights, dtype) for part in parts]
    derivatives = []
    for part, own in zip(parts, weights, strict=True):
        input, previous = _tensor(part.input).to(dtype), _tensor(part.previous).to(dtype)
        derivatives.append(step_derivatives(cell.products(input, previous, *own), previous))
    sources = torch.cat([_tensor(part.arriving).to(dtype) for part in parts])
    steps = [(number, row) for number, part in enumerate(parts) for row in range(len(part.input))]
    # In the order in which the layer makes the steps.
    order = range(step, -1, -1) if reverse else range(step, len(steps))
    for place in reversed(order[:-1]):
        # What arrived at later steps goes back by one step.
        later = slice(0, place) if reverse else slice(place + 1, None)
        number, row = steps[place - 1 if reverse else place + 1]
        of_step = select_steps(derivatives[number], slice(row, row + 1))
        sources[later] = previous_gradient(sources[later], of_step, weights[number].weight_hh)
        if number != steps[place][0]:
            # What arrived at the end of a call has come through the next call, too.
            sources[place] -= sources[later].sum(0)
    # Nothing comes from earlier steps.
    sources[slice(step + 1, None) if reverse else slice(step)] = 0
    array: Array = sources.numpy()
    return array


def _computing_type(arriving: Array, weights: Mapping[str, Array]) -> torch.dtype:
    """Return the type to compute in: that of the weights and gradients, at least float32."""
    dtype = torch.promote_types(_tensor(arriving).dtype, torch.float32)
    return torch.promote_types(dtype, _tensor(weights["weight_hh"]).dtype)


def _cell_weights(weights: Mapping[str, Array], dtype: torch.dtype) -> CellWeights:
    return CellWeights(*(_tensor(weights[name]).to(dtype) for name in WEIGHTS if name in weights))


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
