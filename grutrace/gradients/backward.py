"""The backward pass of a GRU in closed form: from the gradients that arrive at the states of a call
to those of all its states, gates, pre-activations and inputs.

A state is an element-wise function of its gates and the previous state: h = (1 - z) * n + z * h'.
So the gradient of a gate is the gradient of the state of the same step and unit, times a local
derivative. With a_r, a_z and a_n the pre-activations (the arguments of the sigmoids and the tanh)
and q = W_hn h' + b_hn:

    dh/dz = h' - n              dh/da_z = dh/dz * z * (1 - z)
    dh/dn = 1 - z               dh/da_n = dh/dn * (1 - n * n)
    dh/dr = dh/da_n * q         dh/da_r = dh/dr * r * (1 - r)

Only the gradients of the states need a loop over the steps, from the last one back:

    dL/dh'  = dL/dh * z + W_hr^T dL/da_r + W_hz^T dL/da_z + W_hn^T (dL/da_n * r)

plus the gradient that arrives at h' from outside the recurrence. Nothing is run forward: the gates
follow from the states that the kernel returned (`grutrace.gru.cell`).

T steps, B sequences in a batch, I input size, H hidden size, N rows: the steps of all sequences, in
the kernel's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grutrace.gru import cell
from grutrace.gru.cell import Gates, Products
from grutrace.gru.kernel import CellWeights

#: Rows whose derivatives are held at once where only those of the states are wanted: some 14 values
#: for each unit of a row.
MOST_ROWS = 1024


class StepDerivatives(NamedTuple):
    """How the state of a step depends on the same unit of its gates: each field (N, H).

    Attributes:
        gates: dh/dr, dh/dz and dh/dn.
        preactivations: dh/da_r, dh/da_z and dh/da_n.
        previous: dh/dh' with the gates held: z.
        recurrent: dh/dq of the candidate's hidden product q.
    """

    gates: Gates
    preactivations: Gates
    previous: Tensor
    recurrent: Tensor


def step_derivatives(products: Products, previous: Tensor) -> StepDerivatives:
    """Return the local derivatives of steps, in float32 or, if the steps are, in float64.

    Args:
        products: (N, 3H) each, as from `cell.products`.
        previous: (N, H), the state before each step.
    """
    dtype = torch.promote_types(
        torch.promote_types(products.input.dtype, previous.dtype), torch.float32
    )
    products, previous = Products(*(part.to(dtype) for part in products)), previous.to(dtype)
    reset, update, candidate = cell.gates(products)
    recurrent_product = products.hidden.chunk(3, -1)[2]
    by_candidate = 1 - update
    by_update = previous - candidate
    by_candidate_preactivation = by_candidate * (1 - candidate * candidate)
    by_reset = by_candidate_preactivation * recurrent_product
    return StepDerivatives(
        Gates(by_reset, by_update, by_candidate),
        Gates(
            by_reset * reset * (1 - reset),
            by_update * update * (1 - update),
            by_candidate_preactivation,
        ),
        update,
        by_candidate_preactivation * reset,
    )


def previous_gradient(gradient: Tensor, derivatives: StepDerivatives, weight_hh: Tensor) -> Tensor:
    """Return the gradient of the state before each step, (N, H), through that step alone.

    Args:
        gradient: (N, H), the gradient of the state after each step.
        derivatives: The local derivatives of the same steps.
        weight_hh: (3H, H).
    """
    reset, update, _ = derivatives.preactivations
    products = torch.cat(
        (gradient * reset, gradient * update, gradient * derivatives.recurrent), dim=-1
    )
    return gradient * derivatives.previous + products @ weight_hh


def input_gradient(gradient: Tensor, derivatives: StepDerivatives, weight_ih: Tensor) -> Tensor:
    """Return the gradient of the input of each step, (N, I), through that step.

    Args:
        gradient: (N, H), the gradient of the state after each step.
        derivatives: The local derivatives of the same steps.
        weight_ih: (3H, I).
    """
    products = torch.cat([gradient * part for part in derivatives.preactivations], dim=-1)
    return products @ weight_ih.to(products.dtype)


def state_gradients(
    arriving: Tensor,
    final: Tensor,
    derivatives: StepDerivatives,
    weight_hh: Tensor,
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the total gradient of the state after each step, and of the initial states.

    Args:
        arriving: (N, H), the gradient that arrives at each state from outside the recurrence: at
            the layer's output.
        final: (B, H), the gradient that arrives at the final states, h_n.
        derivatives: The local derivatives of the steps.
        weight_hh: (3H, H).
        batch_sizes: (T,) number of sequences that have each step, as in a PackedSequence. B for
            each step of a padded batch.
        reverse: Whether the layer reads from the last step to the first.

    Returns:
        (N, H) and (B, H).
    """
    dtype = derivatives.previous.dtype
    weight_hh = weight_hh.to(dtype)
    total = arriving.to(dtype, copy=True)
    carried = final.to(dtype, copy=True)
    starts = [0]
    for size in batch_sizes:
        starts.append(starts[-1] + size)
    # The kernel's last step first. A sequence that is shorter than others joins at its own end.
    times = range(len(batch_sizes))
    for time in times if reverse else reversed(times):
        rows, sequences = slice(starts[time], starts[time + 1]), slice(batch_sizes[time])
        total[rows] += carried[sequences]
        carried[sequences] = previous_gradient(
            total[rows], select_steps(derivatives, rows), weight_hh
        )
    return total, carried


def select_steps(derivatives: StepDerivatives, rows: slice) -> StepDerivatives:
    """Return the derivatives of some rows."""
    return StepDerivatives(
        Gates(*(part[rows] for part in derivatives.gates)),
        Gates(*(part[rows] for part in derivatives.preactivations)),
        derivatives.previous[rows],
        derivatives.recurrent[rows],
    )


def gate_gradients(
    gradient: Tensor, derivatives: StepDerivatives, *, preactivations: bool = False
) -> Gates:
    """Return the gradients of the gates, or of their pre-activations, each (N, H).

    Args:
        gradient: (N, H), the total gradient of the state after each step.
        derivatives: The local derivatives of the same steps.
        preactivations: Whether to return those of the pre-activations.
    """
    factors = derivatives.preactivations if preactivations else derivatives.gates
    return Gates(*(gradient * factor for factor in factors))


def call_gradients(
    input: Tensor,
    previous: Tensor,
    weights: CellWeights,
    arriving: Tensor,
    final: Tensor,
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, StepDerivatives]:
    """Return the total gradients of the states of one call, for one direction of one layer.

    Args:
        input: (N, I).
        previous: (N, H), the state before each step.
        weights: The weights that the kernel used.
        arriving: As for `state_gradients`.
        final: As for `state_gradients`.
        batch_sizes: As for `state_gradients`.
        reverse: As for `state_gradients`.

    Returns:
        The gradients of the states (N, H) and of the initial states (B, H), and the local
        derivatives, for `gate_gradients` and `input_gradient`.
    """
    derivatives = step_derivatives(cell.products(input, previous, *weights), previous)
    total, initial = state_gradients(
        arriving, final, derivatives, weights.weight_hh, batch_sizes, reverse=reverse
    )
    return total, initial, derivatives


def total_gradients(
    input: Tensor,
    previous: Tensor,
    weights: CellWeights,
    arriving: Tensor,
    final: Tensor,
    batch_sizes: Sequence[int],
    *,
    reverse: bool,
    most_rows: int = MOST_ROWS,
) -> tuple[Tensor, Tensor]:
    """Return the total gradients of the states of one call (N, H) and of the initial ones (B, H).

    The arguments are those of `call_gradients`, and `most_rows`: the number of rows whose
    derivatives are held at once.
    """
    parts, start = list[tuple[slice, list[int]]](), 0
    for size in batch_sizes:
        if not parts or sum(parts[-1][1]) + size > most_rows:
            parts.append((slice(start, start), []))
        start += size
        parts[-1] = slice(parts[-1][0].start, start), [*parts[-1][1], size]
    total = torch.empty_like(arriving)
    for rows, sizes in parts if reverse else reversed(parts):
        own = input[rows], previous[rows], weights, arriving[rows]
        total[rows], final, _ = call_gradients(*own, final, sizes, reverse=reverse)
    return total, final
