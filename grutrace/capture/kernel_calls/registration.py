"""Replace PyTorch's GRU kernels with kernels of grutrace, and restore them.

PyTorch looks up the kernel of an operation by *dispatch key*: there is one key for each device type
and each feature, such as autograd. The GRU operations have a single composite kernel for all keys,
made of other operations. A kernel registered for a specific key takes precedence over it.

Two problems, both seen with PyTorch 2.13, make this less simple:

- A kernel registered for ``CPU`` alone would hide the composite kernel from autograd, and no
  gradient would flow. So kernels are registered for the autograd key of each device and for the
  device's own key, which inference_mode uses.
- Removing a kernel frees it. Another thread may have looked it up and be waiting for the GIL to
  enter it; the process then ends with a segmentation fault. So a removed kernel is kept until no
  thread can be about to enter it. PyTorch versions without a handle for this keep the kernel until
  no other thread runs Python.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._C import DispatchKey

#: The operations, and the index of the weights among their arguments.
OPERATIONS = {"gru.input": 2, "gru.data": 3, "gru_cell": 2}

#: How long a removed kernel is kept. A thread waits for the GIL for milliseconds only. Seconds.
REMOVAL_DELAY_SECONDS = 10.0

#: The part of torch.compile that is available without loading the rest.
_frames: Any = torch._C._dynamo.eval_frame

#: Keys that are always registered. Meta calls hold no data, but a warning names them.
_ALWAYS = ("CPU", "AutogradCPU", "AutogradMeta")


class GRUKernel:
    """PyTorch's own kernel of one operation.

    Attributes:
        name: ``gru.input``, ``gru.data`` or ``gru_cell``.
        is_cell: Whether it runs one step of a cell.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_cell = name, name == "gru_cell"
        packet, _, overload = name.partition(".")
        self._run: Any = getattr(getattr(torch.ops.aten, packet), overload or "default")._op_dk
        self._weights = OPERATIONS[name]
        #: Index of the initial state among its arguments.
        self.state_index = self._weights - 1

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel. Function modes of the user see the same calls as without grutrace."""
        if torch._C._len_torch_function_stack():
            with torch._C._EnableTorchFunction():
                return self._run(DispatchKey.CompositeImplicitAutograd, *arguments)
        return self._run(DispatchKey.CompositeImplicitAutograd, *arguments)

    def options(self, arguments: tuple[Any, ...]) -> tuple[int, int, float, bool, bool]:
        """Return has_biases, num_layers, dropout, train and bidirectional from its arguments."""
        found: Any = arguments[self._weights + 1 : self._weights + 6]
        return tuple(found)

    def weights(self, arguments: tuple[Any, ...]) -> Any:
        """Return the weights from its arguments: a flat list, as in nn.GRU."""
        if self.is_cell:
            return [each for each in arguments[self._weights :] if each is not None]
        return arguments[self._weights]

    def with_weights(self, arguments: tuple[Any, ...], weights: Any) -> tuple[Any, ...]:
        """Return the same arguments with other weights, given as a flat list."""
        place = self._weights
        if self.is_cell:
            return (*arguments[:place], *weights)
        return (*arguments[:place], weights, *arguments[place + 1 :])


#: Function called instead of the kernel, with the original kernel and the arguments.
Answer: TypeAlias = Callable[[GRUKernel, tuple[Any, ...]], Any]


class _Removed(NamedTuple):
    when: float
    kernels: list[Any]


class KernelRegistration:
    """Overrides the kernels of the GRU operations while it is acquired.

    Args:
        answer: Called instead of the kernel, with PyTorch's kernel and the arguments of the call.
    """

    def __init__(self, answer: Answer) -> None:
        self._dispatch = answer
        self._users = 0
        self._libraries: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._removed: deque[_Removed] = deque()
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # There is none on Windows.
            os.register_at_fork(after_in_child=self._reset_lock_after_fork)

    def _reset_lock_after_fork(self) -> None:
        # A thread of the parent process may hold the lock.
        self._lock = threading.RLock()

    @property
    def is_registered(self) -> bool:
        """Whether the kernels are overridden."""
        return bool(self._libraries)

    def acquire(self, devices: Iterable[str]) -> None:
        """Override the kernels until `release` has been called as often as `acquire`.

        Args:
            devices: Device types on which calls are expected.
        """
        keys = set(_ALWAYS)
        for device in devices:
            if device != "meta":
                key = torch._C._dispatch_key_for_device(device)
                keys |= {key, f"Autograd{key}"}
        with self._lock:
            self._users += 1
            try:
                self._drop_expired()
                for key in sorted(keys - set(self._libraries)):
                    self._register(key)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Restore the kernels, unless another user has acquired them."""
        with self._lock:
            self._users -= 1
            if self._users or not self._libraries:
                return
            if not self._handles and len(sys._current_frames()) > 1:
                return
            for library in self._libraries.values():
                library._destroy()
            self._libraries.clear()
            self._removed.append(_Removed(time.monotonic(), self._handles))
            self._handles = []

    def _register(self, key: str) -> None:
        make: Any = torch.library.Library
        library = make("aten", "IMPL", key)
        for name in OPERATIONS:
            library.impl(name, self._kernel(GRUKernel(name)))
            handle = _kernel_handle(f"aten::{name}", key)
            if handle is not None:
                self._handles.append(handle)
        self._libraries[key] = library

    def _kernel(self, kernel: GRUKernel) -> Callable[..., Any]:
        answer = self._dispatch

        def call(*arguments: Any) -> Any:
            # torch.compile would compile every Python function that runs within a compiled one.
            before = _frames.set_eval_frame(None)
            try:
                return answer(kernel, arguments)
            finally:
                _frames.set_eval_frame(before)

        _exclude_from_compiler(call)
        return call

    def _drop_expired(self) -> None:
        oldest = time.monotonic() - REMOVAL_DELAY_SECONDS
        while self._removed and self._removed[0].when < oldest:
            self._removed.popleft()


def _exclude_from_compiler(function: Callable[..., Any]) -> None:
    """Exclude a function from torch.compile."""
    if hasattr(_frames, "set_code_exec_strategy"):
        action = _frames._FrameAction
        strategy = _frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        _frames.set_code_exec_strategy(function.__code__, strategy)
    else:
        # Before PyTorch 2.7.
        _frames.skip_code(function.__code__)


def _kernel_handle(operation: str, key: str) -> Any:
    """Return a handle that keeps the current kernel of an operation alive; None without one."""
    find = getattr(torch._C, "_dispatch_get_computed_kernel_for_dispatch_key", None)
    return None if find is None else find(operation, getattr(DispatchKey, key))
