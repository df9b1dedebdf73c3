"""Hearing the additions of a call of PyTorch's own, in the thread that makes it.

PyTorch sends every operation through a dispatcher, layer by layer (its *keys*), until one computes
it. One of these layers, ``Fake``, was set aside for packages outside PyTorch. Here a function of
ours answers a single operation in it, the addition of two tensors; all others pass it by. A layer
can be put in force for one thread, and it is, while `observe_additions` runs something: nobody
else's operations come here, and nothing of them waits.

The layer lies beneath autograd and autocast, so an addition looks alike whatever they do, and
nothing that is done here gets into a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

#: Is told of an addition: its summands, and its result before anyone else has it.
AddCallback = Callable[[Tensor, Tensor, Tensor], None]

_KEY = "Fake"

#: Held for ever: PyTorch forgets what was registered with the object that did it.
_libraries: list[Any] = []
_lock = threading.Lock()


class _ThreadState(threading.local):
    listener: AddCallback | None = None


_here = _ThreadState()


def observe_additions(listener: AddCallback, run: Callable[[], Result]) -> Result:
    """Run something, and have a listener told of each addition of CPU tensors that it makes.

    Args:
        listener: Must not fail, and must not add.
        run: Calls operations of PyTorch, on CPU tensors only.
    """
    before, _here.listener = _here.listener, listener
    try:
        with torch._C._IncludeDispatchKeyGuard(torch._C._dispatch_key_parse(_KEY)):
            return run()
    finally:
        _here.listener = before


@cache
def is_available() -> bool:
    """Whether additions can be heard in this PyTorch. Finding out makes it so."""
    with _lock:
        return bool(_libraries) or _register()


def _register() -> bool:
    try:
        if torch._C._dispatch_has_backend_fallback(torch._C._dispatch_key_parse(_KEY)):
            return False
        library: Any = torch.library.Library
        everything, additions = (library(each, "IMPL", _KEY) for each in ("_", "aten"))
        everything.fallback(torch.library.fallthrough_kernel)
        additions.impl("add.Tensor", _make_impl(torch.ops.aten.add.Tensor))
    except Exception:
        # Whatever it is: this PyTorch has no such layer.
        return False
    _libraries.extend((everything, additions))
    return True


def _make_impl(operation: Any) -> Callable[..., Tensor]:
    add = operation.redispatch
    beneath = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def answer(one: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
        total: Tensor = add(beneath, one, other, alpha=alpha)
        listener = _here.listener
        if listener is not None:
            listener(one, other, total)
        return total

    return answer
