"""GRUs that a model got after its tracer was created: replaced, added, or created in a call."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple

from torch import nn

from grutrace.capture.kernel_calls.caller import is_called_within
from grutrace.capture.kernel_calls.observation import GRUModule
from grutrace.records import ModuleInfo


class ModuleLocation(NamedTuple):
    """The location of a GRU in a model.

    Attributes:
        path: Its path; None if it is no part of the model.
        replaces: The path of the recorded module that it replaces, with the same sites.
        reason: Why its calls are not recorded; None if they are, or if it does not belong to the
            model.
    """

    path: str | None
    replaces: str | None = None
    reason: str | None = None


def locate_module(
    module: GRUModule, model: nn.Module, recorded: Mapping[str, ModuleInfo], frame: FrameType
) -> ModuleLocation:
    """Find where a new GRU is in a model.

    Args:
        module: The GRU, which the model did not contain when the tracer was created.
        model: The model.
        recorded: Descriptions of the recorded modules, by path.
        frame: The frame that calls the GRU.
    """
    path = next((path for path, submodule in model.named_modules() if submodule is module), None)
    if path is not None and path in recorded:
        if _has_sites_of(recorded[path], module):
            return ModuleLocation(path, replaces=path)
        return ModuleLocation(
            None,
            reason=f"{path or 'the model'} was replaced by a layer of another shape after the "
            "tracer was created: its calls are not recorded. Create a new tracer",
        )
    if path is not None:
        return ModuleLocation(
            path,
            reason=f"{path} was added after the tracer was created: its calls are not recorded. "
            "Create a new tracer",
        )
    if not is_called_within(model, frame):
        return ModuleLocation(None)
    return ModuleLocation(
        None,
        reason=f"a {type(module).__qualname__} that is not part of the model was called within it "
        "(is it created in each call?): its calls are not recorded. To record them, make it an "
        "attribute of a module of the model",
    )


def _has_sites_of(described: ModuleInfo, module: GRUModule) -> bool:
    """Whether a module has the sites and shapes of a recorded module."""
    if isinstance(module, nn.GRUCell):
        layers, bidirectional, kind = 1, False, "GRUCell"
    else:
        layers, bidirectional, kind = module.num_layers, module.bidirectional, "GRU"
    actual = (kind, module.input_size, module.hidden_size, layers, bidirectional, bool(module.bias))
    return actual == (
        described.kind,
        described.input_size,
        described.hidden_size,
        described.num_layers,
        described.bidirectional,
        described.bias,
    )
