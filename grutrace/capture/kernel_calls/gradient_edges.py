"""Where gradients arrive at a kernel call: points of the autograd graph, not tensors.

A tensor that the model changes in place stands for another point of the graph afterwards. These
points do not change.

T steps, B sequences in a batch, H hidden size, L layers, D directions, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grutrace.capture.kernel_calls.observation import KernelRun, Observation
from grutrace.gru.kernel import Layer


class GradientEdges:
    """Where gradients arrive at a call that has just run.

    Args:
        run: The call.
        observation: The same call in the form of all kernels.

    Attributes:
        outputs: For each layer, where gradients arrive at its output, as time-major or packed
            values; None if it needs no gradients.
        final: Where gradients arrive at the final states; None for a cell, whose output they are.
        is_attached: Whether gradients flow on to the states that the call started from.
        is_complete: False if the lower layers ran apart from the model's forward, so that no
            gradient arrives at them.
    """

    def __init__(self, run: KernelRun, observation: Observation) -> None:
        layers, call = observation.layers, observation.call
        self._rows = layers[-1].output.shape[:-1].numel()
        # The model gets the time-major output of a batch-first layer as a view. An in-place change
        # of a view enters the graph between the view and its base.
        top, base = run.output, run.output._base
        self._is_transposed = run.kernel.name == "gru.input" and not run.is_time_major
        if self._is_transposed and base is not None and base.shape == layers[-1].output.shape:
            top, self._is_transposed = base, False
        self.outputs = [_edge(layer.output) for layer in layers[:-1]] + [_edge(top)]
        self.final = None if run.kernel.is_cell else _edge(run.result[1])
        self.is_attached = _is_computed(call.initial)
        self.is_complete = _is_complete(run, layers)
        _, self._batch, self._size = call.initial.shape
        self._directions, self._layers = call.directions, call.num_layers
        self._nothing = call.initial.detach().new_zeros(())

    def forget(self) -> None:
        """Release the graph. `at_states` still works."""
        self.outputs, self.final = [], None

    def at_states(
        self,
        layer: int,
        reverse: bool,
        output_gradient: Tensor | None,
        final_gradient: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients that arrive at one direction of a layer, from those at the edges.

        Returns:
            (N, H) at the states, in the kernel's order, and (B, H) at the final states.
        """
        size = self._size
        if final_gradient is None:
            final = self._nothing.expand(self._batch, size)
        else:
            final = final_gradient[layer * self._directions + reverse]
        if output_gradient is None:
            return self._nothing.expand(self._rows, size), final
        if layer == self._layers - 1 and self._is_transposed:
            output_gradient = output_gradient.transpose(0, 1)
        ours = output_gradient[..., reverse * size : (reverse + 1) * size]
        return ours.reshape(-1, size), final


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _is_computed(states: Tensor) -> bool:
    """Whether states were computed in the graph, and are not a leaf of it or a view of a leaf."""
    node = states.grad_fn
    while node is not None:
        # The module may have put a leaf into another form: a view, or other rows.
        inputs = [before for before, _ in node.next_functions if before is not None]
        if len(inputs) != 1:
            return bool(inputs)
        node = inputs[0]
        if not node.next_functions:
            return False
    return False


def _is_complete(run: KernelRun, layers: Sequence[Layer]) -> bool:
    """Whether the lowest layer's output is in the model's graph, if it should be."""
    if len(layers) == 1 or not torch.is_grad_enabled() or layers[0].output.requires_grad:
        return True
    call_tensors = (run.arguments[0], run.arguments[run.kernel.state_index])
    count = len(run.weights) // len(layers)
    return not any(tensor.requires_grad for tensor in (*call_tensors, *run.weights[:count]))
