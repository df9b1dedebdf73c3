"""What a call may be surrounded by, and how a recorded one stays apart from it.

A model can be called where its tensors hold no values: while it is turned into a graph, on the meta
device, under vmap. Such a call cannot be recorded, and is left alone. Everywhere else a call's
values can be had, and what is computed from them must not show in the surroundings: not in a
counter of operations, not in a gradient, not in a graph that torch.compile makes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.nn import Parameter
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes

#: The dispatch modes that turn calls into graphs.
_GRAPH_MODES = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


@dataclass(frozen=True)
class SkippedCall:
    """A call that was not recorded.

    Attributes:
        reason: Why, and what to do instead.
    """

    reason: str


def unsupported_reason(values: Iterable[Any]) -> SkippedCall | None:
    """Return why a call with these arguments or results cannot be recorded; None if it can be."""
    if torch._C._is_tracing():
        return SkippedCall(
            "torch.jit.trace was tracing it: record the traced model's source instead"
        )
    if torch._C._len_torch_dispatch_stack() and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _GRAPH_MODES
    ):
        return _no_data("it was being turned into a graph")
    for value in _flatten(values):
        kind = type(value)
        if (
            (kind is Tensor or kind is Parameter)
            and not (value.is_meta or value.is_complex())
            and not is_wrapped(value)
        ):
            continue
        if not isinstance(value, Tensor):
            return _no_data(f"it was called with a {type(value).__name__}")
        batched, inner = _unwrap(value)
        if batched:
            return SkippedCall(
                "torch.vmap ran it on all samples at once: call it on a batch instead"
            )
        if inner.is_meta or type(inner).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return _no_data(f"it was called with a {type(inner).__name__} on {inner.device}")
        if torch._is_functional_tensor(inner):
            return _no_data("it was called within torch.func.functionalize")
        if inner.is_complex():
            return SkippedCall("it is complex: gates are traced of real layers only")
    return None


def plain(value: Tensor) -> Tensor:
    """Return the tensor that torch.func's transforms of gradients have wrapped."""
    return _unwrap(value)[1]


def is_wrapped(value: Tensor) -> bool:
    """Whether one of torch.func's transforms holds the values of a tensor."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped or torch._is_functional_tensor(value)


def is_checkpoint_recompute() -> bool:
    """Whether the present call repeats, for the backward pass, one that was made before."""
    return torch._C._current_graph_task_id() != -1 and _within(checkpoint.__file__)


@contextmanager
def isolated_context() -> Iterator[None]:
    """Compute something that nothing around the model's call gets to see.

    The kernels are those that the model uses: a GRU gives the same bits as in the model.
    """
    modes = torch._C._len_torch_dispatch_stack()
    levels = torch._C._functorch.peek_interpreter_stack() is not None
    # In this order: function modes hear of gradients being switched off and on, too.
    with torch._C.DisableTorchFunction(), torch.no_grad(), _set_fwd_grad_enabled(False):
        if not modes and not levels:
            yield
            return
        with ExitStack() as stack:
            if modes:
                stack.enter_context(_disable_current_modes())
            if levels:
                stack.enter_context(temporarily_clear_interpreter_stack())
            yield


def isolated_copy_context() -> AbstractContextManager[None]:
    """Copy and compare tensors, and nothing else, within `torch._C.DisableTorchFunction`.

    A tenth as dear as `isolated_context`, for a decoder comes here at every step: one guard of the
    dispatcher's, beneath autograd and forward-mode differentiation. Products can end in other
    digits there: those of a batch-first layer without biases do.
    """
    modes = torch._C._len_torch_dispatch_stack()
    levels = torch._C._functorch.peek_interpreter_stack() is not None
    return isolated_context() if modes or levels else _beneath_autograd()


_beneath_autograd: Any = torch._C._AutoDispatchBelowADInplaceOrView


def dynamo_loaded() -> bool:
    """Whether torch.compile may be at work. Importing it takes longer than importing torch."""
    return "torch._dynamo" in sys.modules


def disable_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have torch.compile call a function as it is, between two graphs."""
    reason = (
        "grutrace records this call, which splits the graph: do without fullgraph=True, or stop "
        "recording first"
    )
    named = "reason" in inspect.signature(torch.compiler.disable).parameters
    disable: Any = torch.compiler.disable
    disabled: Callable[..., Any] = disable(function, **({"reason": reason} if named else {}))
    return disabled


def _no_data(what: str) -> SkippedCall:
    return SkippedCall(
        f"{what}, where tensors hold no values (torch.export, torch.fx, meta device): "
        "run the model itself on real tensors to record it"
    )


def _flatten(values: Iterable[Any]) -> list[Any]:
    flat = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += _flatten(value)
        elif value is not None and not isinstance(value, (bool, int, float)):
            flat.append(value)
    return flat


def _unwrap(value: Tensor) -> tuple[bool, Tensor]:
    """Return whether vmap has batched a tensor, and what is inside all wrappers."""
    batched = False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        batched = batched or torch._C._functorch.is_batchedtensor(value)
        if torch._is_functional_tensor(value):
            break
        value = torch._C._functorch.get_unwrapped(value)
    return batched, value


def _within(file: str) -> bool:
    """Whether code of a file is running in this thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
