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
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from grutrace.gru import cell, overhear
from grutrace.gru.cell import Gates
from grutrace.gru.steps import PackedSteps, numpy_type

Result = TypeVar("Result")

#: Products and sums that one thread makes in a second, in matrices as large as a layer's. Where a
#: processor is much slower or faster, the dearer of two ways that are close may be taken.
#: docs/performance.md has the measurements that these and the following are fitted to.
OPERATIONS_PER_SECOND = 85e9

#: What follows the products in a replay, an element of a state. Seconds.
ELEMENT_REPLAYED = 6e-9

#: What it costs to listen to a call, and to hear a step of it. Seconds.
CALL_HEARD, STEP_HEARD = 20e-6, 8e-6

#: What it costs to copy what was heard, an element of a state. Seconds.
ELEMENT_HEARD = 2e-9


class Harvest(NamedTuple):
    """The gates of one direction of a layer in a call.

    Attributes:
        gates: In the kernel's order, (T, B, H) or (N, H), in memory of their own.
        dtype: In which the kernel computed them.
    """

    gates: Gates
    dtype: torch.dtype


def harvest(
    kernel: Callable[[], Result],
    sizes: tuple[int, int, int],
    batch_sizes: Tensor | None,
    dtype: torch.dtype,
    directions: list[bool],
) -> tuple[Result, list[Harvest] | None]:
    """Make a kernel call, and take the gates of each step as they are made.

    Args:
        kernel: Runs some layers, one direction after the other, or one step of a cell.
        sizes: T, B, H
        batch_sizes: (T,) of a packed input, else None.
        dtype: Of the input.
        directions: In the order in which they are run, whether each is the reverse one.

    Returns:
        What the kernel returned; and by direction its gates, or None if they were not where they
        should be.
    """
    with torch.inference_mode(False):
        rooms = [_Room.of(sizes, batch_sizes, dtype) for _ in directions]
    times = [
        time
        for room, reverse in zip(rooms, directions, strict=True)
        for time in (reversed(room.by_time) if reverse else room.by_time)
    ]
    size = sizes[-1]
    layout, offset = (3 * size, 1), 2 * size
    made: Tensor | None = None
    place, fits = 0, True

    def hear(_: Tensor, product: Tensor, total: Tensor) -> None:
        nonlocal made, place, fits
        if made is not None:
            times[place - 1].candidate.copy_(made)
        if place == len(times) or not fits:
            made, fits = None, False
            return
        target = times[place].reset_and_update
        if (
            product.stride() != layout
            or product.storage_offset() != offset
            or product.shape != target.shape[1:]
        ):
            made, fits = None, False
            return
        # At once: the kernel's next step gets the memory of this one.
        target.copy_(product.as_strided(target.shape, (size, *layout), 0))
        made = total
        place += 1

    result = overhear.heard(hear, kernel)
    if made is None or not fits or place < len(times):
        return result, None
    with torch.no_grad():
        times[-1].candidate.copy_(made)
    return result, [Harvest(room.gates, made.dtype) for room in rooms]


class _Time(NamedTuple):
    """Where the gates of one time go, (2, b, H) and (b, H)."""

    reset_and_update: Tensor
    candidate: Tensor


class _Room(NamedTuple):
    """Memory for the gates of one direction, and views of it by time."""

    gates: Gates
    by_time: list[_Time]

    @classmethod
    def of(
        cls, sizes: tuple[int, int, int], batch_sizes: Tensor | None, dtype: torch.dtype
    ) -> _Room:
        times, batch, size = sizes
        # Of NumPy's type, since rows are: then they need not be copied again. Large memory of
        # NumPy's comes in huge pages.
        kept = numpy_type(dtype)
        if batch_sizes is None:
            # The rows of a sequence lie one after another, as they are recorded.
            room = torch.from_numpy(np.empty((3, batch, times, size), kept)).transpose(1, 2)
            both, candidate = room[:2].unbind(1), room[2].unbind()
        else:
            rows = batch_sizes.tolist()
            room = torch.from_numpy(np.empty((3, sum(rows), size), kept))
            both, candidate = torch.split(room[:2], rows, 1), torch.split(room[2], rows)
        return cls(Gates(*room), list(map(_Time, both, candidate)))


def pays(times: int, batch: float, input_size: float, hidden_size: int) -> bool:
    """Whether a harvest is expected to cost less than the replay of a call.

    A replay repeats the matrix products of the layer. A harvest costs the same for each step,
    however large, and something for each element.

    Args:
        times: T
        batch: B, the mean over the steps of a packed batch.
        input_size: I, the mean over the layers of a stack.
        hidden_size: H
    """
    operations = 6 * batch * hidden_size * (input_size + hidden_size)
    elements = batch * hidden_size
    products = operations / (OPERATIONS_PER_SECOND * torch.get_num_threads())
    replayed = products + ELEMENT_REPLAYED * elements
    return times * (replayed - STEP_HEARD - ELEMENT_HEARD * elements) > CALL_HEARD


def is_undisturbed(input: Tensor) -> bool:
    """Whether a call with this input can be harvested, unseen by whatever surrounds it.

    Not under a dispatch mode, which would see the copies, nor within a transform of torch.func.
    """
    return (
        input.device.type == "cpu"
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and is_recognized()
    )


@cache
def is_recognized() -> bool:
    """Whether harvests of small layers are what they should be. Tried once."""
    found = overhear.is_possible() and all(
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
    weights = [_numbers(*shape) + place / 10 for place, shape in enumerate(shapes)]
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
        output, harvests = harvest(
            kernel, (len(sizes), sizes[0], 2), packed, input.dtype, [False, True]
        )
    except Exception:
        # Whatever it is, it is no harvest.
        return False
    steps = PackedSteps(batch_sizes, None)
    for d, found in enumerate(harvests or ()):
        states = output.reshape(-1, 2, 2)[:, d]
        previous = steps.previous(states, initial[d], reverse=d == 1)
        own = weights[d * len(weights) // 2 :][: len(weights) // 2]
        expected = cell.gates(cell.products(input, previous, *own))
        if not all(map(_close, found.gates, expected)):
            return False
    return harvests is not None


def _numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that tell each other apart."""
    return torch.arange(1.0, 1 + math.prod(shape), device="cpu").sin().reshape(shape)


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.reshape(expected.shape), expected, atol=1e-6)
