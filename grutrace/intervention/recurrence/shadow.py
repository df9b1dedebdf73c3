"""Run the recurrence of one direction of a layer step by step, with gates that are set.

The operations are those of PyTorch's CPU kernel (aten/src/ATen/native/RNN.cpp), in the same order
and on memory of the same strides. So states and gradients that no setting changes have the bits of
the kernel.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear, pad

from grutrace.gru.kernel import CellWeights
from grutrace.intervention.recurrence.edits import Edits
from grutrace.intervention.recurrence.held_steps import can_hold, run_held_steps
from grutrace.intervention.recurrence.steps import DirectionResult, DirectionRun, StepGates
from grutrace.torch_internals import innermost_transform


def run_step(
    input_product: Tensor, state: Tensor, weights: CellWeights, edits: Edits
) -> tuple[Tensor, StepGates]:
    """Compute the state after a step.

    Args:
        input_product: (b, 3H)
        state: (b, H), before the step.
        weights: Of the direction.
        edits: What is set.

    Returns:
        The state after the step, (b, H), and the gates.
    """
    hidden_product = linear(state, weights.weight_hh, weights.bias_hh)
    input_r, input_z, input_n = torch.unsafe_chunk(input_product, 3, 1)
    hidden_r, hidden_z, hidden_n = torch.unsafe_chunk(hidden_product, 3, 1)
    reset = _gate(hidden_r, input_r, edits, "reset")
    update = _gate(hidden_z, input_z, edits, "update")
    candidate_preactivation = input_n.add(hidden_n.mul_(reset))
    changed = _apply(candidate_preactivation, edits, "candidate_preactivation")
    is_same = changed is candidate_preactivation
    candidate = candidate_preactivation.tanh_() if is_same else changed.tanh()
    candidate = _apply(candidate, edits, "candidate")
    computed = (state - candidate).mul_(update).add_(candidate)
    hidden = _apply(computed, edits, "hidden")
    return hidden, StepGates(reset, update, candidate, computed)


def _gate(hidden: Tensor, input: Tensor, edits: Edits, name: str) -> Tensor:
    preactivation = hidden.add_(input)
    changed = _apply(preactivation, edits, f"{name}_preactivation")
    if changed is preactivation:
        gate = preactivation.sigmoid_()
    else:
        # The last digits of torch's sigmoid depend on where a row ends, so with the same strides.
        size = changed.shape[-1]
        gate = pad(changed, (0, 2 * size))[:, :size].sigmoid()
    return _apply(gate, edits, name)


def _apply(values: Tensor, edits: Edits, quantity: str) -> Tensor:
    for edit in edits.get(quantity, ()):
        values = edit(values)
    return values


def run_direction(run: DirectionRun) -> DirectionResult:
    """Run the steps from the first one that is set."""
    if _can_run_in_place(run):
        if can_hold(run):
            run.edits.changes.any = True
            return run_held_steps(run)
        return run_in_place(run)
    order, product = run.order, run.input_product()
    products = product.unbind(0) if order.padded else torch.split(product, list(order.sizes))
    outputs: list[Tensor] = []
    gates: dict[int, StepGates] = {}
    ended: list[Tensor] = []
    state = _state_before(run)
    for time in order.times[run.start :]:
        state = _resize(state, run, order.sizes[time], ended)
        state, step_gates = run_step(products[time], state, run.weights, run.edits(time))
        outputs.append(state)
        if run.keep_gates:
            gates[time] = step_gates
    ended.append(state)
    ended.reverse()
    final = ended[0] if order.padded or order.reverse else torch.cat(ended)
    if order.reverse:
        outputs.reverse()
    output = torch.stack(outputs) if order.padded else torch.cat(outputs)
    if run.start:
        untouched = run.kernel_states[0][run.untouched()]
        output = torch.cat((output, untouched) if order.reverse else (untouched, output))
    if run.kernel is not None and len(final) < len(run.initial):
        # Sequences that had ended before the first step that is set.
        final = torch.cat((final, run.kernel[1][len(final) :]))
    return DirectionResult(output, final, gates)


def _can_run_in_place(run: DirectionRun) -> bool:
    """Whether no gradients can flow, and all tensors have the same type."""
    is_same = run.input.dtype == run.initial.dtype == run.weights.weight_hh.dtype
    return (
        is_same
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(run.input.device.type)
        and forward_ad._current_level < 0
        and innermost_transform() is None
    )


def run_in_place(run: DirectionRun) -> DirectionResult:
    """Run the steps in memory that is used again, without gradients. The bits are the same."""
    order, initial, weights = run.order, run.initial, run.weights
    size, sizes = initial.shape[-1], list(order.sizes)
    product = run.input_product()
    output = run.input.new_empty((*run.input.shape[:-1], size))
    parts = product.chunk(3, -1)
    if order.padded:
        inputs = [part.unbind(0) for part in parts]
        states: Sequence[Tensor] = output.unbind(0)
    else:
        inputs = [torch.split(part, sizes) for part in parts]
        states = torch.split(output, sizes)
    weight = weights.weight_hh.t()
    final = initial.clone() if run.kernel is None else run.kernel[1].clone()
    ended: list[Tensor] = []
    gates: dict[int, StepGates] = {}
    state = _state_before(run)
    buffers = _StepBuffers(state, size)
    for time in order.times[run.start :]:
        state = _resize(state, run, sizes[time], ended)
        buffers.resize(sizes[time])
        if weights.bias_hh is None:
            torch.mm(state, weight, out=buffers.product)
        else:
            torch.addmm(weights.bias_hh, state, weight, out=buffers.product)
        at_time = run.edits(time)
        input_r, input_z, input_n = (part[time] for part in inputs)
        reset, update, candidate = buffers.reset, buffers.update, buffers.candidate
        _gate_in_place(reset, input_r, at_time, "reset")
        _gate_in_place(update, input_z, at_time, "update")
        torch.add(input_n, buffers.hidden_n.mul_(reset), out=candidate)
        _set_in_place(candidate, at_time, "candidate_preactivation")
        candidate.tanh_()
        _set_in_place(candidate, at_time, "candidate")
        state, previous = buffers.states[0], state
        buffers.states.reverse()
        torch.sub(previous, candidate, out=state)
        state.mul_(update).add_(candidate)
        if run.keep_gates:
            own = (reset.clone(), update.clone(), candidate.clone(), state.clone())
            gates[time] = StepGates(*own)
        _set_in_place(state, at_time, "hidden")
        states[time].copy_(state)
    ended.append(state)
    ended.reverse()
    reached = ended[0] if order.padded or order.reverse else torch.cat(ended)
    final[: len(reached)] = reached
    if run.start:
        untouched = run.untouched()
        output[untouched] = run.kernel_states[0][untouched]
    return DirectionResult(output, final, gates)


class _StepBuffers:
    """Memory for one step, with the strides that the kernel's memory has.

    Attributes:
        product: (b, 3H)
        reset: (b, H), its first third.
        update: Its second third.
        hidden_n: Its last third.
        candidate: (b, H)
        states: Two of (b, H): products need states at aligned addresses.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        self._like, self._size = like, size
        self._allocate(len(like))

    def resize(self, rows: int) -> None:
        """Take memory for another number of rows."""
        if len(self.product) != rows:
            self._allocate(rows)

    def _allocate(self, rows: int) -> None:
        self.product = self._like.new_empty(rows, 3 * self._size)
        self.reset, self.update, self.hidden_n = self.product.chunk(3, 1)
        self.candidate = self._like.new_empty(rows, self._size)
        self.states = [self._like.new_empty(rows, self._size) for _ in range(2)]


def _gate_in_place(gate: Tensor, input: Tensor, edits: Edits, name: str) -> None:
    """Compute a gate in place of its hidden product."""
    own = edits.get(name)
    if (own and own[0].total is None) or not own:
        gate.add_(input)
        _set_in_place(gate, edits, f"{name}_preactivation")
        gate.sigmoid_()
    for edit in own or ():
        edit.in_place(gate)


def _set_in_place(values: Tensor, edits: Edits, quantity: str) -> None:
    for edit in edits.get(quantity, ()):
        edit.in_place(values)


def _state_before(run: DirectionRun) -> Tensor:
    """Return the state before the first step to run, from the kernel's output."""
    order, initial = run.order, run.initial
    if not run.start:
        return initial[: order.sizes[order.times[0]]] if order.reverse else initial
    output, time = run.kernel_states[0], order.times[run.start - 1]
    # Copied, because the last digits of a product depend on the address of the state.
    if order.padded:
        return output[time].clone()
    return output.narrow(0, sum(order.sizes[:time]), order.sizes[time]).clone()


def _resize(state: Tensor, run: DirectionRun, size: int, ended: list[Tensor]) -> Tensor:
    """Return the states of the sequences that have a step, as the kernel's packed layers do."""
    if size < len(state):
        ended.append(state.narrow(0, size, len(state) - size))
        return state.narrow(0, 0, size)
    if size > len(state):
        assert run.order.reverse
        return torch.cat((state, run.initial.narrow(0, len(state), size - len(state))))
    return state
