"""Copy the gates that PyTorch's kernel computes, while it runs.

On a CPU the fused layer is a loop over PyTorch operations. In each step the hidden product (B, 3 H)
is computed first, and reset and update are computed in place of its first two thirds. The last
third is multiplied by reset, also in place, and the input product is added to it. This is the only
addition of a step that creates a tensor, and the candidate is computed in place of its result. So
an observer of this addition finds all gates of the step: reset and update in front of the second
operand, and the candidate, by the next step, in place of the result.

This changes nothing in the kernel, with or without gradients. PyTorch does not document this loop.
So it is tested on small layers first; if the memory does not look as expected, gates are replayed
instead, as on other devices.

T steps, B sequences in a batch, I input size, H hidden size, D directions, L layers, N rows, U
units that are copied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from grutrace.gru import cell, dispatcher
from grutrace.gru.gate_copies import CallShape, GateBuffers, GateRequest, UnitsByGate, make_copies
from grutrace.gru.layout import PackedLayout
from grutrace.native.library import load
from grutrace.records import GATES
from grutrace.torch_internals import count_dispatch_modes, innermost_transform

Result = TypeVar("Result")

#: Multiply-adds per second of one thread, in matrix products of the size of a layer's. On a much
#: slower or faster processor, the choice between two ways of similar cost may be wrong.
#: docs/performance.md has the measurements behind these constants.
OPERATIONS_PER_SECOND = 110e9

#: Cost of a replay without the products, per element of a gate, and cost of reading a weight, once
#: per call. Seconds.
ELEMENT_REPLAY_COST, WEIGHT_REPLAY_COST = 1.7e-9, 250e-12


class CopyCosts(NamedTuple):
    """Costs of copying gates, in seconds: per call, per step, and per element of a gate."""

    call: float
    step: float
    element: float


#: With the compiled library, and with PyTorch operations.
COMPILED_COSTS, TORCH_COSTS = CopyCosts(100e-6, 8.5e-6, 0.6e-9), CopyCosts(150e-6, 11e-6, 2.2e-9)

#: Further cost per recurrent weight and step: each step reads all recurrent weights, and copying
#: between two steps evicts them from the cache. Seconds.
WEIGHT_COPY_COST = 18e-12


class KernelGates(NamedTuple):
    """The kernel's gates of one direction of a layer in a call.

    Attributes:
        gates: By name, in the kernel's order, (T, B, U) or (N, U), in memory of their own.
        columns: Units, by name.
        dtype: Data type in which the kernel computed them.
    """

    gates: dict[str, Tensor]
    columns: UnitsByGate
    dtype: torch.dtype


class StepGates(NamedTuple):
    """The kernel's gates of a call of one step of one direction, in the kernel's own memory.

    Attributes:
        product: (B, H), the last third of the hidden product. Reset and update are in the first two
            thirds.
        candidate: (B, H)
        columns: Units to copy, all of them, by gate name.
    """

    product: Tensor
    candidate: Tensor
    columns: UnitsByGate

    def copied(self) -> KernelGates:
        """Return copies of the gates, (1, B, H) each."""
        candidate = self.candidate
        batch, size = candidate.shape
        places = {"reset": 0, "update": size}
        with torch.no_grad():
            gates = {
                name: (
                    candidate
                    if name == "candidate"
                    else self.product.as_strided((batch, size), (3 * size, 1), places[name])
                )
                .clone()
                .unsqueeze(0)
                for name in self.columns
            }
        return KernelGates(gates, self.columns, candidate.dtype)


def keep_step_gates(
    kernel: Callable[[], Result],
    batch: int,
    hidden_size: int,
    dtype: torch.dtype,
    columns: UnitsByGate,
) -> tuple[Result, StepGates | None]:
    """Run a kernel call of one step of one direction, and keep the memory that its gates are in.

    Args:
        kernel: Makes the call.
        batch: B
        hidden_size: H
        dtype: Data type of the input.
        columns: Units to copy, by gate name: all units.

    Returns:
        The kernel's result, and the gates; None if they were not found in memory.
    """
    operands: list[tuple[Tensor, Tensor]] = []
    result = dispatcher.observe_additions(
        lambda _, product, total: operands.append((product, total)), kernel
    )
    if len(operands) != 1:
        return result, None
    product, total = operands[0]
    is_expected = (
        product.shape == total.shape == (batch, hidden_size)
        and product.stride() == (3 * hidden_size, 1)
        and product.storage_offset() == 2 * hidden_size
        and total.is_contiguous()
        and total.dtype is product.dtype is dtype
    )
    return result, StepGates(product, total, columns) if is_expected else None


def copy_kernel_gates(
    kernel: Callable[[], Result],
    layout: CallShape,
    directions: Sequence[bool],
    columns: UnitsByGate,
) -> tuple[Result, list[KernelGates] | None]:
    """Run a kernel call, and copy the gates of each step.

    Args:
        kernel: Runs some layers, one direction after the other, or one step of a cell.
        layout: Shape of the call.
        directions: For each direction, in the order of execution, whether it is the reverse one.
        columns: Units to copy from each, by gate name.

    Returns:
        The kernel's result, and the gates by direction; None if they were not found in memory.
    """
    with torch.inference_mode(False):
        buffers = [GateBuffers(layout, columns) for _ in directions]
    size = layout.hidden_size
    product_strides, product_offset = (3 * size, 1), 2 * size
    rows = [row for reverse in directions for row in layout.rows[:: -1 if reverse else 1]]
    step, copies = 0, None

    def on_addition(_: Tensor, product: Tensor, total: Tensor) -> None:
        nonlocal step, copies
        if (
            not 0 <= step < len(rows)
            or product.stride() != product_strides
            or product.storage_offset() != product_offset
            or product.shape != (rows[step], size)
            or total.stride() != (size, 1)
        ):
            step, copies = -1, None
            return
        if copies is None:
            copies = make_copies(buffers, directions, layout, total.dtype)
        copies.take(product, total)
        step += 1

    result = dispatcher.observe_additions(on_addition, kernel)
    if copies is None or step < len(rows):
        return result, None
    copies.finish()
    return result, [KernelGates(buffer.gates, columns, copies.dtype) for buffer in buffers]


def is_cheaper(
    num_steps: int, batch: float, input_size: float, hidden_size: int, request: GateRequest
) -> bool:
    """Return whether copying the gates of a call is expected to cost less than a replay.

    A replay repeats the matrix products of the layer for the requested units. Copying has a fixed
    cost per step, and a cost per element.

    Args:
        num_steps: T
        batch: B, the mean over the steps of a packed batch.
        input_size: I, the mean over the layers of a stack.
        hidden_size: H
        request: Units to copy, and the maximum relative cost.
    """
    columns = request.columns
    copied_units = sum(map(len, columns.values()))
    # The candidate needs the reset gate.
    replayed_units = copied_units
    if "reset" not in columns:
        replayed_units += len(columns.get("candidate", ()))
    weights = replayed_units * (input_size + hidden_size)
    product_cost = 2 * batch * weights / (OPERATIONS_PER_SECOND * torch.get_num_threads())
    replay_cost = num_steps * (product_cost + ELEMENT_REPLAY_COST * batch * replayed_units)
    if request.max_cost_ratio < 1:
        if num_steps == 1:
            # Similar calls of one step wait as a series, which costs less than copying their gates.
            return False
        # In the background, weights are read once for many calls.
        replay_cost *= request.max_cost_ratio
    else:
        replay_cost += WEIGHT_REPLAY_COST * weights
    costs = TORCH_COSTS if load() is None else COMPILED_COSTS
    step_cost = (
        costs.step + costs.element * batch * copied_units + WEIGHT_COPY_COST * 3 * hidden_size**2
    )
    return replay_cost > costs.call + num_steps * step_cost


def can_intercept(input: Tensor) -> bool:
    """Return whether the gates of a call with this input can be copied without side effects.

    They cannot under a dispatch mode, which would see the copies, nor in a torch.func transform.
    """
    return (
        input.device.type == "cpu"
        and not count_dispatch_modes()
        and innermost_transform() is None
        and kernel_supported()
    )


@cache
def kernel_supported() -> bool:
    """Return whether gates copied from small layers are as expected. Tested once per process."""
    # The tracer may be made under autocast.
    with torch.autocast("cpu", enabled=False):
        supported = dispatcher.is_available() and all(
            _is_recognized(bias, grad, sizes)
            for bias in (True, False)
            for grad in (True, False)
            for sizes in ([2, 2, 2], [2, 1, 1])
        )
    if not supported:
        logging.getLogger(__name__).debug(
            "torch %s makes other additions in a GRU than expected: gates are replayed, not copied",
            torch.__version__,
        )
    return supported


@torch.inference_mode(False)
def _is_recognized(bias: bool, grad: bool, sizes: list[int]) -> bool:
    """Copy the gates of a small layer of two directions. Return whether they are correct.

    Args:
        bias: Whether the layer has biases.
        grad: Whether gradients are enabled.
        sizes: (T,) batch sizes of a packed batch; of a padded one if they are equal.
    """
    batch_sizes = torch.tensor(sizes, device="cpu")
    input, initial = _distinct_values(sum(sizes), 3), _distinct_values(2, sizes[0], 2)
    shapes = [(6, 3), (6, 2), *[(6,), (6,)] * bias] * 2
    weights = [_distinct_values(*shape) + index / 10 for index, shape in enumerate(shapes)]
    packed = batch_sizes if sizes[-1] < sizes[0] else None

    def kernel() -> Tensor:
        options = (bias, 1, 0.0, False, True)
        start = initial.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            if packed is not None:
                return torch.gru(input, packed, start, weights, *options)[0].detach()
            padded = input.reshape(len(sizes), sizes[0], 3)
            return torch.gru(padded, start, weights, *options, batch_first=False)[0].detach()

    try:
        layout = CallShape(sizes, packed is None, 2, input.dtype)
        columns = dict.fromkeys(GATES, range(2))
        output, copied = copy_kernel_gates(kernel, layout, [False, True], columns)
    except Exception:
        # Any error means that this PyTorch version computes its gates differently.
        return False
    steps = PackedLayout(batch_sizes, None)
    for direction, kernel_gates in enumerate(copied or ()):
        states = output.reshape(-1, 2, 2)[:, direction]
        previous = steps.previous(states, initial[direction], reverse=direction == 1)
        count = len(weights) // 2
        direction_weights = weights[direction * count : (direction + 1) * count]
        expected = cell.gates(cell.products(input, previous, *direction_weights))
        if not all(map(_is_close, kernel_gates.gates.values(), expected)):
            return False
    return copied is not None


def _distinct_values(*shape: int) -> Tensor:
    """Return different values between -1 and 1."""
    return torch.arange(1.0, 1 + math.prod(shape), device="cpu").sin().reshape(shape)


def _is_close(gate: Tensor, expected: Tensor) -> bool:
    return torch.allclose(gate.reshape(expected.shape), expected, atol=1e-6)
