"""One kernel call, kept with the autograd graph of its input and output.

The states that a call returns are in the graph of the model's forward. A gate is a function of the
input, the weights and the state before its step, so a gate computed from these tensors is in the
same graph, and its gradients flow on through the kernel's own backward.

The model may change a tensor in place after the call. So input, initial state and output are cloned
in the graph (a clone saves nothing for its backward), and the points of the graph at which
gradients arrive are kept as graph nodes, not as tensors.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from grutrace.capture.kernel_calls.gradient_edges import GradientEdges
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.errors import StateError
from grutrace.gru.kernel import CellWeights, Layer


class GraphCall:
    """A kernel call that has just run.

    Args:
        run: The call.

    Attributes:
        steps: The layout of its steps.
        call: Its arguments, with clones of input and initial state.
        layers: Input and output of each layer, which nobody changes.
        edges: Where gradients arrive.
    """

    def __init__(self, run: KernelRun) -> None:
        observation = run.observation()
        call, layers = observation.call, observation.layers
        self.steps = observation.steps
        self.edges = GradientEdges(run, observation)
        self.call = call._replace(input=call.input.clone(), initial=call.initial.clone())
        # The model has no access to the tensors between the layers.
        first = layers[0]._replace(input=self.call.input)
        self.layers: list[Layer] = [first, *layers[1:]]
        self.layers[-1] = self.layers[-1]._replace(output=layers[-1].output.clone())
        self._kind = run.device
        self._is_grad_enabled = torch.is_grad_enabled()
        self._autocast = (
            torch.get_autocast_dtype(run.device) if torch.is_autocast_enabled(run.device) else None
        )
        self._weight_states = [_weight_state(weight) for weight in call.weights]

    def computes_like(self, other: GraphCall) -> bool:
        """Whether the gates of both calls can be computed together."""
        return (
            (self._kind, self._autocast, self._is_grad_enabled)
            == (other._kind, other._autocast, other._is_grad_enabled)
            and len(self.call.weights) == len(other.call.weights)
            and all(map(_is, self.call.weights, other.call.weights))
            and self._weight_states == other._weight_states
        )

    @contextmanager
    def context(self, *, grad: bool = True) -> Iterator[None]:
        """Compute in the autocast and gradient modes of the call.

        Args:
            grad: False computes without gradients in any case.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad and self._is_grad_enabled))
            if self._autocast is not None or torch.is_autocast_enabled(self._kind):
                stack.enter_context(
                    torch.autocast(
                        self._kind, dtype=self._autocast, enabled=self._autocast is not None
                    )
                )
            yield

    def has_earlier_weights_than(self, other: GraphCall) -> bool:
        """Whether a weight that both calls used has changed between them."""
        states = zip(
            self.call.weights,
            other.call.weights,
            self._weight_states,
            other._weight_states,
            strict=False,
        )
        return any(ours is theirs and before != after for ours, theirs, before, after in states)

    def require_same_weights(self, site: str) -> None:
        """Require that the weights are still those of the call.

        Raises:
            StateError: They have changed.
        """
        if any(
            _weight_state(weight) != state
            for weight, state in zip(self.call.weights, self._weight_states, strict=True)
        ):
            raise StateError(
                f"the weights of {site} have changed since the call, so its gates can no longer be "
                "computed: read them before optimizer.step()"
            )

    def hidden(self, layer: int, reverse: bool) -> Tensor:
        """Return the states of one direction of a layer, (T, B, H) or (N, H)."""
        size = self.call.initial.shape[-1]
        return self.layers[layer].output[..., reverse * size : (reverse + 1) * size]

    def row_values(self, layer: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return input (N, I), states and previous states (N, H), in the order of rows."""
        hidden = self.hidden(layer, reverse)
        previous = self.steps.previous(
            hidden, self.call.cell_initial(layer, reverse), reverse=reverse
        )
        values = self.layers[layer].input, hidden, previous
        input, hidden, previous = (self.steps.to_device_rows(value) for value in values)
        return input, hidden, previous

    def weights(self, layer: int, reverse: bool) -> CellWeights:
        """Return the weights of one direction of a layer."""
        return self.call.cell_weights(layer, reverse)

    @property
    def batch_sizes(self) -> Sequence[int]:
        """(T,) number of sequences that have each step."""
        sizes = self.call.batch_sizes
        if sizes is not None:
            return [int(size) for size in sizes.tolist()]
        return [self.call.initial.shape[1]] * self.call.num_steps

    def to_rows(self, values: Tensor) -> Tensor:
        """Return (N, width) in the kernel's order as rows."""
        if self.call.batch_sizes is None:
            values = values.view(self.call.num_steps, -1, values.shape[-1])
        return self.steps.to_device_rows(values)


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def _weight_state(weight: Tensor) -> tuple[int | None, int]:
    """Return what tells a change of a weight: its version and its address."""
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr()
