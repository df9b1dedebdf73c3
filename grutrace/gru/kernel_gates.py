"""The kernel's own gates, harvested while it runs.

On a CPU the fused layer is a loop over PyTorch's own operations. Of each step the hidden product,
(B, 3 H), is made first, and reset and update are made in place of its first two thirds. The last
third is multiplied by reset, in place as well, and the input's part is added to it: the one
addition of a step that makes a new tensor, and the candidate is made in place of that. So whoever
hears this addition has all gates of the step: reset and update in front of its second summand, and
the candidate where its result was, until the next step.

Nothing that the kernel does is changed by that, be gradients recorded or not. How PyTorch writes
this loop is no interface of its: it is tried on small layers first, and what does not look as
expected is no harvest. The gates are replayed then, as everywhere else.

T steps, B sequences in a batch, I input size, H hidden size, D directions, L layers.

Memory for the gates that are taken of a call, and where in it those of each step go.

B sequences in a batch, H hidden size, T steps, N rows, U units that are taken.
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

#: How many units prove a call of which not all gates are computed.
CHECK_UNITS = 8

#: By the name of a gate, which units of it.
UnitsByGate: TypeAlias = Mapping[str, range]


class GateRequest(NamedTuple):
    """What somebody wants of the kernel's own gates.

    Attributes:
        columns: Which.
        share: What part of a replay's cost a harvest may cost at most.
    """

    columns: UnitsByGate
    max_cost_ratio: float = 1.0


NO_GATES = GateRequest(MappingProxyType({}))


class GateCopyPlan(NamedTuple):
    """What is taken of a layer to have some gates, and to prove them.

    Attributes:
        columns: Of each gate.
        proof: Units of which the states are compared with what the gates lead to.
    """

    columns: UnitsByGate
    check_units: range

    @classmethod
    def of(cls, gates: Sequence[str], units: Sequence[int]) -> GateCopyPlan | None:
        """Return what is taken for some gates of some units; None if these cannot be taken.

        Args:
            gates: Their names.
            units: Their numbers: evenly spaced, or they cannot.
        """
        request = range(units[0], units[-1] + 1, units[1] - units[0] if len(units) > 1 else 1)
        if list(request) != list(units):
            return None
        few = request[:: max(1, len(request) // CHECK_UNITS)][:CHECK_UNITS]
        check_units = request if {"update", "candidate"} <= set(gates) else few
        columns = {name: request for name in GATES if name in gates}
        return cls({"update": check_units, "candidate": check_units} | columns, check_units)


def merge_requests(requests: Sequence[GateRequest], hidden_size: int) -> GateRequest:
    """Return all that is wished for: of each gate the same columns, or else all units.

    Args:
        wishes: What several want of one layer.
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
    """How a call lies in memory.

    Attributes:
        rows: (T,) how many sequences have each time.
        padded: Whether these are all of them, each time.
        hidden_size: H
        dtype: Of the input.
    """

    rows: list[int]
    padded: bool
    hidden_size: int
    dtype: torch.dtype


class GateBuffer(NamedTuple):
    """Gates of which the same columns are taken, and which the kernel has beside each other.

    Attributes:
        names: Of the gates.
        room: (gates, T, B, U) or (gates, N, U), where they go.
        strides: By which they lie in the kernel's memory, (gates, b, U) at a time.
        offset: From where on.
    """

    names: tuple[str, ...]
    buffer: Tensor
    strides: tuple[int, int, int]
    offset: int


class GateBuffers:
    """Memory for some gates of one direction of a layer in one call.

    Args:
        layout: Of the call.
        columns: What is to be taken.

    Attributes:
        product: What is taken of the hidden product (b, 3 H), which holds reset and update.
        candidate: What is taken of the candidate (b, H).
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
        # Of NumPy's type, since rows are: then they need not be copied again.
        rows, dtype = self._layout.rows, numpy_type(self._layout.dtype)
        if not self._layout.padded:
            return torch.from_numpy(np.empty((gates, sum(rows), units), dtype))
        # The rows of a sequence lie one after another, as they are recorded.
        buffer = np.empty((gates, rows[0] if rows else 0, len(rows), units), dtype)
        return torch.from_numpy(buffer).transpose(1, 2)

    @property
    def gates(self) -> dict[str, Tensor]:
        """What is in it, by name, in the kernel's order: (T, B, U) or (N, U)."""
        parts = (*self.product, *self.candidate)
        return {
            name: gate for part in parts for name, gate in zip(part.names, part.buffer, strict=True)
        }

    def by_time(self, part: GateBuffer) -> Sequence[Tensor]:
        """Return where a part goes of each time, (gates, b, U)."""
        if self._layout.padded:
            return part.buffer.unbind(1)
        views: tuple[Tensor, ...] = torch.split(part.buffer, self._layout.rows, 1)
        return views


Result = TypeVar("Result")

#: Products and sums that one thread makes in a second, in matrices as large as a layer's. Where a
#: processor is much slower or faster, the dearer of two ways that are close may be taken.
#: docs/performance.md has the measurements that these and the following are fitted to.
OPERATIONS_PER_SECOND = 110e9

#: What follows the products in a replay, an element of a gate; and what it takes to read a weight,
#: once a call. Seconds.
ELEMENT_REPLAY_COST, WEIGHT_REPLAY_COST = 1.7e-9, 250e-12

#: What it costs to listen to a call instead of looking at it afterwards, to hear a step, and to
#: copy an element of a gate of it. Seconds.
CALL_COPY_COST, STEP_COPY_COST, ELEMENT_COPY_COST = 150e-6, 11e-6, 2.2e-9

#: What it costs besides that each step reads all recurrent weights, and whatever is done between
#: two steps comes back into a cache without it; a weight. Seconds.
WEIGHT_COPY_COST = 18e-12


class KernelGates(NamedTuple):
    """Gates of one direction of a layer in a call.

    Attributes:
        gates: By name, in the kernel's order, (T, B, U) or (N, U), in memory of their own.
        columns: By name, which units these are.
        dtype: In which the kernel computed them.
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
    """Make a kernel call, and take gates of each step as they are made.

    Args:
        kernel: Runs some layers, one direction after the other, or one step of a cell.
        layout: Of the call.
        directions: In the order in which they are run, whether each is the reverse one.
        columns: What is to be taken of each.

    Returns:
        What the kernel returned; and by direction its gates, or None if they were not where they
        should be.
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
            # What the sum has become by now is the candidate.
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
        # At once: the kernel's next step gets the memory of this one.
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
    """Return the parts of rooms: where each goes, step by step as they are made, and whence."""
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
    """Whether a harvest is expected to cost less than the replay of a call.

    A replay repeats the matrix products of the layer, for the units that are asked for. A harvest
    costs the same for each step, however large, and something for each element.

    Args:
        times: T
        batch: B, the mean over the steps of a packed batch.
        input_size: I, the mean over the layers of a stack.
        hidden_size: H
        asked: What is to be taken, and how much less it is to cost.
    """
    columns = request.columns
    taken = sum(map(len, columns.values()))
    rows = taken if "reset" in columns else taken + len(columns.get("candidate", ()))
    weights = rows * (input_size + hidden_size)
    step = 2 * batch * weights / (OPERATIONS_PER_SECOND * torch.get_num_threads())
    replayed = num_steps * (step + ELEMENT_REPLAY_COST * batch * rows)
    # In the background they are read once for many calls.
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
    """Whether a call with this input can be harvested, unseen by whatever surrounds it.

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
    """Whether harvests of small layers are what they should be. Tried once."""
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
