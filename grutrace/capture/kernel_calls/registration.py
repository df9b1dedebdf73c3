"""Replace PyTorch's GRU kernels with kernels of grutrace, and restore them.

PyTorch looks up the kernel of an operation by *dispatch key*: there is one key for each device type
and each feature, such as autograd. The GRU operations have a single composite kernel for all keys,
made of other operations. A kernel registered for a specific key takes precedence over it.

Two problems complicate this, both observed with PyTorch 2.13:

- A kernel registered for ``CPU`` alone would hide the composite kernel from autograd, and no
  gradient would flow. So kernels are registered for the autograd key of each device and for the
  device's own key, which inference_mode uses.
- Removing a kernel frees it. Another thread may have looked it up and be waiting for the GIL to
  enter it; the process then ends with a segmentation fault. So a removed kernel is kept until no
  thread can be about to enter it. PyTorch versions without a handle for this keep the kernel until
  no other thread runs Python.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch

from grutrace.torch_internals import DispatchKey, find, require_all

#: The operations, and the index of the weights among their arguments.
OPERATIONS = {"gru.input": 2, "gru.data": 3, "gru_cell": 2}

#: The newest PyTorch that passed the tests (tools/matrix.sh). A newer one is used, too.
NEWEST_TESTED = (2, 15)

#: How long a removed kernel is kept. A thread waits for the GIL for milliseconds only. Seconds.
REMOVAL_DELAY_SECONDS = 10.0

_kernels = {
    name: find(f"torch.ops.aten.{name if '.' in name else name + '.default'}._op_dk")
    for name in OPERATIONS
}

#: Function modes, which are left for our kernels and entered again for PyTorch's.
_count_function_modes = find("torch._C._len_torch_function_stack")
_with_torch_functions = find("torch._C._EnableTorchFunction")

_key_of_device = find("torch._C._dispatch_key_for_device")
_unregister = find("torch.library.Library._destroy")

#: The part of torch.compile that is available without loading the rest.
_frames = find("torch._C._dynamo.eval_frame", None)

#: Return a handle that keeps a kernel alive. From PyTorch 2.9 on.
_get_kernel = find("torch._C._dispatch_get_computed_kernel_for_dispatch_key", None)

#: Keys that are always registered. Meta calls hold no data, but a warning names them.
_ALWAYS = ("CPU", "AutogradCPU", "AutogradMeta")


class GRUKernel:
    """PyTorch's own kernel of one operation.

    Attributes:
        name: ``gru.input``, ``gru.data`` or ``gru_cell``.
        is_cell: Whether it runs one step of a cell.
        state_index: Index of the initial state among its arguments.
    """

    def __init__(self, name: str) -> None:
        self.name, self.is_cell = name, name == "gru_cell"
        self._run = _kernels[name]
        self._weights_index = OPERATIONS[name]
        self.state_index = self._weights_index - 1

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel. Function modes of the user see the same calls as without grutrace."""
        if _count_function_modes():
            with _with_torch_functions():
                return self._run(DispatchKey.CompositeImplicitAutograd, *arguments)
        return self._run(DispatchKey.CompositeImplicitAutograd, *arguments)

    def options(self, arguments: tuple[Any, ...]) -> tuple[int, int, float, bool, bool]:
        """Return has_biases, num_layers, dropout, train and bidirectional from its arguments."""
        options: Any = arguments[self._weights_index + 1 : self._weights_index + 6]
        return tuple(options)

    def weights(self, arguments: tuple[Any, ...]) -> Any:
        """Return the weights from its arguments: a flat list, as in nn.GRU."""
        if self.is_cell:
            return [weight for weight in arguments[self._weights_index :] if weight is not None]
        return arguments[self._weights_index]

    def with_weights(self, arguments: tuple[Any, ...], weights: Any) -> tuple[Any, ...]:
        """Return the same arguments with other weights, given as a flat list."""
        index = self._weights_index
        if self.is_cell:
            return (*arguments[:index], *weights)
        return (*arguments[:index], weights, *arguments[index + 1 :])


#: Function that is called instead of a kernel, with PyTorch's kernel and the arguments.
KernelOverride: TypeAlias = Callable[[GRUKernel, tuple[Any, ...]], Any]


class _RemovedKernels(NamedTuple):
    """Kernels that a thread may still be about to enter.

    Attributes:
        time: When they were removed, by the monotonic clock. Seconds.
        handles: Keep them alive.
    """

    time: float
    handles: list[Any]


class KernelRegistration:
    """Overrides the kernels of the GRU operations while it is acquired.

    Args:
        override: Called instead of each kernel.
    """

    def __init__(self, override: KernelOverride) -> None:
        self._override = override
        self._users: set[object] = set()
        self._libraries: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._is_removing = False
        self._removed: deque[_RemovedKernels] = deque()
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # Not on Windows.
            os.register_at_fork(after_in_child=self._reset_lock_after_fork)

    def _reset_lock_after_fork(self) -> None:
        # A thread of the parent process may hold the lock.
        self._lock = threading.RLock()

    @property
    def is_registered(self) -> bool:
        """Whether the kernels are overridden."""
        return bool(self._libraries)

    def acquire(self, user: object, devices: Iterable[str]) -> None:
        """Override the kernels until every user has released them.

        Args:
            user: The user, a hashable object.
            devices: Device types on which calls are expected.
        """
        keys = set(_ALWAYS)
        for device in devices:
            if device != "meta":
                key = _key_of_device(device)
                keys |= {key, f"Autograd{key}"}
        log_untested_version()
        require_all()
        with self._lock:
            try:
                self._users.add(user)
                self._drop_expired()
                if self._is_removing:
                    # An interruption came while the kernels were being removed.
                    self._remove()
                # The autograd kernels come first here, and last on removal: without them, the
                # kernel of a device would have no gradients.
                for key in sorted(keys - set(self._libraries)):
                    self._register(key)
            except BaseException:
                self.release(user)
                raise

    def release(self, user: object) -> None:
        """Restore the kernels, unless another user has acquired them. May be repeated."""
        with self._lock:
            self._users.discard(user)
            if self._users or not self._libraries:
                return
            if not self._handles and len(sys._current_frames()) > 1:
                # Without handles, the kernels can be freed only while no other thread runs Python.
                return
            self._remove()

    def _remove(self) -> None:
        """Restore PyTorch's kernels. May be repeated after an interruption."""
        self._is_removing = True
        for library in reversed(list(self._libraries.values())):
            _unregister(library)
        self._removed.append(_RemovedKernels(time.monotonic(), self._handles))
        self._handles = []
        _forget_resolved_keys()
        self._libraries.clear()
        self._is_removing = False

    def _register(self, key: str) -> None:
        create_library: Any = torch.library.Library
        library = create_library("aten", "IMPL", key)
        for name in OPERATIONS:
            library.impl(name, self._make_kernel(GRUKernel(name)))
            handle = _kernel_handle(f"aten::{name}", key)
            if handle is not None:
                self._handles.append(handle)
        self._libraries[key] = library
        _forget_resolved_keys()

    def _make_kernel(self, kernel: GRUKernel) -> Callable[..., Any]:
        override = self._override

        def call(*arguments: Any) -> Any:
            # torch.compile would compile every Python function that runs within a compiled one.
            previous = _frames.set_eval_frame(None)
            try:
                return override(kernel, arguments)
            finally:
                _frames.set_eval_frame(previous)

        if _exclude_from_compiler(call):
            return call
        disable: Any = torch.compiler.disable
        excluded: Callable[..., Any] = disable(lambda *arguments: override(kernel, arguments))
        return excluded

    def _drop_expired(self) -> None:
        oldest = time.monotonic() - REMOVAL_DELAY_SECONDS
        while self._removed and self._removed[0].time < oldest:
            self._removed.popleft()


@cache
def log_untested_version() -> None:
    """Log once if this PyTorch is newer than those that grutrace was tested with."""
    found = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if found > NEWEST_TESTED:
        logging.getLogger(__name__).info(
            "torch %s is newer than %s, the newest that grutrace was tested with",
            torch.__version__,
            ".".join(map(str, NEWEST_TESTED)),
        )


def _exclude_from_compiler(function: Callable[..., Any]) -> bool:
    """Exclude a function from torch.compile, whether or not the compiler is loaded.

    Returns:
        Whether this was possible. If not, `torch.compiler.disable` does it, which loads the
        compiler: that takes longer than to load torch.
    """
    try:
        _frames.set_eval_frame(_frames.set_eval_frame(None))
        if hasattr(_frames, "set_code_exec_strategy"):
            action = _frames._FrameAction
            strategy = _frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
            _frames.set_code_exec_strategy(function.__code__, strategy)
        else:
            # Before PyTorch 2.7.
            _frames.skip_code(function.__code__)
    except AttributeError:
        return False
    return True


def _forget_resolved_keys() -> None:
    """Clear torch's cache of resolved kernels for dispatch in Python.

    Compilers dispatch in Python, and torch caches the key of an operation's kernel. A key that was
    resolved with our kernels is wrong without them: the operation would have no gradients.
    """
    for name in OPERATIONS:
        getattr(_overload(name), "_dispatch_cache", {}).clear()


def _overload(name: str) -> Any:
    """Return torch's object for an operation."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def has_kernel_handles() -> bool:
    """Whether this PyTorch has handles that keep a removed kernel alive. From 2.9 on."""
    return _get_kernel is not None


def _kernel_handle(operation: str, key: str) -> Any:
    """Return a handle that keeps the current kernel of an operation alive; None without one."""
    if not has_kernel_handles():
        return None
    return _get_kernel(operation, getattr(DispatchKey, key))
