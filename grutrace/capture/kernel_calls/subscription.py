"""Observe every call of PyTorch's GRU kernels, in any surroundings of the layer.

nn.GRU and nn.GRUCell call one of three PyTorch operations: ``aten::gru.input``, ``aten::gru.data``
(packed input) and ``aten::gru_cell``. While anything records, these operations have kernels of
grutrace, which call PyTorch's own and record input and output. Nothing is added to the model: no
hook, no mode, no replaced forward. So nothing of grutrace is copied, saved, scripted or compiled
with the model, and code that checks a model's hooks takes no slower path.

The calling module is found from the Python frame that called the kernel: the ``forward`` of nn.GRU
or nn.GRUCell, with the module as ``self``. Without such a frame (TorchScript, a compiled graph) it
is found from the weights, which are the module's own tensors.

docs/design.md explains why kernels are registered and removed in this way.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.utils.rnn import PackedSequence

from grutrace.capture.kernel_calls import observation
from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.registration import GRUKernel, KernelRegistration
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    is_checkpoint_recompute,
    is_wrapped,
    unsupported_reason,
)
from grutrace.gru.gate_requests import NO_GATES, GateRequest, merge_requests
from grutrace.options import STACK_MODES, Stacks

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
    is garbage-collected gets no more calls. The module is not kept alive either.

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
    """

    def __init__(
        self,
        module: GRUModule,
        callback: CallCallback,
        stacks: Stacks = "auto",
        should_record: ShouldRecord = always_record,
        request: GateRequest = NO_GATES,
    ) -> None:
        self.module, self.callback = weakref.ref(module), callback
        self.stacks, self.should_record, self.request = stacks, should_record, request
        self._is_on = False
        # Replaced as a whole, never changed, because other threads read it.
        self._known: list[weakref.ref[Tensor]] = []

    def remember_weights(self, weights: list[Tensor]) -> None:
        """Remember weights that belong to the module and can be recorded."""
        self._known = [weakref.ref(each) for each in weights]

    def recognizes(self, weights: list[Tensor]) -> bool:
        """Whether `remember_weights` was given these very weights last."""
        known = self._known
        return len(known) == len(weights) and all(
            [own() is each for own, each in zip(known, weights, strict=True)]
        )

    @property
    def is_gone(self) -> bool:
        """Whether the module is gone."""
        return self.module() is None

    def start(self) -> None:
        """Start observing."""
        module = self.module()
        if module is not None and not self._is_on:
            _registration.acquire(_devices(module))
            self._is_on = True
            _subscriptions.add(module, self)
            # A subscription that is garbage-collected restores the kernels, too.
            self._release = weakref.finalize(self, _registration.release)
            self._release.atexit = False

    def stop(self) -> None:
        """Stop observing. Stopping twice does nothing."""
        if self._is_on:
            self._is_on = False
            _subscriptions.discard(self)
            self._release()


class UnknownModuleWatch:
    """Calls ``found`` once for each GRU that is called without a subscription.

    The creator must keep a reference to the watch.

    Args:
        found: Called with the module and the frame that called the kernel, before the call.
    """

    def __init__(self, found: UnknownModuleCallback) -> None:
        self.found = found
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def start(self) -> None:
        """Start watching. Calls are seen only while any subscription is active."""
        _watches.add(self)

    def stop(self) -> None:
        """Stop watching. Stopping twice does nothing."""
        _watches.discard(self)


class _Subscriptions:
    """The subscriptions to each module. Read without a lock by every kernel call.

    Attributes:
        by_module: By id of the module, weak references to its subscriptions. The table is
            replaced as a whole, never changed.
    """

    def __init__(self) -> None:
        self.by_module: dict[int, tuple[weakref.ref[Subscription], ...]] = {}
        self._lock = threading.RLock()
        # Another thread of the parent may hold it.
        if hasattr(os, "register_at_fork"):  # There is none on Windows.
            os.register_at_fork(after_in_child=self._reset_lock_after_fork)

    def _reset_lock_after_fork(self) -> None:
        self._lock = threading.RLock()

    def add(self, module: nn.Module, subscription: Subscription) -> None:
        with self._lock:
            others = tuple(
                each for each in self.by_module.get(id(module), ()) if each() is not None
            )
            mine = weakref.ref(subscription, self._forget)
            self.by_module = {**self.by_module, id(module): (*others, mine)}

    def discard(self, subscription: Subscription | None) -> None:
        """Remove a subscription, and all that were garbage-collected."""
        with self._lock:
            left = {
                number: tuple(each for each in found if each() not in (None, subscription))
                for number, found in self.by_module.items()
            }
            self.by_module = {number: found for number, found in left.items() if found}

    def _forget(self, _: object) -> None:
        self.discard(None)

    def of(self, module: nn.Module) -> list[Subscription]:
        """Return the subscriptions to a module, in the order in which they were started."""
        found = self.by_module.get(id(module))
        if found is None:
            return []
        alive = [each() for each in found]
        return [each for each in alive if each is not None and each.module() is module]

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules that have subscriptions."""
        for found in tuple(self.by_module.values()):
            first = found[0]()
            module = None if first is None else first.module()
            if module is not None:
                yield module


class _Inside(threading.local):
    """The frame that observes a call in this thread, if there is one.

    A frame instead of a flag, because an interruption could prevent a flag from being reset.
    """

    frame: FrameType | None = None

    def is_running(self) -> bool:
        """Whether a call is being observed in this thread."""
        if self.frame is None:
            return False
        above: FrameType | None = sys._getframe(1)
        while above is not None:
            if above is self.frame:
                return True
            above = above.f_back
        return False


class KernelCaller(NamedTuple):
    """The caller of a kernel.

    Attributes:
        module: The GRU whose forward makes the call; None if no module makes it.
        frame: The frame of the function that called the kernel.
        own: The frame in which the module is the first argument; None without one.
    """

    module: GRUModule | None
    frame: FrameType
    own: FrameType | None


_subscriptions = _Subscriptions()
_watches: weakref.WeakSet[UnknownModuleWatch] = weakref.WeakSet()
_inside = _Inside()


def is_observing() -> bool:
    """Whether grutrace currently overrides the kernels."""
    return _registration.is_registered


def _dispatch(kernel: GRUKernel, arguments: tuple[Any, ...]) -> Any:
    """Run PyTorch's own kernel, and notify the subscriptions to the calling module."""
    if not _subscriptions.by_module or _inside.is_running():
        return kernel(*arguments)
    caller = _find_caller(sys._getframe(2), kernel, arguments)
    module = caller.module
    if module is None:
        return kernel(*arguments)
    subscribed = _subscriptions.of(module)
    if not subscribed:
        if not _watches or caller.own is None:
            return kernel(*arguments)
        _notify_watches(module, caller.own)
        subscribed = _subscriptions.of(module)
    if not subscribed:
        return kernel(*arguments)
    weights = kernel.weights(arguments)
    is_known = subscribed[0].recognizes(weights)
    if not is_known and not observation.is_own_call(module, kernel, arguments):
        return kernel(*arguments)
    _inside.frame = sys._getframe()
    try:
        return _observe(caller, module, subscribed, kernel, arguments, weights, is_known)
    finally:
        _inside.frame = None


def _observe(
    caller: KernelCaller,
    module: GRUModule,
    subscribed: list[Subscription],
    kernel: GRUKernel,
    arguments: tuple[Any, ...],
    weights: list[Tensor],
    is_known: bool,
) -> Any:
    repeats = is_checkpoint_recompute()
    # Called exactly once per call, because it counts calls.
    listening = [] if repeats else [each for each in subscribed if each.should_record()]
    if not (repeats or listening):
        return kernel(*arguments)
    missed = unsupported_reason(arguments[: kernel.state_index + 1] if is_known else arguments)
    if missed is not None:
        _notify(listening, missed)
        return kernel(*arguments)
    is_transformed = peek_interpreter_stack() is not None or is_wrapped(arguments[0])
    if not (is_known or is_transformed):
        subscribed[0].remember_weights(weights)
    with torch._C.DisableTorchFunction():
        answer, observed = observation.run_kernel(
            module,
            kernel,
            arguments,
            partial(_sorted_indices, caller),
            _merged_stack_mode(subscribed),
            _merged_request(subscribed, module.hidden_size),
            is_transformed=is_transformed,
        )
        if listening:
            _notify(listening, observed())
    return answer


def _merged_stack_mode(subscribed: list[Subscription]) -> Stacks:
    if len(subscribed) == 1:
        return subscribed[0].stacks
    request = {each.stacks for each in subscribed}
    return next(each for each in STACK_MODES if each in request)


def _merged_request(subscribed: list[Subscription], hidden_size: int) -> GateRequest:
    if len(subscribed) == 1:
        return subscribed[0].request
    return merge_requests([each.request for each in subscribed], hidden_size)


def _notify(listening: list[Subscription], run: KernelRun | SkippedCall) -> None:
    """Call all callbacks, even if one of them raises an error."""
    if len(listening) == 1:
        listening[0].callback(run)
        return
    errors = []
    for each in listening:
        try:
            each.callback(run)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _notify_watches(module: GRUModule, frame: FrameType) -> None:
    for watch in tuple(_watches):
        if module not in watch.seen:
            watch.seen.add(module)
            watch.found(module, frame)


def _find_caller(frame: FrameType, kernel: GRUKernel, arguments: tuple[Any, ...]) -> KernelCaller:
    """Find the caller of a kernel, from the frame that called it."""
    own = method_owner(frame)
    if isinstance(own, (nn.GRU, nn.GRUCell)):
        return KernelCaller(own, frame, frame)
    weight = kernel.weights(arguments)[0]
    for module in _subscriptions.modules():
        if weight is observation.first_weight(module):
            return KernelCaller(module, frame, _frame_of(frame, module))  # type: ignore[arg-type]
    above: FrameType | None = frame.f_back
    while above is not None:
        own = method_owner(above)
        if isinstance(own, (nn.GRU, nn.GRUCell)):
            return KernelCaller(own, frame, above)
        above = above.f_back
    return KernelCaller(None, frame, None)


def _frame_of(frame: FrameType, module: nn.Module) -> FrameType | None:
    above: FrameType | None = frame
    while above is not None and method_owner(above) is not module:
        above = above.f_back
    return above


def method_owner(frame: FrameType) -> Any:
    """Return the object whose method a frame runs; None if it runs no method."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    own = frame.f_locals.get(code.co_varnames[0])
    if code.co_varnames[0] == "self" or own is None:
        return own
    # The argument has another name than self: check that its class has the method.
    methods = (vars(kind).get(code.co_name) for kind in type(own).__mro__)
    return own if any(getattr(each, "__code__", None) is code for each in methods) else None


def _sorted_indices(caller: KernelCaller, batch_sizes: Tensor) -> Tensor | None:
    """Return the user's batch index of each of the kernel's sequences; None if they are equal.

    The kernel's arguments do not contain them. They are local variables of a forward with packed
    input: in a PackedSequence with the same batch sizes object or, in nn.GRU's own forward, under
    this name.
    """
    frame: FrameType | None = caller.frame
    while frame is not None:
        values = frame.f_locals
        if values.get("batch_sizes") is batch_sizes and "sorted_indices" in values:
            found = values["sorted_indices"]
            return found if isinstance(found, Tensor) else None
        for value in tuple(values.values()):
            if isinstance(value, PackedSequence) and value.batch_sizes is batch_sizes:
                return value.sorted_indices
        if frame is caller.own:
            break
        frame = frame.f_back
    return None


def _devices(module: nn.Module) -> set[str]:
    found = {each.device.type for each in (*module.parameters(), *module.buffers())}
    return found | ({"cuda"} if torch.cuda.is_available() else set())


_registration = KernelRegistration(_dispatch)
