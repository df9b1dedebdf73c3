"""The steps of one direction of a layer: their order, their gates and their states.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from grutrace.gru.kernel import CellWeights


class StepGates(NamedTuple):
    """The gates of one step as they were set, and the state before it was set, (b, H) each."""

    reset: Tensor
    update: Tensor
    candidate: Tensor
    computed_hidden: Tensor


class StepOrder(NamedTuple):
    """The steps of one direction of a call, in the order in which it makes them.

    Attributes:
        times: The time of each.
        sizes: (T,) by time, the number of sequences that have it.
        reverse: Whether it is the reverse direction.
        padded: Whether all sequences have all times.
    """

    times: range
    sizes: Sequence[int]
    reverse: bool
    padded: bool


class DirectionResult(NamedTuple):
    """States of one direction of a layer.

    Attributes:
        output: (T, B, H) or (N, H).
        final: (B, H)
        gates: By time, the gates of the steps that were run.
    """

    output: Tensor
    final: Tensor
    gates: dict[int, StepGates]


def input_product(input: Tensor, weights: CellWeights, *, is_cell: bool) -> Tensor:
    """Return the product of the input of all steps, (T, B, 3H) or (N, 3H), as the kernel does.

    Args:
        input: (T, B, I) or (N, I)
        weights: Of the direction.
        is_cell: Whether the kernel is that of a cell, whose product has two axes.
    """
    product = linear(input[0] if is_cell else input, weights.weight_ih, weights.bias_ih)
    return product.unsqueeze(0) if is_cell else product
