"""Coming upon the GRUs of a running script: each when it is called for the first time.

The two classes get a ``__call__`` of their own. Other modules are left alone: their calls cost what
they cost before, and torch.compile finds nothing new in them.
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

_OWN_FOLDER, _TORCH_FOLDER = (str(Path(each.__file__ or "").parent) for each in (run, torch))
#: Exit code of a script that is ended because nothing of what was asked for is there.
EXIT_ERROR = 2

#: Called with a layer and the arguments that it is about to be called with.
FirstCallCallback: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Discovery:
    """Has every GRU recorded from its first call on, together with all others of the same model.

    Args:
        settings: Of the run.
        report: Told of what cannot be recorded.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._part_manager: PartManager | None = None
        self._known_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Layers that are in no model, by where they are called and what they look like.
        self._standalone: dict[
            tuple[object, ...], tuple[weakref.ref[nn.Module], PartTracer | None]
        ] = {}
        self._lock = threading.RLock()

    def start(self) -> None:
        """Look out from now on."""
        self._patch_call(self._on_first_call)
        # torch.compile would put what we do on a first call into its graphs.
        on_import("torch._dynamo", lambda: self._patch_call(disable_compile(self._on_first_call)))
        # A forked child has neither the threads that write nor the right to the files.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.stop)

    def _patch_call(self, on_first_call: FirstCallCallback) -> None:
        for kind in GRU_CLASSES:
            kind.__call__ = _make_call(kind, on_first_call)  # type: ignore[method-assign]

    def stop(self) -> None:
        """Look out no longer."""
        for kind in GRU_CLASSES:
            if "__call__" in vars(kind):
                del kind.__call__

    def _on_first_call(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if layer in self._known_layers:
            return
        missed = unsupported_reason((*args, *kwargs.values()))
        if missed is not None:
            # A model that is being turned into a graph may be a copy with paths of its own.
            self._report.log(
                f"a call of {type(layer).__qualname__} was not recorded: {missed.reason}"
            )
            return
        with self._lock:
            if layer in self._known_layers:
                return
            if getattr(layer, "_is_replica", False):
                # Made anew for every call.
                self._report.log("the replicas of an nn.DataParallel are not recorded")
                return
            model = outermost_module(layer)
            if model is layer and self._replaces_freed_layer(layer):
                self._known_layers.add(layer)
                return
            new: list[nn.Module] = [
                each
                for each in model.modules()
                if isinstance(each, GRU_CLASSES) and each not in self._known_layers
            ]
            self._report.called = True
            try:
                self._record_layers(model, new)
            except NoMatchingSite as error:
                self._report.stop(str(error))
                raise SystemExit(EXIT_ERROR) from None
            except Exception as error:
                # Whatever it is, it is not the script's: that one goes on without us.
                self._report.log(
                    f"the GRUs of {type(model).__qualname__} are not recorded: {error}"
                )
            self._known_layers.update(new)

    def _replaces_freed_layer(self, layer: Any) -> bool:
        """Record a layer in the place of one that was made before it by the same line, and is gone.

        A model can make a cell anew in each call (as some vocoders do). All of them are one site.
        """
        before, part = self._standalone.get(_call_site(layer), (None, None))
        if part is None or before is None or before() is not None:
            return False
        part.replace_layer(layer)
        self._standalone[_call_site(layer)] = weakref.ref(layer), part
        return True

    def _record_layers(self, model: nn.Module, layers: list[nn.Module]) -> None:
        if self._part_manager is None:
            # Here, since it loads h5py, for which the script may still prepare.
            from grutrace.run.run_tracer import PartManager

            self._part_manager = PartManager(self._settings, self._report)
        is_alone = layers == [model]
        part = self._part_manager.add(model, layers, self._known_layers, is_temporary=is_alone)
        if is_alone:
            self._standalone[_call_site(model)] = weakref.ref(model), part


def _call_site(layer: nn.Module) -> tuple[object, ...]:
    """Return where in the script a layer is called, and what makes it like another."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_OWN_FOLDER, _TORCH_FOLDER)):
        frame = frame.f_back
    place = (frame.f_code, frame.f_lineno) if frame is not None else ()
    names = ("input_size", "hidden_size", "num_layers", "bidirectional", "bias")
    return (*place, type(layer), *(getattr(layer, name, None) for name in names))


def _make_call(kind: type[nn.Module], on_first_call: FirstCallCallback) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        on_first_call(self, args, kwargs)
        # Looked up anew each time: torch.fx puts another in its place while it traces.
        return super(kind, self).__call__(*args, **kwargs)  # type: ignore[misc]

    return __call__


def outermost_module(layer: nn.Module) -> nn.Module:
    """Return the outermost module that has the layer in it and a method running in this thread.

    A method other than ``forward`` counts too: decoders are often called through one, and so is
    what trainers call ``training_step``.
    """
    found: Any = layer
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if owner is not found and _contains(owner, layer):
                found = owner
        frame = frame.f_back
    # What torch.compile has put around a model is not of the model's own paths.
    model: nn.Module = getattr(found, "_orig_mod", found)
    return model


def _contains(owner: Any, layer: nn.Module) -> bool:
    return issubclass(type(owner), nn.Module) and any(each is layer for each in owner.modules())
