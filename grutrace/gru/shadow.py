"""A shadow of one direction of one live layer: it recomputes the gates of a call that has run.

The replay is teacher-forced: every state that a step started from is known, since it is the
layer's own output, shifted by one step. So all steps are computed at once, and rounding cannot
build up from one step to the next. A recurrence that is run again from its first state can end
anywhere (trained GRUs can be chaotic); see docs/equations.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from grutrace.gru import cell
from grutrace.gru.kernel import CellWeights
from grutrace.gru.rounding import compare, largest, tolerance
from grutrace.gru.steps import Steps

#: Types that are too coarse to compute the replay in; it is done in float32 instead.
_HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Replay:
    """The gates of a call at one site, with the evidence that they are right.

    Attributes:
        gates: Each in the kernel's order and shape, (T, B, H) or (N, H).
        residual: Largest ``|replayed h - kernel's h|``; see `grutrace.gru.rounding.Evidence`.
        tolerance: The residual that rounding explains.
    """

    gates: cell.Gates
    residual: float
    tolerance: float


class Shadow:
    """Bound to one direction of one layer of a live module. It holds no copy of the weights.

    Args:
        module: The nn.GRU or nn.GRUCell.
        layer: Number of the layer, from 0.
        reverse: Whether to shadow the reverse direction.
    """

    def __init__(self, module: nn.GRU | nn.GRUCell, layer: int = 0, reverse: bool = False) -> None:
        self._module, self._layer, self._reverse = module, layer, reverse

    @property
    def weights(self) -> CellWeights:
        """The module's own weights, as the kernel would use them now."""
        if isinstance(self._module, nn.GRUCell):
            module = self._module
            return CellWeights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        each = 4 if self._module.bias else 2
        place = self._layer * (2 if self._module.bidirectional else 1) + self._reverse
        flat = cast("list[Tensor]", self._module._flat_weights)
        return CellWeights(*flat[place * each : (place + 1) * each])

    @torch.no_grad()
    def replay(
        self,
        input: Tensor,
        hidden: Tensor,
        initial: Tensor,
        steps: Steps,
        weights: CellWeights | None = None,
    ) -> Replay:
        """Recompute the gates of a call, all steps at once.

        Args:
            input: (T, B, I) or (N, I), what the layer read.
            hidden: (T, B, H) or (N, H), this direction's part of what the kernel returned.
            initial: (B, H), in the kernel's batch order.
            steps: The layout of the two above.
            weights: What the kernel used, if not the module's present weights.
        """
        weights = self.weights if weights is None else weights
        previous = steps.previous(hidden, initial, reverse=self._reverse)
        input, previous = _computable(input), _computable(previous)
        products = cell.products(input, previous, *_computable_weights(weights))
        gates = cell.gates(products)
        replayed = cell.step(gates, previous)
        found = compare(replayed, _computable(hidden), products)
        state = max(1.0, largest(initial))
        terms = input.shape[-1] + previous.shape[-1]
        allowed = tolerance(hidden.dtype, terms, state, found.product, found.recurrent)
        return Replay(gates, found.residual, allowed)


def _computable(values: Tensor) -> Tensor:
    return values.float() if values.dtype in _HALF_TYPES else values


def _computable_weights(weights: CellWeights) -> CellWeights:
    return CellWeights._make(None if each is None else _computable(each) for each in weights)
