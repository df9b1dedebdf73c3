"""Observe the additions that a PyTorch call makes, in the thread that makes it.

PyTorch's dispatcher passes every operation through layers, its *dispatch keys*, until a kernel
computes it. One key, ``Fake``, is reserved for packages outside PyTorch. Here it gets a function
for a single operation, the addition of two tensors; all other operations fall through. A key can be
enabled for one thread, and `observe_additions` enables it only while it runs a function. Operations
of other threads do not reach it.

The key is below autograd and autocast. So additions have the same form with and without them, and
nothing that the function does enters a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from grutrace.torch_internals import DispatchKey

Result = TypeVar("Result")

#: Called with the operands and the result of an addition, before the caller gets the result.
AddCallback = Callable[[Tensor, Tensor, Tensor], None]

_KEY = "Fake"

#: Never released, because PyTorch removes the registrations of a library that is freed.
_libraries: list[Any] = []
_lock = threading.Lock()


class _ThreadState(threading.local):
    """The listener of the current thread."""

    listener: AddCallback | None = None


_local = _ThreadState()


def observe_additions(listener: AddCallback, run: Callable[[], Result]) -> Result:
    """Run a function, and call a listener with each addition of CPU tensors that it makes.

    Args:
        listener: The callback. It must not raise an error, and must not add tensors.
        run: The function. It uses CPU tensors only.
    """
    key = _dispatch_key()
    # An interruption can leave a listener behind, which nothing calls any more.
    is_nested = torch._C._dispatch_tls_is_dispatch_key_included(key)
    previous = _local.listener if is_nested else None
    try:
        _local.listener = listener
        with torch._C._IncludeDispatchKeyGuard(key):
            return run()
    finally:
        _local.listener = previous


@cache
def _dispatch_key() -> Any:
    return torch._C._dispatch_key_parse(_KEY)


@cache
def is_available() -> bool:
    """Return whether this PyTorch can observe additions. Registers the kernel on first use."""
    with _lock:
        return bool(_libraries) or _register()


def _register() -> bool:
    try:
        if torch._C._dispatch_has_backend_fallback(_dispatch_key()):
            return False
        library: Any = torch.library.Library
        fallback, additions = (library(namespace, "IMPL", _KEY) for namespace in ("_", "aten"))
        if hasattr(fallback, "fallback"):
            fallback.fallback(torch.library.fallthrough_kernel)
        else:
            # Before PyTorch 2.5.
            fallback.m.fallback_fallthrough(_KEY)
        additions.impl("add.Tensor", _make_impl(torch.ops.aten.add.Tensor))
    except Exception:
        # Any error means that this PyTorch version lacks the key.
        return False
    _libraries.extend((fallback, additions))
    return True


def _make_impl(operation: Any) -> Callable[..., Tensor]:
    add = operation.redispatch
    cpu_keys = torch._C.DispatchKeySet(DispatchKey.CPU)

    def add_and_notify(augend: Tensor, addend: Tensor, *, alpha: float = 1) -> Tensor:
        total: Tensor = add(cpu_keys, augend, addend, alpha=alpha)
        listener = _local.listener
        if listener is not None:
            listener(augend, addend, total)
        return total

    return add_and_notify
