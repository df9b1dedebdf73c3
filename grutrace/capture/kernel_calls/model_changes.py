"""GRUs that a model did not have when its tracer was made: exchanged, added, or made in a call."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple

from torch import nn

from grutrace.capture.kernel_calls.observation import GRUModule
from grutrace.capture.kernel_calls.subscription import method_owner
from grutrace.records import ModuleInfo


class Place(NamedTuple):
    """Where a GRU is in a model.

    Attributes:
        path: Its path; None if it is no part of the model.
        replaces: The path of the recorded module whose place it has taken, and whose sites it has.
        reason: Why its calls are not recorded; None where they are, or where it has nothing to do
            with the model.
    """

    path: str | None
    replaces: str | None = None
    reason: str | None = None


def locate_module(
    module: GRUModule, model: nn.Module, recorded: Mapping[str, ModuleInfo], frame: FrameType
) -> Place:
    """Find out what a GRU is to a model.

    Args:
        module: The GRU, which the model did not have.
        model: The model.
        recorded: By path, what is recorded of the modules that it had.
        frame: In which the GRU is called.
    """
    path = next((path for path, each in model.named_modules() if each is module), None)
    if path is not None and path in recorded:
        if _has_sites_of(recorded[path], module):
            return Place(path, replaces=path)
        return Place(
            None,
            reason=f"{path or 'the model'} was replaced by a layer of another shape after the "
            "tracer was made: its calls are not recorded. Make a new tracer",
        )
    if path is not None:
        return Place(
            path,
            reason=f"{path} was added after the tracer was made: its calls are not recorded. Make "
            "a new tracer",
        )
    if not _is_called_within(model, frame):
        return Place(None)
    return Place(
        None,
        reason=f"a {type(module).__qualname__} that is no part of the model was called within it "
        "(made anew in each call?): its calls are not recorded. Make it an attribute of a module "
        "of the model to have it recorded",
    )


def _has_sites_of(described: ModuleInfo, module: GRUModule) -> bool:
    if isinstance(module, nn.GRUCell):
        layers, bidirectional, kind = 1, False, "GRUCell"
    else:
        layers, bidirectional, kind = module.num_layers, module.bidirectional, "GRU"
    found = (kind, module.input_size, module.hidden_size, layers, bidirectional, bool(module.bias))
    return found == (
        described.kind,
        described.input_size,
        described.hidden_size,
        described.num_layers,
        described.bidirectional,
        described.bias,
    )


def _is_called_within(model: nn.Module, frame: FrameType) -> bool:
    """Whether a method of a module of the model is running."""
    modules = set(map(id, model.modules()))
    above: FrameType | None = frame
    while above is not None:
        if id(method_owner(above)) in modules:
            return True
        above = above.f_back
    return False
