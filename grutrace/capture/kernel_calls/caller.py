"""Find the module that called a GRU kernel, from the Python frames on the call stack.

The kernel's arguments do not name the module. Most calls come from the ``forward`` of nn.GRU or
nn.GRUCell, whose frame has the module as ``self``. Without such a frame (TorchScript, a compiled
graph), the module is found from the weights, which are its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from grutrace.capture.kernel_calls.observation import GRUModule, first_weight
from grutrace.capture.kernel_calls.registration import GRUKernel


class KernelCaller(NamedTuple):
    """The caller of a kernel.

    Attributes:
        module: The GRU whose forward makes the call; None if no module makes it.
        frame: The frame of the function that called the kernel.
        module_frame: The frame in which the module is the first argument; None without one.
    """

    module: GRUModule | None
    frame: FrameType
    module_frame: FrameType | None


def find_caller(
    frame: FrameType,
    kernel: GRUKernel,
    arguments: tuple[Any, ...],
    modules: Callable[[], Iterable[nn.Module]],
) -> KernelCaller:
    """Find the caller of a kernel.

    Args:
        frame: The frame that called the kernel.
        kernel: The kernel.
        arguments: Its positional arguments.
        modules: Returns the modules that may be found from their weights.
    """
    owner = method_owner(frame)
    if isinstance(owner, (nn.GRU, nn.GRUCell)):
        return KernelCaller(owner, frame, frame)
    weight = kernel.weights(arguments)[0]
    for module in modules():
        if weight is first_weight(module):
            return KernelCaller(module, frame, _frame_of(frame, module))  # type: ignore[arg-type]
    outer: FrameType | None = frame.f_back
    while outer is not None:
        owner = method_owner(outer)
        if isinstance(owner, (nn.GRU, nn.GRUCell)):
            return KernelCaller(owner, frame, outer)
        outer = outer.f_back
    return KernelCaller(None, frame, None)


def _frame_of(frame: FrameType, module: nn.Module) -> FrameType | None:
    """Return the innermost frame that runs a method of a module; None without one."""
    outer: FrameType | None = frame
    while outer is not None and method_owner(outer) is not module:
        outer = outer.f_back
    return outer


def is_called_within(model: nn.Module, frame: FrameType) -> bool:
    """Whether a method of one of the model's modules is on the call stack of a frame."""
    modules = set(map(id, model.modules()))
    outer: FrameType | None = frame
    while outer is not None:
        if id(method_owner(outer)) in modules:
            return True
        outer = outer.f_back
    return False


def method_owner(frame: FrameType) -> Any:
    """Return the object whose method a frame runs; None if it runs no method."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    owner = frame.f_locals.get(code.co_varnames[0])
    if code.co_varnames[0] == "self" or owner is None:
        return owner
    # The argument has another name than self: check that its class has the method.
    methods = (vars(kind).get(code.co_name) for kind in type(owner).__mro__)
    return owner if any(getattr(method, "__code__", None) is code for method in methods) else None


def find_sorted_indices(caller: KernelCaller, batch_sizes: Tensor) -> Tensor | None:
    """Return the user's batch index of each of the kernel's sequences; None if they are equal.

    The kernel's arguments do not contain these indices. They are local variables of a forward with
    packed input: in a PackedSequence with the same batch sizes object or, in nn.GRU's own forward,
    under the name ``sorted_indices``.

    Args:
        caller: The caller of the kernel.
        batch_sizes: The batch sizes among the kernel's arguments.
    """
    frame: FrameType | None = caller.frame
    while frame is not None:
        variables = frame.f_locals
        if variables.get("batch_sizes") is batch_sizes and "sorted_indices" in variables:
            indices = variables["sorted_indices"]
            return indices if isinstance(indices, Tensor) else None
        for value in tuple(variables.values()):
            if isinstance(value, PackedSequence) and value.batch_sizes is batch_sizes:
                return value.sorted_indices
        if frame is caller.module_frame:
            break
        frame = frame.f_back
    return None
