"""The attachment of a tracer to its model: the subscriptions to the kernel calls of its GRUs.

An attachment keeps neither the model nor its owner alive, and adds nothing to the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import nn

from grutrace.capture.kernel_calls import compiled_graphs
from grutrace.capture.kernel_calls.model_changes import locate_module
from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.subscription import Subscription, UnknownModuleWatch
from grutrace.capture.kernel_calls.torch_context import SkippedCall
from grutrace.capture.selection import SelectedModule, find_grus
from grutrace.capture.tracer_warnings import TracerWarnings
from grutrace.gru.gate_copies import GateRequest
from grutrace.options import CompiledCode, Stacks


class Attachment:
    """Subscribes to the recorded modules of a model, between `start` and `stop`.

    A GRU that replaces a recorded module is recorded in its place. Other changes of the model, and
    compiled graphs whose calls cannot be observed, cause warnings.

    Args:
        model: The model.
        selections: The recorded modules. Callbacks get the index of a module in this list.
        requests: For each module, the gates to copy from the kernel.
        stacks: How the lower layers of a stack are observed.
        compiled: How compiled code runs between `start` and `stop`.
        receive: A method, called with the index and the run after each call.
        should_record: A method, called with the index before each call: whether to observe it.
        warnings: Receives the warnings.

    Attributes:
        lock: Held while the subscriptions change.
    """

    def __init__(
        self,
        model: nn.Module,
        selections: Sequence[SelectedModule],
        requests: Sequence[GateRequest],
        stacks: Stacks,
        compiled: CompiledCode,
        receive: Callable[[int, KernelRun | SkippedCall], None],
        should_record: Callable[[int], bool],
        warnings: TracerWarnings,
    ) -> None:
        self.lock = threading.RLock()
        self._model = weakref.ref(model)
        self._selections, self._requests = selections, requests
        self._stacks, self._compiled, self._warnings = stacks, compiled, warnings
        self._callbacks = [
            (_WeakMethod(receive, index), _WeakMethod(should_record, index))
            for index in range(len(selections))
        ]
        self._grus = {path: weakref.ref(module) for path, module in find_grus(model)}
        self._subscriptions: list[Subscription | compiled_graphs.EagerCode] = []
        self._watch = UnknownModuleWatch(_WeakMethod(self._on_unknown_module))

    @property
    def is_active(self) -> bool:
        """Whether there are subscriptions."""
        return bool(self._subscriptions)

    def start(self) -> None:
        """Subscribe to all recorded modules.

        The caller must hold `lock`, and must call `stop` if this raises an exception.
        """
        self._handle_compiled_code()
        for index, selection in enumerate(self._selections):
            self.subscribe(index, selection.module)
        self._watch.start()

    def stop(self) -> None:
        """Remove all subscriptions. Stopping twice does nothing.

        The caller must hold `lock`, unless the owner was garbage-collected. Then no other code uses
        the attachment, and waiting for a lock during garbage collection could deadlock.
        """
        self._watch.stop()
        while self._subscriptions:
            self._subscriptions[-1].stop()
            self._subscriptions.pop()

    def subscribe(self, index: int, module: GRUModule | None) -> None:
        """Record the calls of a module as those of the recorded module with this index.

        The caller must hold `lock`.
        """
        if module is None:
            return
        unused = [e for e in self._subscriptions if isinstance(e, Subscription) and e.is_stale]
        for subscription in unused:
            subscription.stop()
            self._subscriptions.remove(subscription)
        receive, should_record = self._callbacks[index]
        subscription = Subscription(
            module,
            receive,
            self._stacks,
            should_record,
            self._requests[index],
        )
        # Stored before it starts: an interruption must not leave it active.
        self._subscriptions.append(subscription)
        subscription.start()

    def warn_of_unobserved_code(self) -> None:
        """Warn of compiled graphs, and of layers that were replaced by modules of other kinds."""
        self._warn_of_graphs()
        model = self._model()
        modules = {} if model is None else dict(model.named_modules())
        for selection in self._selections:
            path = selection.description.path
            module = modules.get(path)
            # A new GRU was handled at its first call.
            if module is not None and not isinstance(module, (nn.GRU, nn.GRUCell)):
                self._warnings.replaced_module(path, type(module).__qualname__)

    def _handle_compiled_code(self) -> None:
        """Make compiled code run as Python code if the options say so; else warn of its graphs."""
        if self._compiled == "eager" or (
            self._compiled == "auto"
            and compiled_graphs.can_run_eagerly()
            and compiled_graphs.any_with_gru_kernel()
        ):
            code = compiled_graphs.EagerCode()
            self._subscriptions.append(code)
            code.start()
        else:
            self._warn_of_graphs()

    def _warn_of_graphs(self) -> None:
        is_eager = any(isinstance(e, compiled_graphs.EagerCode) for e in self._subscriptions)
        if not is_eager and compiled_graphs.any_with_gru_kernel():
            self._warnings.compiled_graph()

    def _on_unknown_module(self, module: GRUModule, frame: FrameType) -> None:
        """Record a GRU that replaced a recorded module, or warn that its calls are not recorded."""
        model = self._model()
        if model is None or any(known() is module for known in self._grus.values()):
            return
        modules = {
            selection.description.path: selection.description for selection in self._selections
        }
        location = locate_module(module, model, modules, frame)
        if location.replaces is not None:
            index = list(modules).index(location.replaces)
            with self.lock:
                if self._subscriptions:
                    self._grus[location.replaces] = weakref.ref(module)
                    self.subscribe(index, module)
        elif location.reason is not None and location.path not in self._grus:
            self._warnings.warn_once(location.reason, location.reason)


class _WeakMethod:
    """Calls a method of an object that it does not keep alive.

    Args:
        method: The method.
        first: Its first arguments.
    """

    def __init__(self, method: Callable[..., Any], *first: object) -> None:
        bound: Any = method
        self._owner, self._function = weakref.ref(bound.__self__), bound.__func__
        self._first = first

    def __call__(self, *args: Any) -> Any:
        owner = self._owner()
        return None if owner is None else self._function(owner, *self._first, *args)
