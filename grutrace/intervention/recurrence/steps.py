"""The steps of one direction of a layer: their order, their gates and their states.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from grutrace.gru.kernel import CellWeights
from grutrace.intervention.recurrence.edits import EditsByTime


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


class DirectionRun(NamedTuple):
    """One direction of a layer, to be run from the first step that is set.

    Attributes:
        input: (T, B, I) or (N, I)
        initial: (B, H)
        weights: Of the direction.
        order: The steps.
        edits: Returns what is set at a time.
        kernel: The kernel's output and final states of this direction; None if `start` is 0.
        start: Index, in this order, of the first step to run.
        keep_gates: Whether the gates are returned.
        is_cell: Whether the kernel is that of a cell.
    """

    input: Tensor
    initial: Tensor
    weights: CellWeights
    order: StepOrder
    edits: EditsByTime
    kernel: tuple[Tensor, Tensor] | None
    start: int
    keep_gates: bool
    is_cell: bool

    @property
    def kernel_states(self) -> tuple[Tensor, Tensor]:
        """The kernel's output and final states, which are there if `start` is not 0."""
        assert self.kernel is not None
        return self.kernel

    def input_product(self) -> Tensor:
        """Return the product of the input of all steps, (T, B, 3H) or (N, 3H), as the kernel does.

        The product of a cell has two axes.
        """
        input = self.input[0] if self.is_cell else self.input
        product = linear(input, self.weights.weight_ih, self.weights.bias_ih)
        return product.unsqueeze(0) if self.is_cell else product

    def untouched(self) -> slice:
        """Return the times, or the rows if packed, before the first step to run."""
        order, first = self.order, self.order.times[self.start]
        boundary = first + order.reverse
        if not order.padded:
            boundary = sum(order.sizes[:boundary])
        return slice(boundary, None) if order.reverse else slice(boundary)


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
