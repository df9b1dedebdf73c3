"""Observe the calls that a module makes of PyTorch's GRU kernels.

nn.GRU and nn.GRUCell call one of three PyTorch operations: ``aten::gru.input``, ``aten::gru.data``
(packed input) and ``aten::gru_cell``. While anything records, these operations have kernels of
grutrace, which call PyTorch's own and record input and output. Nothing is added to the model: no
hook, no mode, no replaced forward. So nothing of grutrace is copied, saved, scripted or compiled
with the model, and code that checks a model's hooks takes no slower path.

`registration` registers the kernels, `caller` finds the calling module, and `observation` runs
PyTorch's kernel and collects its data. This module connects them: each module that is to be
observed has subscriptions.

docs/design.md explains why kernels are registered and removed in this way.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from grutrace.capture.kernel_calls import observation
from grutrace.capture.kernel_calls.caller import KernelCaller, find_caller, find_sorted_indices
from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.registration import GRUKernel, KernelRegistration
from grutrace.capture.kernel_calls.replacement import InterceptedCall, PreparedCall, Replacement
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    is_checkpoint_recompute,
    is_wrapped,
    unsupported_reason,
)
from grutrace.gru.gate_copies import NO_GATES, GateRequest, merge_requests
from grutrace.gru.kernel import KernelCall
from grutrace.gru.layout import SequenceLayout
from grutrace.options import STACK_MODES, Stacks
from grutrace.torch_internals import innermost_transform, without_torch_functions

CallCallback: TypeAlias = Callable[[KernelRun | SkippedCall], None]

#: Called once before each call. If it returns False, the call is not observed.
ShouldRecord: TypeAlias = Callable[[], bool]

#: Called once with a GRU without a subscription, at its first call.
UnknownModuleCallback: TypeAlias = Callable[[GRUModule, FrameType], None]


def always_record() -> bool:
    """Record every call."""
    return True


class Subscription:
    """Calls ``callback`` after every kernel call of one module, between `start` and `stop`.

    Calls that activation checkpointing repeats for the backward pass are left out.

    The creator must keep a reference to the subscription. Nothing else does, so that an owner that
    is garbage-collected gets no more calls. A subscription does not keep its module alive.

    Args:
        module: The layer.
        callback: Called in the thread that runs the model, before anyone can change the output;
            with `SkippedCall` if the call cannot be observed.
        stacks: How to see between the layers of a stack: ``split``, ``rerun``, or ``auto`` for
            split on a CPU and rerun elsewhere. If subscriptions to one module differ, rerun takes
            precedence, then auto: they leave the kernel's output as it is.
        should_record: Asked once per call, whether to observe it. If no subscription to a module
            does, the call costs next to nothing.
        request: The kernel's own gates that the callback needs, if they can be copied.
        replacement: Replaces the output of the calls. Such a subscription observes nothing: the
            callback is called only with calls whose output cannot be replaced.
    """

    def __init__(
        self,
        module: GRUModule,
        callback: CallCallback,
        stacks: Stacks = "auto",
        should_record: ShouldRecord = always_record,
        request: GateRequest = NO_GATES,
        replacement: Replacement | None = None,
    ) -> None:
        self.module, self.callback = weakref.ref(module), callback
        self.stacks, self.should_record, self.request = stacks, should_record, request
        self.replacement = replacement
        self._is_active = False
        # A subscription that is garbage-collected restores the kernels, too.
        self._user = object()
        weakref.finalize(self, _registration.release, self._user).atexit = False
        # Replaced as a whole, never changed, because other threads read it.
        self._known_weights: list[weakref.ref[Tensor]] = []

    def remember_weights(self, weights: list[Tensor]) -> None:
        """Remember weights that belong to the module and can be recorded."""
        self._known_weights = [weakref.ref(weight) for weight in weights]

    def recognizes(self, weights: list[Tensor]) -> bool:
        """Whether these are the same tensors as the weights remembered last."""
        known = self._known_weights
        return len(known) == len(weights) and all(
            [reference() is weight for reference, weight in zip(known, weights, strict=True)]
        )

    @property
    def is_stale(self) -> bool:
        """Whether the module was garbage-collected."""
        return self.module() is None

    def start(self) -> None:
        """Start observing."""
        module = self.module()
        if module is not None and not self._is_active:
            _registration.acquire(self._user, _devices(module))
            self._is_active = True
            _subscriptions.add(module, self)

    def stop(self) -> None:
        """Stop observing. Stopping twice does nothing. An interrupted stop can be repeated."""
        if self._is_active:
            _subscriptions.discard(self)
            _registration.release(self._user)
            self._is_active = False


class UnknownModuleWatch:
    """Calls ``callback`` once for each GRU that is called without a subscription.

    The creator must keep a reference to the watch.

    Args:
        callback: Called with the module and the frame that called the kernel, before the call.
    """

    def __init__(self, callback: UnknownModuleCallback) -> None:
        self._callback = callback
        self._known_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def start(self) -> None:
        """Start watching. Calls are noticed only while any subscription is active."""
        _watches.add(self)

    def stop(self) -> None:
        """Stop watching. Stopping twice does nothing."""
        _watches.discard(self)

    def notify(self, module: GRUModule, frame: FrameType) -> None:
        """Call the callback, unless it was called with this module before."""
        if module not in self._known_modules:
            self._known_modules.add(module)
            self._callback(module, frame)


class _Subscriptions:
    """The subscriptions to each module. Read without a lock by every kernel call.

    Attributes:
        by_module: By id of the module, weak references to its subscriptions. The table is
            replaced as a whole, never changed.
    """

    def __init__(self) -> None:
        self.by_module: dict[int, tuple[weakref.ref[Subscription], ...]] = {}
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):  # Not on Windows.
            os.register_at_fork(after_in_child=self._reset_lock_after_fork)

    def _reset_lock_after_fork(self) -> None:
        # A thread of the parent process may hold the lock.
        self._lock = threading.RLock()

    def add(self, module: nn.Module, subscription: Subscription) -> None:
        with self._lock:
            existing = self.by_module.get(id(module), ())
            alive = tuple(reference for reference in existing if reference() is not None)
            added = weakref.ref(subscription, self._discard_collected)
            self.by_module = {**self.by_module, id(module): (*alive, added)}

    def discard(self, subscription: Subscription | None) -> None:
        """Remove a subscription, and all that were garbage-collected."""
        with self._lock:
            remaining = {
                module_id: tuple(
                    reference for reference in references if reference() not in (None, subscription)
                )
                for module_id, references in self.by_module.items()
            }
            self.by_module = {
                key: references for key, references in remaining.items() if references
            }

    def _discard_collected(self, _: object) -> None:
        self.discard(None)

    def to_module(self, module: nn.Module) -> list[Subscription]:
        """Return the subscriptions to a module, in the order in which they were started."""
        references = self.by_module.get(id(module))
        if references is None:
            return []
        # An id may belong to an earlier module that was garbage-collected.
        return [
            subscription
            for reference in references
            if (subscription := reference()) is not None and subscription.module() is module
        ]

    def replacing_original(self, replica: nn.Module) -> list[Subscription]:
        """Return the subscriptions that replace the output of the module that a replica is of."""
        # A replica has the same dict of hooks.
        hooks = vars(replica).get("_forward_hooks")
        return [
            subscription
            for module in self.modules()
            if vars(module).get("_forward_hooks") is hooks
            for subscription in self.to_module(module)
            if subscription.replacement is not None
        ]

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules that have subscriptions."""
        for references in tuple(self.by_module.values()):
            first = references[0]()
            module = None if first is None else first.module()
            if module is not None:
                yield module


class _CurrentCall(threading.local):
    """The call that is being observed in this thread: a call within it is not observed as well.

    Attributes:
        frame: The frame that observes it; None without one. A flag would not do, because an
            interruption could prevent it from being reset.
    """

    frame: FrameType | None = None

    def is_running(self) -> bool:
        """Whether the frame is on the call stack of this thread."""
        outer: FrameType | None = sys._getframe(1)
        while outer is not None:
            if outer is self.frame:
                return True
            outer = outer.f_back
        return False


#: nn.DataParallel makes new replicas of a module for every call.
_REPLICA = SkippedCall(
    "a replica of nn.DataParallel made it; run the model without it, or in one process per device"
)

_subscriptions = _Subscriptions()
_watches: weakref.WeakSet[UnknownModuleWatch] = weakref.WeakSet()
_current_call = _CurrentCall()


def is_observing() -> bool:
    """Whether grutrace currently overrides the kernels."""
    return _registration.is_registered


def _dispatch(kernel: GRUKernel, arguments: tuple[Any, ...]) -> Any:
    """Run PyTorch's own kernel, and notify the subscriptions to the calling module."""
    if not _subscriptions.by_module:
        return kernel(*arguments)
    if _current_call.frame is not None and _current_call.is_running():
        return kernel(*arguments)
    caller = find_caller(sys._getframe(2), kernel, arguments, _subscriptions.modules)
    module = caller.module
    if module is None:
        return kernel(*arguments)
    subscriptions = _subscriptions.to_module(module)
    if not subscriptions:
        if getattr(module, "_is_replica", False):
            _notify(_subscriptions.replacing_original(module), _REPLICA)
        if not _watches or caller.module_frame is None:
            return kernel(*arguments)
        for watch in tuple(_watches):
            watch.notify(module, caller.module_frame)
        # A watch may have subscribed to the module.
        subscriptions = _subscriptions.to_module(module)
    if not subscriptions:
        return kernel(*arguments)
    weights = kernel.weights(arguments)
    is_known = subscriptions[0].recognizes(weights)
    if not is_known and not observation.is_own_call(module, kernel, arguments):
        return kernel(*arguments)
    _current_call.frame = sys._getframe()
    try:
        return _observe(caller, module, subscriptions, kernel, arguments, weights, is_known)
    finally:
        _current_call.frame = None


def _observe(
    caller: KernelCaller,
    module: GRUModule,
    subscriptions: list[Subscription],
    kernel: GRUKernel,
    arguments: tuple[Any, ...],
    weights: list[Tensor],
    is_known: bool,
) -> Any:
    """Run PyTorch's own kernel, and notify the subscriptions that record this call.

    Args:
        caller: The caller of the kernel.
        module: The module that makes the call.
        subscriptions: The subscriptions to the module.
        kernel: The kernel.
        arguments: Its positional arguments.
        weights: The weights among them.
        is_known: Whether an earlier call had the same weights and could be observed.
    """
    is_recompute = is_checkpoint_recompute()
    replacing = [s for s in subscriptions if s.replacement is not None]
    observers = [s for s in subscriptions if s.replacement is None] if replacing else subscriptions
    # Called exactly once per call, because it counts calls.
    to_notify = (
        []
        if is_recompute
        else [subscription for subscription in observers if subscription.should_record()]
    )
    # A recomputation runs like the call that it repeats, so that its values are the same.
    if not (is_recompute or to_notify or replacing):
        return kernel(*arguments)
    skipped = unsupported_reason(arguments[: kernel.state_index + 1] if is_known else arguments)
    if skipped is not None:
        _notify([*replacing, *to_notify], skipped)
        return kernel(*arguments)
    is_transformed = innermost_transform() is not None or is_wrapped(arguments[0])
    if not (is_known or is_transformed):
        subscriptions[0].remember_weights(weights)
    with without_torch_functions():
        result, observe = observation.run_kernel(
            module,
            kernel,
            arguments,
            partial(find_sorted_indices, caller),
            _merged_stack_mode(observers or subscriptions),
            _merged_request(observers or subscriptions, module.hidden_size),
            is_transformed=is_transformed,
            replace=_replace(
                replacing, to_notify, is_recompute=is_recompute, is_cell=kernel.is_cell
            )
            if replacing
            else None,
        )
        if to_notify:
            _notify(to_notify, observe())
    return result


def _replace(
    replacing: list[Subscription],
    to_notify: list[Subscription],
    *,
    is_recompute: bool,
    is_cell: bool,
) -> observation.Prepare:
    """Return a function that prepares a call whose output may be replaced."""

    def prepare(
        call: KernelCall, layout: SequenceLayout, run_layer: observation.RunLayer
    ) -> PreparedCall:
        active = [s.replacement for s in replacing if s.replacement is not None]
        needs_gates = bool(to_notify)
        return active[0].prepare(
            active, InterceptedCall(call, layout, run_layer, needs_gates, is_recompute, is_cell)
        )

    return prepare


def _merged_stack_mode(subscriptions: list[Subscription]) -> Stacks:
    """Return the first of `STACK_MODES` that a subscription asks for."""
    if len(subscriptions) == 1:
        return subscriptions[0].stacks
    requested = {subscription.stacks for subscription in subscriptions}
    return next(mode for mode in STACK_MODES if mode in requested)


def _merged_request(subscriptions: list[Subscription], hidden_size: int) -> GateRequest:
    if len(subscriptions) == 1:
        return subscriptions[0].request
    return merge_requests([subscription.request for subscription in subscriptions], hidden_size)


def _notify(subscriptions: list[Subscription], run: KernelRun | SkippedCall) -> None:
    """Call all callbacks, even if one of them raises an error."""
    if len(subscriptions) == 1:
        subscriptions[0].callback(run)
        return
    errors = []
    for subscription in subscriptions:
        try:
            subscription.callback(run)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _devices(module: nn.Module) -> set[str]:
    """Return the device types on which a module may be called."""
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    return devices | ({"cuda"} if torch.cuda.is_available() else set())


_registration = KernelRegistration(_dispatch)
