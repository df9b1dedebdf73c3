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
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from grutrace.gru import cell, dispatcher
from grutrace.gru.layout import PackedLayout, numpy_type
from grutrace.records import GATES

#: Number of units whose states check a call if not all gates are computed.
CHECK_UNITS = 8

#: Units to copy, by gate name.
UnitsByGate: TypeAlias = Mapping[str, range]


class GateRequest(NamedTuple):
    """A request for the kernel's own gates.

    Attributes:
        columns: Units to copy, by gate name.
        max_cost_ratio: Maximum cost of copying, relative to the cost of a replay.
    """

    columns: UnitsByGate
    max_cost_ratio: float = 1.0


NO_GATES = GateRequest(MappingProxyType({}))


class GateCopyPlan(NamedTuple):
    """The columns to copy from a layer: the requested gates, and those that check them.

    Attributes:
        columns: Units to copy, by gate name.
        check_units: Units whose states are compared with the states that the gates lead to.
    """

    columns: UnitsByGate
    check_units: range

    @classmethod
    def of(cls, gates: Sequence[str], units: Sequence[int]) -> GateCopyPlan | None:
        """Return the plan for some gates of some units; None if they cannot be copied.

        Args:
            gates: Names of the gates.
            units: Indices of the units. They must be evenly spaced.
        """
        request = range(units[0], units[-1] + 1, units[1] - units[0] if len(units) > 1 else 1)
        if list(request) != list(units):
            return None
        few = request[:: max(1, len(request) // CHECK_UNITS)][:CHECK_UNITS]
        check_units = request if {"update", "candidate"} <= set(gates) else few
        columns = {name: request for name in GATES if name in gates}
        return cls({"update": check_units, "candidate": check_units} | columns, check_units)


def merge_requests(requests: Sequence[GateRequest], hidden_size: int) -> GateRequest:
    """Return a request that covers several. If the columns of a gate differ, it has all units.

    Args:
        requests: Requests for one layer.
        hidden_size: H
    """
    found: dict[str, range] = {}
    for request in requests:
        for name, columns in request.columns.items():
            found[name] = columns if found.get(name, columns) == columns else range(hidden_size)
    return GateRequest(
        found, min((request.max_cost_ratio for request in requests if request.columns), default=1.0)
    )


class CallShape(NamedTuple):
    """The shape of a call.

    Attributes:
        rows: (T,) number of sequences at each time.
        padded: Whether all sequences have all times.
        hidden_size: H
        dtype: Data type of the input.
    """

    rows: list[int]
    padded: bool
    hidden_size: int
    dtype: torch.dtype


class GateBuffer(NamedTuple):
    """A buffer for gates with the same columns that are adjacent in the kernel's memory.

    Attributes:
        names: Names of the gates.
        buffer: (gates, T, B, U) or (gates, N, U), the memory to copy to.
        strides: Strides in the kernel's memory, for (gates, b, U) at each time.
        offset: Storage offset in the kernel's memory.
    """

    names: tuple[str, ...]
    buffer: Tensor
    strides: tuple[int, int, int]
    offset: int


class GateBuffers:
    """Buffers for the gates of one direction of a layer in one call.

    Args:
        layout: Shape of the call.
        columns: Units to copy, by gate name.

    Attributes:
        product: Buffers for the hidden product (b, 3 H), which holds reset and update.
        candidate: Buffers for the candidate (b, H).
    """

    def __init__(self, layout: CallShape, columns: UnitsByGate) -> None:
        self._layout, size = layout, layout.hidden_size
        opened = tuple(name for name in ("reset", "update") if name in columns)
        alike = len({columns[name] for name in opened}) == 1
        groups = [opened] if alike else [(name,) for name in opened]
        self.product = [self._part(names, columns[names[0]], 3 * size) for names in groups]
        closed = [name for name in ("candidate",) if name in columns]
        self.candidate = [self._part((name,), columns[name], size) for name in closed]

    def _part(self, names: tuple[str, ...], columns: range, width: int) -> GateBuffer:
        size = self._layout.hidden_size
        offset = columns.start + size * (names[0] == "update")
        buffer = self._empty(len(names), len(columns))
        return GateBuffer(names, buffer, (size, width, columns.step), offset)

    def _empty(self, gates: int, units: int) -> Tensor:
        # NumPy memory of the type of the rows, so that rows need no further copy.
        rows, dtype = self._layout.rows, numpy_type(self._layout.dtype)
        if not self._layout.padded:
            return torch.from_numpy(np.empty((gates, sum(rows), units), dtype))
        # The rows of a sequence are adjacent, as in the trace.
        buffer = np.empty((gates, rows[0] if rows else 0, len(rows), units), dtype)
        return torch.from_numpy(buffer).transpose(1, 2)

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates by name, in the kernel's order: (T, B, U) or (N, U)."""
        parts = (*self.product, *self.candidate)
        return {
            name: gate for part in parts for name, gate in zip(part.names, part.buffer, strict=True)
        }

    def by_time(self, part: GateBuffer) -> Sequence[Tensor]:
        """Return the memory of a buffer for each time, (gates, b, U)."""
        if self._layout.padded:
            return part.buffer.unbind(1)
        views: tuple[Tensor, ...] = torch.split(part.buffer, self._layout.rows, 1)
        return views


Result = TypeVar("Result")

#: Multiply-adds per second of one thread, in matrix products of the size of a layer's. On a much
#: slower or faster processor, the choice between two ways of similar cost may be wrong.
#: docs/performance.md has the measurements behind these constants.
OPERATIONS_PER_SECOND = 110e9

#: Cost of a replay besides the products, per element of a gate, and of reading a weight, once per
#: call. Seconds.
ELEMENT_REPLAY_COST, WEIGHT_REPLAY_COST = 1.7e-9, 250e-12

#: Cost of copying gates: per call, per step, and per element of a gate. Seconds.
CALL_COPY_COST, STEP_COPY_COST, ELEMENT_COPY_COST = 150e-6, 11e-6, 2.2e-9

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
        product_copies = _in_order(buffers, directions, "product")
        candidate_copies = _in_order(buffers, directions, "candidate")
    size = layout.hidden_size
    strides, offset = (3 * size, 1), 2 * size
    rows = [row for reverse in directions for row in layout.rows[:: -1 if reverse else 1]]
    step, last = 0, None

    def on_addition(_: Tensor, product: Tensor, total: Tensor) -> None:
        nonlocal step, last
        if last is not None:
            # By now the sum was replaced by the candidate, in place.
            for views, part_strides, first in candidate_copies:
                views[step - 1].copy_(last.as_strided(views[step - 1].shape, part_strides, first))
        last = None
        if (
            not 0 <= step < len(rows)
            or product.stride() != strides
            or product.storage_offset() != offset
            or product.shape != (rows[step], size)
            or total.stride() != (size, 1)
        ):
            step = -1
            return
        # Copied at once, because the kernel's next step reuses the memory.
        for views, part_strides, first in product_copies:
            views[step].copy_(product.as_strided(views[step].shape, part_strides, first))
        step += 1
        last = total

    result = dispatcher.observe_additions(on_addition, kernel)
    if last is None or step < len(rows):
        return result, None
    with torch.no_grad():
        for views, part_strides, first in candidate_copies:
            views[-1].copy_(last.as_strided(views[-1].shape, part_strides, first))
    return result, [KernelGates(buffer.gates, columns, last.dtype) for buffer in buffers]


def _in_order(
    buffers: Sequence[GateBuffers], directions: Sequence[bool], source: str
) -> list[tuple[list[Tensor], tuple[int, int, int], int]]:
    """Return each buffer's memory in order of execution, and the kernel's strides and offset."""
    by_room = [getattr(buffer, source) for buffer in buffers]
    found = []
    for parts in zip(*by_room, strict=True):
        views = [
            view
            for buffer, part, reverse in zip(buffers, parts, directions, strict=True)
            for view in buffer.by_time(part)[:: -1 if reverse else 1]
        ]
        found.append((views, parts[0].strides, parts[0].offset))
    return found


def is_cheaper(
    num_steps: int, batch: float, input_size: float, hidden_size: int, request: GateRequest
) -> bool:
    """Whether copying the gates of a call is expected to cost less than a replay.

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
    taken = sum(map(len, columns.values()))
    rows = taken if "reset" in columns else taken + len(columns.get("candidate", ()))
    weights = rows * (input_size + hidden_size)
    step = 2 * batch * weights / (OPERATIONS_PER_SECOND * torch.get_num_threads())
    replayed = num_steps * (step + ELEMENT_REPLAY_COST * batch * rows)
    # In the background, weights are read once for many calls.
    replayed = (
        request.max_cost_ratio * replayed
        if request.max_cost_ratio < 1
        else replayed + WEIGHT_REPLAY_COST * weights
    )
    step = (
        STEP_COPY_COST + ELEMENT_COPY_COST * batch * taken + WEIGHT_COPY_COST * 3 * hidden_size**2
    )
    return replayed > CALL_COPY_COST + num_steps * step


def can_intercept(input: Tensor) -> bool:
    """Whether the gates of a call with this input can be copied without side effects.

    Not under a dispatch mode, which would see the copies, nor within a transform of torch.func.
    """
    return (
        input.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and kernel_supported()
    )


@cache
def kernel_supported() -> bool:
    """Whether gates copied from small layers are as expected. Tested once per process."""
    found = dispatcher.is_available() and all(
        _is_recognized(bias, grad, sizes)
        for bias in (True, False)
        for grad in (True, False)
        for sizes in ([2, 2, 2], [2, 1, 1])
    )
    if not found:
        logging.getLogger(__name__).debug(
            "torch %s makes other additions in a GRU than expected: gates are replayed, not "
            "harvested",
            torch.__version__,
        )
    return found


@torch.inference_mode(False)
def _is_recognized(bias: bool, grad: bool, sizes: list[int]) -> bool:
    """Whether a harvest gives the gates of a layer of two directions, with these batch sizes."""
    batch_sizes = torch.tensor(sizes, device="cpu")
    input, initial = _numbers(sum(sizes), 3), _numbers(2, sizes[0], 2)
    shapes = [(6, 3), (6, 2), *[(6,), (6,)] * bias] * 2
    weights = [_numbers(*shape) + index / 10 for index, shape in enumerate(shapes)]
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
        everything = dict.fromkeys(GATES, range(2))
        output, harvests = copy_kernel_gates(kernel, layout, [False, True], everything)
    except Exception:
        # Whatever it is, it is no harvest.
        return False
    steps = PackedLayout(batch_sizes, None)
    for d, found in enumerate(harvests or ()):
        states = output.reshape(-1, 2, 2)[:, d]
        previous = steps.previous(states, initial[d], reverse=d == 1)
        own = weights[d * len(weights) // 2 :][: len(weights) // 2]
        expected = cell.gates(cell.products(input, previous, *own))
        if not all(map(_close, found.gates.values(), expected)):
            return False
    return harvests is not None


def _numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that tell each other apart."""
    return torch.arange(1.0, 1 + math.prod(shape), device="cpu").sin().reshape(shape)


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.reshape(expected.shape), expected, atol=1e-6)
