"""The gradients that arrive at one call in the backward pass, however much later that is.

Hooks on nodes of the autograd graph copy them. A hook on the output tensor would not do: a loss
that uses only the final states never calls it, and the model may change the output in place.

A call waits in the journal until gradients have arrived (`journal`). Then they are stored with its
other rows. Gradients of a later backward pass through the same call are added as long as it waits.

B sequences in a batch, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.amp import GradScaler

from grutrace.capture.kernel_calls.gradient_edges import GradientEdges
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.kernel_calls.torch_context import is_checkpoint_forward
from grutrace.gru.layout import SequenceLayout

#: Key of the gradient of the final states. The other keys are the numbers of the layers.
_FINAL = -1

_LATE = (
    "gradients arrived at a call of {} that was already stored, and are not recorded: read, flush "
    "and close the trace after backward(). (Tokens of a recording block are stored at its end)"
)
_NOT_IN_GRAPH = (
    "no gradients are recorded of the lower layers of {}: they ran apart from the model's forward. "
    "Pass stacks='split', and give other tracers of this model no stacks='rerun'"
)
_SET = (
    "no gradients are recorded of a call of {} whose gates an intervention set: the backward pass "
    "of a GRU does not hold for them"
)
_CHECKPOINTED = (
    "no gradients are recorded of a call of {} in a reentrant activation checkpoint, whose forward "
    "has no graph: pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
)


class ArrivingGradients:
    """Collects the gradients that arrive at a call.

    Args:
        run: The call, which has just run.
        on_late: Called once if gradients arrive after the call was stored.
        scaler: What scales the loss; None if nothing is known to do so.

    Attributes:
        is_attached: Whether gradients flow on to states that were computed before the call.
        scale: The factor of the loss when gradients arrived; 0 if it is not known, or differed.
        is_complete: False if no gradient can arrive at the lower layers, because they ran apart.
        is_waiting: Whether a backward pass may still reach the call, and none has done so.
        nbytes: Bytes of the gradients that may arrive.
    """

    def __init__(
        self, run: KernelRun, on_late: Callable[[], None], scaler: GradScaler | None = None
    ) -> None:
        observation = run.observation()
        self._edges = GradientEdges(run, observation)
        self.is_complete, self.is_attached = self._edges.is_complete, self._edges.is_attached
        self.scale, self._scaler = 0.0, scaler
        self._found: dict[int, Tensor] = {}
        self._is_stored = self._is_called_back = False
        self._on_late = on_late
        edges = [*enumerate(self._edges.outputs), (_FINAL, self._edges.final)]
        for key, edge in edges:
            if edge is not None:
                edge.node.register_prehook(partial(self._receive, key, edge.output_nr))
        self.is_waiting = any(edge is not None for _, edge in edges)
        # The graph holds the hooks. If they held the graph, neither would ever be freed.
        self._edges.forget()
        self.nbytes = 0
        if self.is_waiting:
            self.nbytes = sum(layer.output.nbytes for layer in observation.layers)

    def _receive(self, key: int, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Copy the gradient that arrives at one output of a node."""
        gradient = gradients[output]
        if gradient is None:
            return
        if self._is_stored:
            self._on_late()
            return
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            self.scale = scale if not self._found or scale == self.scale else 0.0
        gradient = gradient.detach()
        earlier = self._found.get(key)
        self._found[key] = gradient.clone() if earlier is None else earlier + gradient
        if self.is_waiting and not self._is_called_back:
            # Other gradients of this backward pass are still to come.
            self._is_called_back = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self.is_waiting = self._is_called_back = False

    def store(self) -> None:
        """Take no more gradients."""
        self._is_stored, self.is_waiting = True, False
        self._found = {}

    def at_states(self, layer: int, reverse: bool, steps: SequenceLayout) -> Tensor:
        """Return the gradient that arrived at each state, in the kernel's order and shape.

        That of a final state belongs to the last step of its sequence, whose state it is. NaN if no
        gradient arrived at the call.

        Args:
            layer: Number of the layer.
            reverse: Whether it is the reverse direction.
            steps: The layout of the call.
        """
        states, final = self._edges.at_states(
            layer, reverse, self._found.get(layer), self._found.get(_FINAL)
        )
        if not self._found:
            states = torch.full_like(states, torch.nan, memory_format=torch.contiguous_format)
        elif _FINAL in self._found and states.numel():
            rows = torch.from_numpy(steps.final_rows(reverse=reverse)).to(states.device)
            states = states.index_add(0, rows, final.to(states.dtype))
        return steps.from_kernel_rows(states)


def collect_gradients(
    run: KernelRun, path: str, scaler: GradScaler | None, report: Callable[[str], None]
) -> ArrivingGradients:
    """Collect the gradients that will arrive at a call that has just run.

    Args:
        run: The call.
        path: Path of its module.
        scaler: As for `ArrivingGradients`.
        report: Called with a sentence for each reason why gradients are missing.
    """
    path = path or "the model"
    if any(run.gates_as_set or ()):
        report(_SET.format(path))
        gradients = ArrivingGradients(run, lambda: None)
        gradients.store()
        return gradients
    gradients = ArrivingGradients(run, partial(report, _LATE.format(path)), scaler)
    if not gradients.is_complete:
        report(_NOT_IN_GRAPH.format(path))
    elif not torch.is_grad_enabled() and is_checkpoint_forward():
        report(_CHECKPOINTED.format(path))
    return gradients
