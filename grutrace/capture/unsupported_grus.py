"""GRUs of a model that cannot be traced, why, and what to do instead.

These are TorchScript, quantized and complex layers, GRUs of Keras, and GRUs written in Python. They
are recognized by type, not by class name, because any class may be called GRU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

_KINDS = ("GRU", "GRUCell")

#: The module of torch's quantized layers. Importing it causes a warning in some versions.
_QUANTIZED_MODULE = "torch.ao.nn.quantized"

_SCRIPTED = (
    "is a GRU inside TorchScript: trace the model before torch.jit.script or torch.jit.trace, or "
    'the nn.GRU of grutrace.convert(gru.state_dict(), "pytorch")'
)
_QUANTIZED = (
    "is a quantized GRU: trace the original float model, or, to its rounding, the nn.GRU of "
    'grutrace.convert({**gru.get_weight(), **gru.get_bias()}, "pytorch")'
)
_COMPLEX = "is complex: its gates are not numbers from 0 to 1, so only real layers can be traced"
_CUSTOM = (
    "is a GRU implementation of its own ({}), which does not call PyTorch's kernel: read the gates "
    "in its code, or, if its equations are PyTorch's, replace it with the nn.GRU of "
    'grutrace.convert(gru.state_dict(), "pytorch")'
)
_KERAS = (
    "is a Keras GRU, which does not call PyTorch's kernel: replace it with the nn.GRU of "
    'grutrace.convert(layer.get_weights(), "keras")'
)


@dataclass(frozen=True)
class UnsupportedGRU:
    """A module that computes a GRU but cannot be traced.

    Attributes:
        path: Its path in the model; empty if it is the model itself.
        reason: Why it cannot be traced, and what to do instead.
    """

    path: str
    reason: str

    def matches(self, globs: Iterable[str]) -> bool:
        """Whether a glob matches a site name that the module would have."""
        names = [f"{self.path}.{suffix}".lstrip(".") for suffix in ("l0", "cell")]
        return any(fnmatchcase(name, glob) for name in names for glob in globs)


def find_unsupported_grus(model: nn.Module) -> Iterator[UnsupportedGRU]:
    """Yield the GRUs of a model that cannot be traced."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        reason = None if path.startswith(inside) else _unsupported_reason(module)
        if reason is not None:
            yield UnsupportedGRU(path, reason)
        if reason is _KERAS:
            # The layer has a cell inside.
            inside += (f"{path}." if path else "",)


def describe_unsupported(unsupported: Iterable[UnsupportedGRU]) -> str:
    """Return a text with the reason for each module."""
    return "; ".join(f"{gru.path or 'the model'} {gru.reason}" for gru in unsupported)


def is_complex(module: nn.Module) -> bool:
    """Whether the weights of a layer are complex."""
    return any(parameter.is_complex() for parameter in module.parameters())


def _unsupported_reason(module: nn.Module) -> str | None:
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _COMPLEX if is_complex(module) else None
    if isinstance(module, torch.jit.ScriptModule):
        is_gru = module.original_name in _KINDS or getattr(module, "mode", None) == "GRU"
        return _SCRIPTED if is_gru else None
    kind = type(module)
    if kind.__module__.startswith(_QUANTIZED_MODULE) and kind.__name__ in _KINDS:
        return _QUANTIZED
    if any(_is_keras(parent) for parent in kind.__mro__):
        return _KERAS
    is_custom_gru = isinstance(module, nn.RNNBase) and module.mode == "GRU"
    is_custom_cell = isinstance(module, nn.RNNCellBase) and kind.__name__ == "GRUCell"
    if is_custom_gru or is_custom_cell:
        return _CUSTOM.format(f"{kind.__module__}.{kind.__qualname__}")
    return None


def _is_keras(kind: type) -> bool:
    return kind.__module__.startswith("keras.") and kind.__name__ in _KINDS
