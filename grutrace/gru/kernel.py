"""One call of PyTorch's fused kernel, and the states of the lower layers of a stack.

The fused kernel runs all layers and returns the states of the top layer only. There are two ways to
get the others. On a CPU both give the same bits as the fused call, and the same RNG state:

- *split* replaces the fused call with one call per layer. Nothing runs twice.
- *rerun* leaves the fused call as it is, and runs the lower layers again afterwards.

Both directions of a layer always run together. A direction alone, on a flipped input, would differ
in the last bits, which a chaotic network amplifies.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from grutrace.gru import kernel_gates
from grutrace.gru.gate_copies import CallShape, GateRequest, UnitsByGate
from grutrace.gru.kernel_gates import KernelGates

Result = TypeVar("Result")


class CellWeights(NamedTuple):
    """The weights of one direction of one layer. Biases are None if it has none."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


class Layer(NamedTuple):
    """Input and output of one layer in a call.

    Attributes:
        input: (T, B, I) or packed (N, I); for layers above the first after dropout.
        output: (T, B, D * H) or packed (N, D * H), before dropout.
        gates: By direction, the kernel's own gates; None if they were not copied.
    """

    input: Tensor
    output: Tensor
    gates: list[KernelGates] | None = None


class KernelCall(NamedTuple):
    """The arguments of one call of torch.gru or torch.gru_cell, in one form for both.

    Attributes:
        input: (T, B, I), also if the module is batch_first, or packed (N, I).
        batch_sizes: (T,) of a packed input, else None.
        initial: (L * D, B, H).
        weights: Flat, as torch.gru takes them.
    """

    input: Tensor
    batch_sizes: Tensor | None
    initial: Tensor
    weights: list[Tensor]
    bias: bool
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False

    @classmethod
    def of_gru(cls, *args: Any) -> KernelCall:
        """Read the positional arguments of torch.gru, with a padded or a packed input."""
        if isinstance(args[2], Tensor):
            # Packed: the fields of this class, in the same order.
            return cls(*args)
        input, initial, weights, *options, batch_first = args
        input = input.transpose(0, 1) if batch_first else input
        return cls(input, None, initial, weights, *options)

    @property
    def directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is applied between the layers of this call."""
        return self.training and self.dropout > 0 and self.num_layers > 1

    def cell_weights(self, layer: int, reverse: bool) -> CellWeights:
        """Return the weights of one direction of one layer."""
        count = 4 if self.bias else 2
        start = (layer * self.directions + reverse) * count
        return CellWeights(*self.weights[start : start + count])

    def cell_initial(self, layer: int, reverse: bool) -> Tensor:
        """Return the initial state of one direction of one layer, (B, H)."""
        return self.initial[layer * self.directions + reverse]

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return len(self.input if self.batch_sizes is None else self.batch_sizes)

    def run_layer(self, layer: int, input: Tensor) -> tuple[Layer, Tensor]:
        """Run one layer, both directions, through the fused kernel.

        Args:
            layer: Number of the layer.
            input: (T, B, I) or packed (N, I)

        Returns:
            The input and output of the layer, and its final states (D, B, H).
        """
        count = self.directions * (4 if self.bias else 2)
        weights = self.weights[layer * count : (layer + 1) * count]
        initial = self.initial[layer * self.directions : (layer + 1) * self.directions]
        options = (self.bias, 1, 0.0, self.training, self.bidirectional)
        # torch._VF instead of torch.gru, so that the user's function modes do not see the call.
        if self.batch_sizes is None:
            output, final = torch.gru(input, initial, weights, *options, False)
        else:
            output, final = torch.gru(input, self.batch_sizes, initial, weights, *options)
        return Layer(input, output), final

    def should_copy_kernel_gates(self, request: GateRequest) -> bool:
        """Return whether the gates of all layers can be copied, at a lower cost than a replay."""
        width, (_, _, size) = self.input.shape[-1], self.initial.shape
        batch = self.input.numel() / max(1, self.num_steps * width)
        widths = [width, *[self.directions * size] * (self.num_layers - 1)]
        return kernel_gates.is_cheaper(
            self.num_steps, batch, sum(widths) / len(widths), size, request
        ) and kernel_gates.can_intercept(self.input)

    def copy_kernel_gates(
        self, run: Callable[[], Result], columns: UnitsByGate
    ) -> tuple[Result, list[list[KernelGates]] | None]:
        """Copy gates of all layers while a function makes this call.

        Args:
            run: Makes the call, as one call of the kernel or layer by layer.
            columns: Units to copy from each direction of each layer, by gate name.

        Returns:
            The result of the function, and the gates by layer and direction; None if the kernel
            computed them in an unexpected way.
        """
        _, batch, size = self.initial.shape
        sizes = self.batch_sizes
        rows = [batch] * self.num_steps if sizes is None else sizes.tolist()
        result, copied = kernel_gates.copy_kernel_gates(
            run,
            CallShape(rows, sizes is None, size, self.input.dtype),
            [bool(direction) for direction in range(self.directions)] * self.num_layers,
            columns,
        )
        if copied is None:
            return result, None
        starts = range(0, len(copied), self.directions)
        return result, [copied[start : start + self.directions] for start in starts]

    def between_layers(self, output: Tensor) -> Tensor:
        """Return the input of the next layer: the output of this layer, with dropout."""
        if self.dropout > 0:
            return torch.dropout(output, self.dropout, self.training)
        return output


def run_layerwise(call: KernelCall) -> tuple[Tensor, Tensor, list[Layer]]:
    """Run a call as one fused call per layer.

    Returns:
        The output (T, B, D * H) or (N, D * H) and the final states (L * D, B, H), as the stacked
        call would have returned them, and the input and output of each layer.
    """
    layers: list[Layer] = []
    finals: list[Tensor] = []
    input = call.input
    for number in range(call.num_layers):
        if number:
            input = call.between_layers(layers[-1].output)
        layer, final = call.run_layer(number, input)
        layers.append(layer)
        finals.append(final)
    # torch.cat would change the strides of a single tensor.
    return layers[-1].output, finals[0] if len(finals) == 1 else torch.cat(finals), layers


@torch.no_grad()
def rerun_lower_layers(
    call: KernelCall,
    output: Tensor,
    generator_state: Tensor | None,
) -> list[Layer]:
    """Run the layers below the top again, after the fused call.

    Args:
        call: The call.
        output: Its output, (T, B, D * H) or (N, D * H).
        generator_state: RNG state of the CPU before the call, if the call used dropout. The
            present RNG state is restored at the end.

    Returns:
        Input and output of each layer.
    """
    if generator_state is None:
        return _rerun(call, output)
    present_state = torch.get_rng_state()
    torch.set_rng_state(generator_state)
    try:
        return _rerun(call, output)
    finally:
        torch.set_rng_state(present_state)


def _rerun(call: KernelCall, output: Tensor) -> list[Layer]:
    layers: list[Layer] = []
    input = call.input
    for number in range(call.num_layers - 1):
        layer, _ = call.run_layer(number, input)
        layers.append(layer)
        input = call.between_layers(layer.output)
    return [*layers, Layer(input, output)]
