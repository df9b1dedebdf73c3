"""One call of PyTorch's fused kernel, and how to see between the layers of a stack.

The fused kernel runs all layers and returns only the top one's states. Two ways lead to the
others, both bit-identical to the stacked call on a CPU, its use of the random generator included:

- *split* answers in the kernel's place with one fused call a layer. Nothing runs twice.
- *rerun* leaves the kernel's answer alone and afterwards runs the layers below the top again.

Both directions of a layer always run together: alone, on a flipped input, a direction differs in
the last bits, and a chaotic network makes those large.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions, N rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grutrace.gru import harvest
from grutrace.gru.harvest import Harvest


class CellWeights(NamedTuple):
    """The weights of one direction of one layer; the biases are None where it has none."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


class Layer(NamedTuple):
    """What one layer read and made in a call.

    Attributes:
        input: (T, B, I) or packed (N, I); for layers above the first after dropout.
        output: (T, B, D * H) or packed (N, D * H), before dropout.
        gates: By direction, the kernel's own gates, where they were harvested.
    """

    input: Tensor
    output: Tensor
    gates: list[Harvest] | None = None


class KernelCall(NamedTuple):
    """The arguments of one call of torch.gru or torch.gru_cell, in one form for both.

    Attributes:
        input: (T, B, I), also where the module is batch_first, or packed (N, I).
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
            data, batch_sizes, initial, *rest = args
            return cls(data, batch_sizes, initial, *rest)
        input, initial, weights, *options, batch_first = args
        input = input.transpose(0, 1) if batch_first else input
        return cls(input, None, initial, weights, *options)

    @property
    def directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def drops(self) -> bool:
        """Whether dropout is applied between the layers of this call."""
        return self.training and self.dropout > 0 and self.num_layers > 1

    def cell_weights(self, layer: int, reverse: bool) -> CellWeights:
        """Return the weights of one direction of one layer."""
        each = 4 if self.bias else 2
        first = (layer * self.directions + reverse) * each
        return CellWeights(*self.weights[first : first + each])

    def cell_initial(self, layer: int, reverse: bool) -> Tensor:
        """Return (B, H), the state that one direction of one layer starts from."""
        return self.initial[layer * self.directions + reverse]

    def run_layer(
        self, layer: int, input: Tensor, *, harvested: bool = False
    ) -> tuple[Layer, Tensor]:
        """Run one layer, both directions, through the fused kernel.

        Args:
            layer: Its number.
            input: (T, B, I) or packed (N, I)
            harvested: Whether to harvest its gates, where that can be done and pays.

        Returns:
            What it read and made, and its final states (D, B, H).
        """
        each = self.directions * (4 if self.bias else 2)
        weights = self.weights[layer * each : (layer + 1) * each]
        initial = self.initial[layer * self.directions : (layer + 1) * self.directions]
        options = (self.bias, 1, 0.0, self.training, self.bidirectional)

        def kernel(initial: Tensor, input: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            if self.batch_sizes is None:
                return torch.gru(input, initial, weights, *options, batch_first=False)
            return torch.gru(input, self.batch_sizes, initial, weights, *options)

        if harvested and self.would_be_watched(input, weights):
            # Whether its weight asks for gradients decides how PyTorch makes the input's product
            # (as one matrix or as many), though none are recorded: so that must stay as it is.
            first = range(0, len(weights), each // self.directions)
            asking = [place for place in first if weights[place].requires_grad]
            made, gates = harvest.watch(
                kernel,
                initial,
                (input, *weights),
                self.batch_sizes,
                self.times,
                [1 + place for place in asking],
            )
            output, final = map(as_unwatched, made)
            return Layer(input, output, gates), final
        output, final = kernel(initial, input, *weights)
        return Layer(input, output, self.read_gates(input, output) if harvested else None), final

    @property
    def times(self) -> int:
        """T"""
        return len(self.input if self.batch_sizes is None else self.batch_sizes)

    def would_be_watched(self, input: Tensor, weights: list[Tensor]) -> bool:
        """Whether to harvest the gates of a layer that reads this while it is run."""
        first = weights[:: (4 if self.bias else 2)]
        return (
            self._pays(input, graph=False)
            and len({weight.requires_grad for weight in first}) == 1
            and harvest.can_watch(input, self.initial, weights)
        )

    def read_gates(self, input: Tensor, output: Tensor) -> list[Harvest] | None:
        """Harvest the gates of a layer that has run, from its graph; None where replay is better.

        Args:
            input: What the layer read.
            output: As the kernel returned it, or a transposition or a single sequence of that.
        """
        if output.grad_fn is None or not self._pays(input, graph=True):
            return None
        return harvest.read(output, self.directions) if harvest.can_read(output) else None

    def _pays(self, input: Tensor, *, graph: bool) -> bool:
        rows, width = input.numel() // max(1, input.shape[-1]), input.shape[-1]
        hidden_size = self.initial.shape[-1]
        return self.times > 0 and harvest.pays(rows / self.times, width, hidden_size, graph=graph)

    def between_layers(self, output: Tensor) -> Tensor:
        """Return what the next layer reads: the output of the one below, with dropout."""
        if self.dropout > 0:
            return torch.dropout(output, self.dropout, self.training)
        return output


def as_unwatched(made: Tensor) -> Tensor:
    """Return what the kernel would have returned if nobody had watched it with gradients on."""
    made = made.detach()
    # Under inference_mode whatever is made is an inference tensor.
    return made.clone() if torch.is_inference_mode_enabled() else made


def split(call: KernelCall, *, harvested: bool = False) -> tuple[Tensor, Tensor, list[Layer]]:
    """Answer a call with one fused call a layer.

    Args:
        call: The call.
        harvested: Whether to harvest the gates, where that can be done and pays.

    Returns:
        The output (T, B, D * H) or (N, D * H) and the final states (L * D, B, H), as the stacked
        call would have returned them, and what each layer read and made.
    """
    layers: list[Layer] = []
    finals: list[Tensor] = []
    input = call.input
    for number in range(call.num_layers):
        if number:
            input = call.between_layers(layers[-1].output)
        layer, final = call.run_layer(number, input, harvested=harvested)
        layers.append(layer)
        finals.append(final)
    # One on its own is given as it is: joining would give it other strides.
    return layers[-1].output, finals[0] if len(finals) == 1 else torch.cat(finals), layers


@torch.no_grad()
def rerun(
    call: KernelCall,
    output: Tensor,
    generator_state: Tensor | None,
    *,
    harvested: bool = False,
) -> list[Layer]:
    """Run the layers below the top again, after the stacked call has answered.

    Args:
        call: The call.
        output: Its output, (T, B, D * H) or (N, D * H).
        generator_state: The CPU generator's state from before the call, needed where the call
            dropped between layers; the state from after the call is put back.
        harvested: Whether to harvest the gates, where that can be done and pays.

    Returns:
        What each layer read and made.
    """
    if generator_state is None:
        return _rerun(call, output, harvested)
    after = torch.get_rng_state()
    torch.set_rng_state(generator_state)
    try:
        return _rerun(call, output, harvested)
    finally:
        torch.set_rng_state(after)


def _rerun(call: KernelCall, output: Tensor, harvested: bool) -> list[Layer]:
    layers: list[Layer] = []
    input = call.input
    for number in range(call.num_layers - 1):
        below, _ = call.run_layer(number, input, harvested=harvested)
        layers.append(below)
        input = call.between_layers(below.output)
    gates = call.read_gates(input, output) if harvested else None
    return [*layers, Layer(input, output, gates)]
