"""A shadow of one direction of one live layer: it recomputes the gates of a call that has run.

The replay is teacher-forced: every state that a step started from is known, since it is the
layer's own output, shifted by one step. So all steps are computed at once, and rounding cannot
build up from one step to the next. A recurrence that is run again from its first state can end
anywhere (trained GRUs can be chaotic); see docs/equations.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from grutrace.gru import cell
from grutrace.gru.kernel import CellWeights
from grutrace.gru.rounding import (
    Evidence,
    coarsest,
    compare,
    largest,
    largest_sum,
    numbers,
    rounded,
    sizes,
    spacing,
    summarize,
    tolerance,
)
from grutrace.gru.steps import Room, Steps, copy_rounded, numpy_type
from grutrace.record import GATES

#: Elements of the two products that are made at once, so that what follows finds them in the
#: processor's cache; but rows enough for products at full speed.
BLOCK, SMALLEST_BLOCK = 384 * 1024, 256


@dataclass(frozen=True)
class Replay:
    """The gates of a call at one site, with the evidence that they are right.

    Attributes:
        gates: By name, each in the kernel's order and shape, (T, B, H) or (N, H).
        residual: Largest ``|replayed h - kernel's h|``; see `grutrace.gru.rounding.Evidence`.
        tolerance: The residual that rounding explains.
        precision: Spacing at 1 of the coarsest type in which the kernel computed.
    """

    gates: Mapping[str, Tensor]
    residual: float
    tolerance: float
    precision: float


class Shadow:
    """Bound to one direction of one layer of a live module, which it does not keep alive.

    Args:
        module: The nn.GRU or nn.GRUCell; None where the weights are always given.
        layer: Number of the layer, from 0.
        reverse: Whether to shadow the reverse direction.
        stored: The type in which rows are kept, if it is another than the kernel's: what it
            rounds is part of the tolerance then, though not of the residual.
    """

    def __init__(
        self,
        module: nn.GRU | nn.GRUCell | None,
        layer: int = 0,
        reverse: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        self._reference = None if module is None else weakref.ref(module)
        self._layer, self._reverse = layer, reverse
        self._stored = stored

    @property
    def weights(self) -> CellWeights:
        """The module's own weights, as the kernel would use them now."""
        module = None if self._reference is None else self._reference()
        if module is None:
            raise ValueError("expected weights, or a module that still exists")
        if isinstance(module, nn.GRUCell):
            return CellWeights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        each = 4 if module.bias else 2
        place = self._layer * (2 if module.bidirectional else 1) + self._reverse
        flat = cast("list[Tensor]", module._flat_weights)
        return CellWeights(*flat[place * each : (place + 1) * each])

    @torch.no_grad()
    def replay(
        self,
        input: Tensor,
        hidden: Tensor,
        initial: Tensor,
        steps: Steps,
        weights: CellWeights | None = None,
        rooms: Mapping[str, Room] | None = None,
    ) -> Replay:
        """Recompute the gates of a call, all steps at once, in the kernel's own precision.

        That is the type of the input and weights, or of autocast where it is on: call it where
        the kernel was called. The gates are the kernel's to rounding in that type; in half
        precision, a replay in float32 would differ from them by thousandths. On a CPU two replays
        of the same call, with as many threads, are the same bits: see `cell.product`.

        Args:
            input: (T, B, I) or (N, I), what the layer read.
            hidden: (T, B, H) or (N, H), this direction's part of what the kernel returned.
            initial: (B, H), in the kernel's batch order.
            steps: The layout of the two above.
            weights: What the kernel used, if not the module's present weights.
            rooms: By name of the gate, where to write those that are wanted; new memory if None.
        """
        weights = self.weights if weights is None else weights
        if rooms is None:
            kept = numpy_type(hidden.dtype)
            rooms = {name: steps.room(hidden.shape[-1], kept) for name in GATES}
        size = max(SMALLEST_BLOCK, BLOCK // (6 * hidden.shape[-1]))
        extremes, product = [], input.dtype
        blocks = steps.blocks(hidden, initial, size, reverse=self._reverse)
        for part, previous in blocks if hidden.numel() else ():
            products = cell.products(input[part], previous, *weights)
            bounds = sizes(products)
            gates = cell.gates_in_place(products)
            for name, room in rooms.items():
                copy_rounded(room.values[part], getattr(gates, name))
            off = torch.aminmax(cell.step(gates, previous).sub_(hidden[part]))
            extremes.append(numbers((*off, *bounds)))
            product = products.input.dtype
        found = summarize(extremes)
        if found is None:
            previous = steps.previous(hidden, initial, reverse=self._reverse)
            products = cell.products(input, previous, *weights)
            found = compare(cell.step(cell.gates(products), previous), hidden, products)
        written = {name: room.values for name, room in rooms.items()}
        dtype = coarsest(hidden.dtype, product)
        return Replay(written, *judge(found, dtype, input, hidden, initial, weights, self._stored))


class Judgement(NamedTuple):
    """The last fields of a `Replay`."""

    residual: float
    tolerance: float
    precision: float


def judge(
    found: Evidence,
    dtype: torch.dtype,
    input: Tensor,
    hidden: Tensor,
    initial: Tensor,
    weights: CellWeights,
    stored: torch.dtype | None,
) -> Judgement:
    """Work out how much of what was found rounding explains.

    Args:
        found: What comparing the states gave.
        dtype: The coarsest type in which the kernel computed.
        input: As for `Shadow.replay`.
        hidden: Likewise.
        initial: Likewise.
        weights: Those rows of the weights that were used.
        stored: The type in which rows are kept, if it is another.
    """
    state = max(1.0, largest(initial))
    terms = input.shape[-1] + hidden.shape[-1]
    allowed = tolerance(dtype, terms, state, found.product, found.recurrent)
    if stored is not None and spacing(stored) > spacing(dtype):
        # The states before the steps are among these.
        sums = largest_sum([input], weights.weight_ih)
        sums += largest_sum([hidden, initial], weights.weight_hh)
        allowed += rounded(stored, state, sums, found.recurrent)
    return Judgement(found.residual, allowed, spacing(dtype))
