"""The kernel's own gates, harvested from what autograd keeps of a call.

On a CPU the fused layer is a loop over PyTorch's own operations. A step ends with
h = (h' - n) * z + n, and the derivatives of that need n, z and, further in, r: so autograd keeps
them. Where a call has a graph, the gates are read from its nodes. Where it has none, the kernel is
run with gradients on, from an initial state that asks for them, and each tensor is taken when
autograd is about to keep it; nothing is kept, so the graph costs no memory. The kernel does the
same operations either way, and gives the same bits.

How PyTorch builds this graph is no interface of its. So both ways are tried on small layers first,
and what does not look as expected is no harvest: the gates are replayed then, as everywhere else.

T steps, B sequences in a batch, I input size, H hidden size, D directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grutrace.gru import cell
from grutrace.gru.steps import PackedSteps, PaddedSteps, numpy_type

Result = TypeVar("Result")

#: Products and sums that one thread makes in a second, in matrices as large as a layer's. Where a
#: processor is much slower or faster, the dearer of two ways that are close may be taken.
#: docs/performance.md has the measurements that these and the following are fitted to.
OPERATIONS_PER_SECOND = 85e9

#: What follows the products in a replay, an element of a state. Seconds.
ELEMENT_REPLAYED = 6e-9

#: What it costs to watch a step being made, or to read one from a graph. Seconds.
STEP_WATCHED, STEP_READ = 65e-6, 5e-6

#: What it costs to make what autograd would keep and to copy it, or to join what it has kept; an
#: element of a state. Seconds.
ELEMENT_WATCHED, ELEMENT_READ = 14e-9, 8e-9

#: What autograd keeps of a step, in the order in which the kernel makes it. Each gate comes twice:
#: for its own derivative, and for that of the product that it is a factor of.
_KEPT = ("weight", "reset", "update", "reset", "product", "candidate", "update", "difference")
_PLACES = frozenset(map(_KEPT.index, cell.Gates._fields))


class Harvest(NamedTuple):
    """The gates of one direction of a layer in a call, in the kernel's order.

    Each as one tensor (T, B, H) or (N, H), which belongs to whoever has it; or as those that
    autograd keeps, one a time, (B, H), of a packed batch as many rows as sequences reach that time.
    """

    reset: Tensor | Sequence[Tensor]
    update: Tensor | Sequence[Tensor]
    candidate: Tensor | Sequence[Tensor]


def watch(
    kernel: Callable[..., Result],
    initial: Tensor,
    others: Sequence[Tensor],
    batch_sizes: Tensor | None,
    times: int,
    asking: Sequence[int] = (),
) -> tuple[Result, list[Harvest] | None]:
    """Run a kernel call, and take the gates of each step as they are made.

    Args:
        kernel: Runs one layer, both directions, or one step of a cell, from the initial state and
            the other tensors that it is given. Gradients are off around this.
        initial: (D, B, H), or (B, H) for a cell.
        others: The input and the weights.
        batch_sizes: (T,) of a packed input, else None.
        times: T
        asking: Which of those ask for gradients: the weights of the input, of each direction, or
            none. What their derivatives need is kept once a direction, before its steps.

    Returns:
        What the kernel returned, within a graph that nobody needs; and by direction its gates, or
        None if they were not where they should be.
    """
    directions = 1 if initial.dim() == 2 else len(initial)
    with torch.inference_mode(False):
        gates = [_Gates.of(others[0], initial, batch_sizes, times) for _ in range(directions)]
    targets = iter([each for d, made in enumerate(gates) for each in made.in_order(d == 1)])
    fits, last = True, times * len(_KEPT)
    before = -1 if asking else 0
    place = before

    def take(tensor: Tensor) -> None:
        nonlocal place, fits
        if place >= 0 and place % len(_KEPT) in _PLACES:
            target = next(targets, None)
            fits = fits and target is not None and target.shape == tensor.shape
            if fits and target is not None:
                # At once, so that the kernel's next step gets the memory of this one: what is kept
                # to the end is fresh memory in each step, which costs more than these copies.
                target.copy_(tensor)
        place += 1
        if place == last:
            place = before

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(take, _give):
        start = initial.detach().clone().requires_grad_()
        given = [_normal(each.detach()) for each in others]
        for place_of_weight in asking:
            given[place_of_weight].requires_grad_()
        result = kernel(start, *given)
    if not fits or place != before or next(targets, None) is not None:
        return result, None
    return result, [made.harvest for made in gates]


class _Gates(NamedTuple):
    """Memory for the gates of one direction, and views of it by time."""

    harvest: Harvest
    by_time: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, input: Tensor, initial: Tensor, batch_sizes: Tensor | None, times: int) -> _Gates:
        batch, size = initial.shape[-2:]
        dtype = numpy_type(input.dtype)
        if batch_sizes is None:
            rooms = [PaddedSteps(times, batch).room(size, dtype).values for _ in range(3)]
            views = [room.unbind() for room in rooms]
        else:
            count = int(batch_sizes.sum())
            rooms = [torch.from_numpy(np.empty((count, size), dtype)) for _ in range(3)]
            views = [torch.split(room, batch_sizes.tolist()) for room in rooms]
        return cls(Harvest(*rooms), list(zip(*views, strict=True)))

    def in_order(self, reverse: bool) -> list[Tensor]:
        """The views as the kernel makes them: of a reverse direction from the last time on."""
        by_time = self.by_time[::-1] if reverse else self.by_time
        return [view for views in by_time for view in views]


def _normal(tensor: Tensor) -> Tensor:
    # An inference tensor is never kept for a derivative.
    return tensor.clone() if tensor.is_inference() else tensor


def _give(_: object) -> Tensor:
    raise RuntimeError("nothing was kept: there is no backward pass through a harvested call")


def read(output: Tensor, directions: int) -> list[Harvest] | None:
    """Read the gates from the graph of a layer's output.

    Args:
        output: As the kernel returned it, or a transposition or a single sequence of that.
        directions: D

    Returns:
        By direction; None if there is no graph, or not the one of a layer.
    """
    node = output.grad_fn
    while node is not None and type(node).__name__.startswith(("Transpose", "Squeeze")):
        node = node.next_functions[0][0]
    if node is None:
        return None
    if type(node).__name__ == "AddBackward0":
        by_direction = [[node]]
    elif directions == 1:
        by_direction = [_children(node)]
    else:
        by_direction = [_children(each) for each in _children(node)]
    try:
        found = [Harvest(*zip(*map(_step, nodes), strict=True)) for nodes in by_direction]
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    return found if len(found) == directions else None


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions]


def _step(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Read reset, update and candidate of the step that ends with this addition."""
    (product, _), (candidate, _) = node.next_functions
    (_, (update, _)) = product.next_functions
    ((total, _),) = candidate.next_functions
    (_, (times_reset, _)) = total.next_functions
    (_, (reset, _)) = times_reset.next_functions
    names = (type(reset).__name__, type(update).__name__, type(candidate).__name__)
    if names != ("SigmoidBackward0", "SigmoidBackward0", "TanhBackward0"):
        raise TypeError(f"expected two sigmoids and a tanh, found {names}")
    return reset._saved_result, update._saved_result, candidate._saved_result


def pays(batch: float, input_size: int, hidden_size: int, *, graph: bool) -> bool:
    """Whether a harvest is expected to cost less than the replay of a call.

    A replay repeats the matrix products of the layer. A harvest costs the same for each step,
    however large, and something for each element.

    Args:
        batch: B, the mean over the steps of a packed batch.
        input_size: I
        hidden_size: H
        graph: Whether the call has a graph of its own already.
    """
    operations = 6 * batch * hidden_size * (input_size + hidden_size)
    elements = batch * hidden_size
    products = operations / (OPERATIONS_PER_SECOND * torch.get_num_threads())
    step, element = (STEP_READ, ELEMENT_READ) if graph else (STEP_WATCHED, ELEMENT_WATCHED)
    return products + ELEMENT_REPLAYED * elements > step + element * elements


def is_recorded(tensors: Iterable[Tensor]) -> bool:
    """Whether a call with these tensors gets a graph of its own."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def can_watch(input: Tensor, initial: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a call may be run with gradients on for its harvest, and it is known how that looks.

    Not where somebody else could see it: under a dispatch mode, a transform of torch.func, anomaly
    detection; nor under autocast, which casts weights that ask for gradients in another way.
    """
    return (
        not is_recorded((initial, *weights))
        and not input.requires_grad
        and _undisturbed(input)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_anomaly_enabled()
        and is_recognized()
    )


def can_read(output: Tensor) -> bool:
    """Whether a call has a graph of its own, and it is known how that looks."""
    return output.grad_fn is not None and _undisturbed(output) and is_recognized()


def _undisturbed(tensor: Tensor) -> bool:
    # What others do to kept tensors (moving them to a disk, say) is done again at each look.
    hooks: Any = torch._C._autograd
    return (
        tensor.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and hooks._saved_tensors_hooks_is_enabled()
        and hooks._top_saved_tensors_default_hooks(False) is None
    )


@cache
def is_recognized() -> bool:
    """Whether harvests of small layers are what they should be. Tried once."""
    found = all(
        _is_recognized(bias, sizes) for bias in (True, False) for sizes in ([2, 2, 2], [2, 1, 1])
    )
    if not found:
        logging.getLogger(__name__).debug(
            "torch %s keeps other things of a GRU than expected: gates are replayed, not harvested",
            torch.__version__,
        )
    return found


@torch.inference_mode(False)
def _is_recognized(bias: bool, sizes: list[int]) -> bool:
    """Whether both ways give the gates of a layer of two directions, with these batch sizes."""
    batch_sizes = torch.tensor(sizes, device="cpu")
    input, initial = _numbers(sum(sizes), 3), _numbers(2, sizes[0], 2)
    shapes = [(6, 3), (6, 2), *[(6,), (6,)] * bias] * 2
    weights = [_numbers(*shape) + place / 10 for place, shape in enumerate(shapes)]

    def kernel(initial: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        options = (bias, 1, 0.0, False, True)
        if sizes[-1] < sizes[0]:
            return torch.gru(input, batch_sizes, initial, weights, *options)
        padded = input.reshape(len(sizes), sizes[0], 3)
        return torch.gru(padded, initial, weights, *options, batch_first=False)

    def explains(harvests: list[Harvest] | None, output: Tensor) -> bool:
        steps = PackedSteps(batch_sizes, None)
        for d, found in enumerate(harvests or ()):
            states = output.reshape(-1, 2, 2)[:, d]
            previous = steps.previous(states, initial[d], reverse=d == 1)
            own = weights[d * len(weights) // 2 :][: len(weights) // 2]
            expected = cell.gates(cell.products(input, previous, *own))
            if not all(map(_close, found, expected)):
                return False
        return harvests is not None

    try:
        packed = batch_sizes if sizes[-1] < sizes[0] else None
        (output, _), watched = watch(kernel, initial, (input,), packed, len(sizes))
        with torch.enable_grad():
            graph = read(kernel(initial.clone().requires_grad_())[0], 2)
        return explains(watched, output.detach()) and explains(graph, output.detach())
    except Exception:
        # Whatever it is, it is no harvest.
        return False


def _numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that tell each other apart."""
    return torch.arange(1.0, 1 + math.prod(shape), device="cpu").sin().reshape(shape)


def _close(found: Tensor | Sequence[Tensor], expected: Tensor) -> bool:
    joined = found if isinstance(found, Tensor) else torch.cat(tuple(found))
    return torch.allclose(joined.reshape(expected.shape), expected, atol=1e-6)
