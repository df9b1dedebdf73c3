"""Find the GRUs of a running script: each at its first call.

`nn.GRU` and `nn.GRUCell` get a ``__call__`` of their own. Other modules are not changed: their
calls cost nothing extra, and torch.compile sees no difference.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from grutrace import run
from grutrace.capture.kernel_calls.torch_context import disable_compile, unsupported_reason
from grutrace.run.import_hook import on_import
from grutrace.run.matching import NoMatchingSite
from grutrace.run.report import Report
from grutrace.run.settings import Settings

if TYPE_CHECKING:
    from grutrace.run.run_tracer import PartManager, PartTracer

GRU_CLASSES = (nn.GRU, nn.GRUCell)

_OWN_FOLDER, _TORCH_FOLDER = (str(Path(package.__file__ or "").parent) for package in (run, torch))

#: Exit code of a script that is stopped because no site matches --sites.
EXIT_ERROR = 2

#: Called before a layer runs, with the layer and the arguments of the call.
FirstCallCallback: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Discovery:
    """Records every GRU from its first call on, together with the other GRUs of the same model.

    Args:
        settings: The settings of the run.
        report: Receives messages about calls that cannot be recorded.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._part_manager: PartManager | None = None
        self._known_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Layers outside any model, by call site, class and sizes.
        self._standalone: dict[
            tuple[object, ...], tuple[weakref.ref[nn.Module], PartTracer | None]
        ] = {}
        self._lock = threading.RLock()

    def start(self) -> None:
        """Start to look for GRUs."""
        self._patch_call(self._on_first_call)
        # Otherwise torch.compile would trace the callback into its graphs.
        on_import("torch._dynamo", lambda: self._patch_call(disable_compile(self._on_first_call)))
        # A forked child has no writer threads and does not own the files.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.stop)

    def _patch_call(self, on_first_call: FirstCallCallback) -> None:
        for kind in GRU_CLASSES:
            kind.__call__ = _make_call(kind, on_first_call)  # type: ignore[method-assign]

    def stop(self) -> None:
        """Stop looking for GRUs."""
        for kind in GRU_CLASSES:
            if "__call__" in vars(kind):
                del kind.__call__

    def _on_first_call(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if layer in self._known_layers:
            return
        skipped = unsupported_reason((*args, *kwargs.values()))
        if skipped is not None:
            # A model that is being exported or scripted may be a copy with other module paths.
            self._report.log(
                f"a call of {type(layer).__qualname__} was not recorded: {skipped.reason}"
            )
            return
        with self._lock:
            if layer in self._known_layers:
                return
            if getattr(layer, "_is_replica", False):
                # nn.DataParallel makes new replicas for every call.
                self._report.log("the replicas of an nn.DataParallel are not recorded")
                return
            model = outermost_module(layer)
            if model is layer and self._replaces_freed_layer(layer):
                self._known_layers.add(layer)
                return
            new_layers: list[nn.Module] = [
                module
                for module in model.modules()
                if isinstance(module, GRU_CLASSES) and module not in self._known_layers
            ]
            self._report.called = True
            try:
                self._record_layers(model, new_layers)
            except NoMatchingSite as error:
                self._report.stop(str(error))
                raise SystemExit(EXIT_ERROR) from None
            except Exception as error:
                # An error of grutrace must not stop the script.
                self._report.log(
                    f"the GRUs of {type(model).__qualname__} are not recorded: {error}"
                )
            self._known_layers.update(new_layers)

    def _replaces_freed_layer(self, layer: Any) -> bool:
        """Record a layer as the site of an earlier layer of the same line, which is freed.

        Some models (vocoders, for example) make a new cell in each call. All these cells are one
        site.
        """
        reference, part = self._standalone.get(_call_site(layer), (None, None))
        if part is None or reference is None or reference() is not None:
            return False
        part.replace_layer(layer)
        self._standalone[_call_site(layer)] = weakref.ref(layer), part
        return True

    def _record_layers(self, model: nn.Module, layers: list[nn.Module]) -> None:
        if self._part_manager is None:
            # Imported here because it loads h5py: until now the script could set its environment.
            from grutrace.run.run_tracer import PartManager

            self._part_manager = PartManager(self._settings, self._report)
        is_alone = layers == [model]
        part = self._part_manager.add(model, layers, self._known_layers, is_temporary=is_alone)
        if is_alone:
            self._standalone[_call_site(model)] = weakref.ref(model), part


def _call_site(layer: nn.Module) -> tuple[object, ...]:
    """Return the line of the script that calls a layer, and the class and sizes of the layer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_OWN_FOLDER, _TORCH_FOLDER)):
        frame = frame.f_back
    line = (frame.f_code, frame.f_lineno) if frame is not None else ()
    names = ("input_size", "hidden_size", "num_layers", "bidirectional", "bias")
    return (*line, type(layer), *(getattr(layer, name, None) for name in names))


def _make_call(kind: type[nn.Module], on_first_call: FirstCallCallback) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        on_first_call(self, args, kwargs)
        # Looked up in each call, because torch.fx replaces it while it traces.
        return super(kind, self).__call__(*args, **kwargs)  # type: ignore[misc]

    return __call__


def outermost_module(layer: nn.Module) -> nn.Module:
    """Return the outermost module that contains the layer and is running in this thread.

    Any method counts, not only ``forward``: decoders are often called through another one, and
    trainers call ``training_step``.
    """
    outermost: Any = layer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if owner is not outermost and _contains(owner, layer):
                outermost = owner
        frame = frame.f_back
    # The wrapper of torch.compile is not part of the model's paths.
    model: nn.Module = getattr(outermost, "_orig_mod", outermost)
    return model


def _contains(owner: Any, layer: nn.Module) -> bool:
    return issubclass(type(owner), nn.Module) and any(module is layer for module in owner.modules())
