"""GRUs that are no nn.GRU and no nn.GRUCell: what they are, and what to do instead.

They are told by what they are, not by what they are called: a class of one's own may be called
GRU and be anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

_KINDS = ("GRU", "GRUCell")

#: Where torch keeps quantized layers. In some versions of it, importing them warns.
_QUANTIZED = "torch.ao.nn.quantized"

_COMPILED = (
    "is a GRU inside TorchScript: trace the model before torch.jit.script or torch.jit.trace"
)
_IS_QUANTIZED = "is a quantized GRU: trace the float model that it was made from"
_IS_COMPLEX = "is complex, so its gates are no numbers from 0 to 1: only real layers are traced"
_IN_PYTHON = (
    "is a GRU of its own ({}), which does not call PyTorch's kernel: read its gates in its code, "
    "or put nn.GRU in its place"
)


@dataclass(frozen=True)
class LookAlike:
    """A module that computes a GRU, and cannot be traced.

    Attributes:
        path: Its path in the model; empty if it is the model itself.
        reason: Why not, and what to do instead.
    """

    path: str
    reason: str


def find_look_alikes(model: nn.Module) -> Iterator[LookAlike]:
    """Yield every GRU of the model that cannot be traced."""
    for path, module in model.named_modules():
        reason = _reason(module)
        if reason is not None:
            yield LookAlike(path, reason)


def is_complex(module: nn.Module) -> bool:
    """Whether the weights of a layer are complex, which PyTorch allows."""
    return any(each.is_complex() for each in module.parameters())


def _reason(module: nn.Module) -> str | None:
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _IS_COMPLEX if is_complex(module) else None
    if isinstance(module, torch.jit.ScriptModule):
        of_gru = module.original_name in _KINDS or getattr(module, "mode", None) == "GRU"
        return _COMPILED if of_gru else None
    kind = type(module)
    if kind.__module__.startswith(_QUANTIZED) and kind.__name__ in _KINDS:
        return _IS_QUANTIZED
    of_rnn = isinstance(module, nn.RNNBase) and module.mode == "GRU"
    if of_rnn or (isinstance(module, nn.RNNCellBase) and kind.__name__ == "GRUCell"):
        return _IN_PYTHON.format(f"{kind.__module__}.{kind.__qualname__}")
    return None
