"""Graphs of torch.compile that contain a GRU kernel, whose calls cannot be observed.

torch.compile does not compile code that calls nn.GRU. It does compile nn.GRUCell, and the compiled
graph no longer calls the cell's kernel. While recording, compiled code can run as the original
Python code (``torch.compiler.set_stance("force_eager")``). This affects the whole process.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from types import CodeType
from typing import Any

import torch

from grutrace.capture.kernel_calls.torch_context import dynamo_loaded
from grutrace.errors import UnsupportedError


def any_with_gru_kernel() -> bool:
    """Whether torch.compile has made a graph that contains a GRU kernel, or may contain one."""
    if not dynamo_loaded():
        return False
    try:
        from torch._dynamo import convert_frame

        codes = [reference() for reference in tuple(convert_frame.input_codes.seen)]
        return any(_has_gru_kernel(code) for code in codes if code is not None)
    except (ImportError, AttributeError):
        # Other PyTorch versions store this in another place: any graph may contain one.
        return True


#: By the identity of a compiled code object, as long as it lives: whether it contains a GRU kernel.
#: Not by the code that was compiled, which after torch.compiler.reset() has other graphs.
_known: dict[int, tuple[weakref.ref[CodeType], bool]] = {}


def _has_gru_kernel(code: CodeType) -> bool:
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return any(_contains_gru_kernel(entry) for entry in entries)


def _contains_gru_kernel(entry: Any) -> bool:
    """Whether the compiled code of a cache entry contains a GRU kernel."""
    compiled = entry.code
    known = _known.get(id(compiled))
    if known is not None and known[0]() is compiled:
        return known[1]
    # The guards name every function in the graph. Before PyTorch 2.5 they cannot be read, and
    # the graph may contain one.
    contains = "gru" in str(getattr(entry, "guard_manager", "gru")).lower()
    key = id(compiled)
    _known[key] = weakref.ref(compiled, partial(_forget, key)), contains
    return contains


def _forget(key: int, _: object) -> None:
    known = _known.get(key)
    # Another code object may have taken the address.
    if known is not None and known[0]() is None:
        del _known[key]


def can_run_eagerly() -> bool:
    """Whether this PyTorch can run compiled code as Python code. From 2.6 on."""
    return hasattr(torch.compiler, "set_stance")


class EagerCode:
    """Runs compiled code as the original Python code between `start` and `stop`."""

    def __init__(self) -> None:
        self._is_active = False

    def start(self) -> None:
        """Run compiled code as Python code from now on, in the whole process.

        Raises:
            UnsupportedError: PyTorch is older than 2.6, which has no stance.
        """
        if not can_run_eagerly():
            raise UnsupportedError(
                "running compiled code as Python code (compiled='eager') needs PyTorch 2.6 or "
                f"newer; found {torch.__version__}. Call the model itself instead of the compiled "
                "one"
            )
        if not self._is_active:
            self._is_active = True
            _stance.acquire()

    def stop(self) -> None:
        """Run compiled code again, unless another tracer prevents it. Stopping twice is safe."""
        if self._is_active:
            self._is_active = False
            _stance.release()


class _Stance:
    """Sets PyTorch's stance for the first user and restores it after the last."""

    def __init__(self) -> None:
        self._users = 0
        self._context: Any = None
        self._lock = threading.Lock()

    def acquire(self) -> None:
        with self._lock:
            if not self._users:
                set_stance: Any = torch.compiler.set_stance
                self._context = set_stance("force_eager")
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                # The context manager's exit restores the previous stance.
                self._context.__exit__(None, None, None)


_stance = _Stance()
