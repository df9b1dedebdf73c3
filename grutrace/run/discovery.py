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
from grutrace.run.import_hook import when_imported
from grutrace.run.matching import NoSiteMatches
from grutrace.run.report import Report
from grutrace.run.settings import Settings

if TYPE_CHECKING:
    from grutrace.run.run_tracer import Keeper, Part

KINDS = (nn.GRU, nn.GRUCell)

_OURS, _TORCH = (str(Path(each.__file__ or "").parent) for each in (run, torch))
#: Exit code of a script that is ended because nothing of what was asked for is there.
CANNOT = 2

#: Called with a layer and the arguments that it is about to be called with.
Meet: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Discovery:
    """Has every GRU recorded from its first call on, together with all others of the same model.

    Args:
        settings: Of the run.
        report: Told of what cannot be recorded.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._keeper: Keeper | None = None
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Layers that are in no model, by where they are called and what they look like.
        self._alone: dict[tuple[object, ...], tuple[weakref.ref[nn.Module], Part | None]] = {}
        self._lock = threading.RLock()

    def start(self) -> None:
        """Look out from now on."""
        self._put_on(self._meet)
        # torch.compile would put what we do on a first call into its graphs.
        when_imported("torch._dynamo", lambda: self._put_on(disable_compile(self._meet)))
        # A forked child has neither the threads that write nor the right to the files.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.stop)

    def _put_on(self, meet: Meet) -> None:
        for kind in KINDS:
            kind.__call__ = _calling(kind, meet)  # type: ignore[method-assign]

    def stop(self) -> None:
        """Look out no longer."""
        for kind in KINDS:
            if "__call__" in vars(kind):
                del kind.__call__

    def _meet(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer in self._known:
            return
        missed = unsupported_reason((*args, *kwargs.values()))
        if missed is not None:
            # A model that is being turned into a graph may be a copy with paths of its own.
            self._report.say(
                f"a call of {type(layer).__qualname__} was not recorded: {missed.reason}"
            )
            return
        with self._lock:
            if layer in self._known:
                return
            if getattr(layer, "_is_replica", False):
                # Made anew for every call.
                self._report.say("the replicas of an nn.DataParallel are not recorded")
                return
            model = outermost(layer)
            if model is layer and self._follows(layer):
                self._known.add(layer)
                return
            new: list[nn.Module] = [
                each
                for each in model.modules()
                if isinstance(each, KINDS) and each not in self._known
            ]
            self._report.called = True
            try:
                self._keep(model, new)
            except NoSiteMatches as error:
                self._report.stop(str(error))
                raise SystemExit(CANNOT) from None
            except Exception as error:
                # Whatever it is, it is not the script's: that one goes on without us.
                self._report.say(
                    f"the GRUs of {type(model).__qualname__} are not recorded: {error}"
                )
            self._known.update(new)

    def _follows(self, layer: Any) -> bool:
        """Record a layer in the place of one that was made before it by the same line, and is gone.

        A model can make a cell anew in each call (as some vocoders do). All of them are one site.
        """
        before, part = self._alone.get(_made_by(layer), (None, None))
        if part is None or before is None or before() is not None:
            return False
        part.follow(layer)
        self._alone[_made_by(layer)] = weakref.ref(layer), part
        return True

    def _keep(self, model: nn.Module, layers: list[nn.Module]) -> None:
        if self._keeper is None:
            # Here, since it loads h5py, for which the script may still prepare.
            from grutrace.run.run_tracer import Keeper

            self._keeper = Keeper(self._settings, self._report)
        is_alone = layers == [model]
        part = self._keeper.add(model, layers, self._known, is_temporary=is_alone)
        if is_alone:
            self._alone[_made_by(model)] = weakref.ref(model), part


def _made_by(layer: nn.Module) -> tuple[object, ...]:
    """Return where in the script a layer is called, and what makes it like another."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_OURS, _TORCH)):
        frame = frame.f_back
    place = (frame.f_code, frame.f_lineno) if frame is not None else ()
    names = ("input_size", "hidden_size", "num_layers", "bidirectional", "bias")
    return (*place, type(layer), *(getattr(layer, name, None) for name in names))


def _calling(kind: type[nn.Module], meet: Meet) -> Callable[..., Any]:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        meet(self, args, kwargs)
        # Looked up anew each time: torch.fx puts another in its place while it traces.
        return super(kind, self).__call__(*args, **kwargs)  # type: ignore[misc]

    return __call__


def outermost(layer: nn.Module) -> nn.Module:
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
            if owner is not found and _holds(owner, layer):
                found = owner
        frame = frame.f_back
    # What torch.compile has put around a model is not of the model's own paths.
    model: nn.Module = getattr(found, "_orig_mod", found)
    return model


def _holds(owner: Any, layer: nn.Module) -> bool:
    return issubclass(type(owner), nn.Module) and any(each is layer for each in owner.modules())
