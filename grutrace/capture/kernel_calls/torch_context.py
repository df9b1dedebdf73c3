"""The context of a model's call (graph capture, transforms, autograd) and isolation from it.

A model can be called where its tensors hold no data: while it is exported to a graph, on the meta
device, under vmap. Such a call is skipped. In every other context the data is available, but the
computations of a recording must have no effect on the context: on operation counters, gradients or
compiled graphs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import checkpoint

from grutrace.torch_internals import (
    count_dispatch_modes,
    find,
    innermost_transform,
    without_torch_functions,
)

_clear_transforms = find("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
_is_functional_tensor = find("torch._is_functional_tensor")
_is_transformed_tensor = find("torch._C._functorch.is_functorch_wrapped_tensor")
_is_batched_tensor = find("torch._C._functorch.is_batchedtensor")
_get_unwrapped = find("torch._C._functorch.get_unwrapped")
_set_forward_ad_enabled = find("torch.autograd.forward_ad._set_fwd_grad_enabled")
_disable_current_modes = find("torch.utils._python_dispatch._disable_current_modes")
_backward_pass_id = find("torch._C._current_graph_task_id")
_is_tracing = find("torch._C._is_tracing", find("torch.jit.is_tracing"))

#: Dispatch modes that capture calls in a graph.
_GRAPH_MODES = tuple(
    getattr(find("torch._C._TorchDispatchModeKey", None), name, None)
    for name in ("FAKE", "PROXY", "FUNCTIONAL")
)

#: Return the active dispatch mode of a key. Without it, graphs are known by their FakeTensors.
_get_graph_mode = find("torch._C._get_dispatch_mode", lambda _: None)


@dataclass(frozen=True)
class SkippedCall:
    """A call that was not recorded.

    Attributes:
        reason: Why it was not recorded, and what to do instead.
    """

    reason: str


def unsupported_reason(values: Iterable[Any]) -> SkippedCall | None:
    """Return why a call with these tensors cannot be recorded; None if it can be recorded."""
    if _is_tracing():
        return SkippedCall("torch.jit.trace was tracing it: record the original model instead")
    if count_dispatch_modes() and any(_get_graph_mode(mode) is not None for mode in _GRAPH_MODES):
        return _no_data("it was being captured in a graph")
    # First the common case, because this runs in every call.
    for value in _flatten([value for value in values if not _is_ordinary(value)]):
        if not isinstance(value, Tensor):
            return _no_data(f"it was called with a {type(value).__name__}")
        batched, inner = _unwrap(value)
        if batched:
            return SkippedCall(
                "torch.vmap ran it on all samples at once: call it with a batch instead"
            )
        if inner.is_meta or type(inner).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return _no_data(f"it was called with a {type(inner).__name__} on {inner.device}")
        if _is_functional_tensor(inner):
            return _no_data("it was called within torch.func.functionalize")
        if inner.is_complex():
            return SkippedCall("it is complex: only real layers can be traced")
    return None


def _is_ordinary(value: Any) -> bool:
    """Whether a value is a real tensor with data, without a subclass or wrapper."""
    return (
        (type(value) is Tensor or type(value) is Parameter)
        and not (value.is_meta or value.is_complex())
        and not is_wrapped(value)
    )


def unwrap_functorch(value: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of torch.func's gradient transforms."""
    return _unwrap(value)[1]


def is_wrapped(value: Tensor) -> bool:
    """Whether a transform of torch.func wraps a tensor."""
    wrapped: bool = _is_transformed_tensor(value)
    return wrapped or _is_functional_tensor(value)


def is_checkpoint_recompute() -> bool:
    """Whether activation checkpointing repeats an earlier call for the backward pass."""
    return _backward_pass_id() != -1 and _is_called_from(checkpoint.__file__)


def is_checkpoint_forward() -> bool:
    """Whether activation checkpointing runs this call."""
    return _is_called_from(checkpoint.__file__)


class Checkpoints(NamedTuple):
    """The activation checkpoints around a call, the innermost first.

    Each is the object that PyTorch keeps from the forward pass to the backward pass: the node of a
    reentrant checkpoint; of another one the frame, whose ``recompute_fn`` repeats the call.

    Attributes:
        forward: Those that run the call in their forward pass.
        repeating: Those that repeat it for the backward pass.
    """

    forward: list[Any]
    repeating: list[Any]


def active_checkpoints() -> Checkpoints:
    """Return the activation checkpoints around this call."""
    forward: list[Any] = []
    repeating: list[Any] = []
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            name, values = frame.f_code.co_name, frame.f_locals
            if name in ("forward", "backward") and "ctx" in values:
                (forward if name == "forward" else repeating).append(values["ctx"])
            elif hasattr(values.get("frame"), "recompute_fn"):
                repeating.append(values["frame"])
            else:
                # Its generator is suspended while the function runs.
                suspended = getattr(values.get("gen"), "gi_frame", None)
                made = None if suspended is None else suspended.f_locals.get("new_frame")
                if hasattr(made, "recompute_fn"):
                    forward.append(made)
        frame = frame.f_back  # type: ignore[assignment]
    return Checkpoints(forward, repeating)


def is_transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return innermost_transform() is not None


@contextmanager
def isolated_context() -> Iterator[None]:
    """Run tensor code without autograd, function modes, dispatch modes and functorch levels.

    The same kernels run as in the model, so a GRU gives the same bits.
    """
    modes = count_dispatch_modes()
    levels = innermost_transform() is not None
    # In this order, because function modes observe calls that switch gradients off and on.
    with without_torch_functions(), torch.no_grad(), _set_forward_ad_enabled(False):
        if not modes and not levels:
            yield
            return
        with ExitStack() as stack:
            if modes:
                stack.enter_context(_disable_current_modes())
            if levels:
                stack.enter_context(_clear_transforms())
            yield


def isolated_copy_context() -> AbstractContextManager[None]:
    """Return a cheap context for copying and comparing tensors only.

    To be used within `without_torch_functions`. It costs a tenth of `isolated_context`, which
    matters for a decoder that calls its layer at every step: a single dispatcher guard, below
    autograd and forward-mode differentiation. Matrix products can differ in the last digits there;
    those of a batch-first layer without biases do.
    """
    modes = count_dispatch_modes()
    levels = innermost_transform() is not None
    return isolated_context() if modes or levels else _beneath_autograd()


_beneath_autograd = find("torch._C._AutoDispatchBelowADInplaceOrView", isolated_context)


def dynamo_loaded() -> bool:
    """Whether torch.compile is loaded. Importing it takes longer than importing torch."""
    return "torch._dynamo" in sys.modules


def disable_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make torch.compile run a function as Python code, between two graphs."""
    reason = (
        "grutrace records this call, which breaks the graph: remove fullgraph=True, or stop "
        "recording first"
    )
    disable: Any = torch.compiler.disable
    # Older versions of PyTorch take no reason.
    takes_reason = "reason" in inspect.signature(disable).parameters
    disabled: Callable[..., Any] = disable(function, **({"reason": reason} if takes_reason else {}))
    return disabled


def _no_data(event: str) -> SkippedCall:
    return SkippedCall(
        f"{event}, where tensors hold no data (torch.export, torch.fx, meta device): "
        "call the model itself with real tensors to record it"
    )


def _flatten(values: Iterable[Any]) -> list[Any]:
    """Return the values in nested lists, without None and numbers."""
    flat = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += _flatten(value)
        elif value is not None and not isinstance(value, (bool, int, float)):
            flat.append(value)
    return flat


def _unwrap(value: Tensor) -> tuple[bool, Tensor]:
    """Return whether vmap has batched a tensor, and the tensor inside all wrappers."""
    batched = False
    while _is_transformed_tensor(value):
        batched = batched or _is_batched_tensor(value)
        if _is_functional_tensor(value):
            break
        value = _get_unwrapped(value)
    return batched, value


def _is_called_from(file: str) -> bool:
    """Whether code of a file is on the call stack of this thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
