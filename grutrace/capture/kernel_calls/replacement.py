"""Replace the output of a kernel call: the data passed to an intervention, and its result.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grutrace.gru.kernel import KernelCall, Layer
from grutrace.gru.layout import SequenceLayout
from grutrace.gru.tolerance import ReplayError


class InterceptedCall(NamedTuple):
    """A kernel call that has not run yet.

    Attributes:
        call: The arguments of the kernel.
        layout: The layout of the call's steps.
        run_layer: Runs PyTorch's kernel for one layer, given its number and its input, as
            `KernelCall.run_layer` does.
        needs_gates: Whether the call is recorded.
        is_recompute: Whether activation checkpointing repeats an earlier call.
        is_cell: Whether the kernel is that of nn.GRUCell.
    """

    call: KernelCall
    layout: SequenceLayout
    run_layer: Callable[[int, Tensor], tuple[Layer, Tensor]]
    needs_gates: bool
    is_recompute: bool
    is_cell: bool


class GatesAsSet(NamedTuple):
    """The gates of one direction of a layer, as an intervention has set them.

    Attributes:
        gates: By name, in the kernel's order, (T, B, H) or (N, H).
        error: The distance between the states and those that the gates lead to, apart from states
            that were set.
        dtype: Data type in which the gates were computed.
        codes: (T, B, 1) or (N, 1), of each row, the number of its text plus 1; 0 where nothing was
            set.
        texts: Names of the quantities that were set, such as ``update[3,7] hidden``.
        units: For each text, by name, the units of the gates that were set, directly or by their
            pre-activation.
    """

    gates: dict[str, Tensor]
    error: ReplayError
    dtype: torch.dtype
    codes: Tensor
    texts: list[str]
    units: list[dict[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the gates and codes."""
        return self.codes.nbytes + sum(gate.nbytes for gate in self.gates.values())


class ReplacedCall(NamedTuple):
    """The result of a call whose output was replaced.

    Attributes:
        output: (T, B, D * H), or (N, D * H) if it is packed.
        final: (L * D, B, H) in the kernel's batch order.
        layers: Input and output of each layer, from the lowest to the top.
        gates: By layer and direction, the gates as they were set; None for a layer of which nothing
            was set, and if they were not asked for.
    """

    output: Tensor
    final: Tensor
    layers: list[Layer]
    gates: list[list[GatesAsSet] | None]


class PreparedCall(Protocol):
    """A call whose output may be replaced."""

    @property
    def is_changed(self) -> bool:
        """Whether the output may differ from the kernel's. If not, the kernel runs as usual."""

    def run(self) -> ReplacedCall:
        """Compute the output."""

    def finish(self, final: Tensor) -> None:
        """Note the final states of the call, (L * D, B, H) in the kernel's batch order."""


class Replacement(Protocol):
    """Replaces the output of the calls of a module."""

    def prepare(self, active: Sequence[Replacement], call: InterceptedCall) -> PreparedCall:
        """Prepare a call.

        Args:
            active: All replacements of the module, this one first, in the order in which they
                take effect.
            call: The call.
        """
