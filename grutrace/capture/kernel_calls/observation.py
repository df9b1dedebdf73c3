"""Observe one kernel call: the input and the output of every layer.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from grutrace.capture.kernel_calls.registration import GRUKernel
from grutrace.capture.kernel_calls.replacement import GatesAsSet, PreparedCall
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    is_wrapped,
    isolated_context,
    unwrap_functorch,
)
from grutrace.gru import kernel_gates
from grutrace.gru.gate_copies import GateRequest
from grutrace.gru.kernel import KernelCall, Layer, rerun_lower_layers, run_layerwise
from grutrace.gru.kernel_gates import KernelGates, StepGates
from grutrace.gru.layout import PackedLayout, PaddedLayout, SequenceLayout
from grutrace.options import Stacks

GRUModule: TypeAlias = nn.GRU | nn.GRUCell


class Observation(NamedTuple):
    """One kernel call that has just run.

    Attributes:
        call: The arguments of the kernel.
        steps: The layout of the call's steps.
        layers: Input and output of each layer, from the lowest to the top.
        training: Whether the module was in training mode.
        is_kept: Whether input and output are copies that will not change.
        gates_as_set: By layer and direction, the gates that an intervention has set; None if none
            did, also for a layer.
    """

    call: KernelCall
    steps: SequenceLayout
    layers: list[Layer]
    training: bool
    is_kept: bool = False
    gates_as_set: Sequence[list[GatesAsSet] | None] | None = None


def first_weight(module: nn.Module) -> Tensor | None:
    """Return the first weight that a module passes to the kernel; None if it is parametrized.

    Reading a parametrized weight would compute it again.
    """
    name = "weight_ih" if isinstance(module, nn.GRUCell) else "weight_ih_l0"
    weight = module._parameters.get(name)
    return vars(module).get(name) if weight is None else weight


def is_own_call(module: GRUModule, kernel: GRUKernel, arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel call inside a module's forward is made by the module itself.

    If the weights do not fit the module, another layer inside the forward makes the call.
    """
    weights = kernel.weights(arguments)
    if isinstance(module, nn.GRUCell) != kernel.is_cell or len(weights) < 2:
        return False
    if not isinstance(module, nn.GRUCell):
        _, layers, _, _, bidirectional = kernel.options(arguments)
        if layers != module.num_layers or bidirectional != module.bidirectional:
            return False
    return bool(
        weights[0].shape[-1] == module.input_size and weights[1].shape[-1] == module.hidden_size
    )


class KernelRun:
    """A kernel call that has just run, with its arguments and its result.

    Args:
        kernel: The kernel.
        arguments: Its positional arguments.
        result: The result that the model gets.
        layers: Input and output of each layer; empty for a single layer, where the arguments and
            the result hold them.
        gates: By layer and direction, the kernel's own gates; None if they were not copied.
        steps: The layout of a packed call's steps; None for a padded call.
        training: Whether the module was in training mode.
        gates_as_set: By layer and direction, the gates that an intervention has set.

    Attributes:
        step_gates: The kernel's own gates of a call of one step, if they were kept in its memory.
    """

    __slots__ = (
        *("arguments", "gates", "gates_as_set", "is_kept", "kernel", "layers", "result"),
        *("step_gates", "steps", "training"),
    )

    def __init__(
        self,
        kernel: GRUKernel,
        arguments: tuple[Any, ...],
        result: Any,
        layers: list[Layer],
        gates: list[list[KernelGates]] | None,
        steps: SequenceLayout | None,
        training: bool,
        gates_as_set: Sequence[list[GatesAsSet] | None] | None = None,
    ) -> None:
        self.kernel, self.arguments, self.result = kernel, arguments, result
        self.layers, self.gates, self.steps = layers, gates, steps
        self.training = training
        self.gates_as_set = gates_as_set
        self.is_kept = False
        self.step_gates: StepGates | None = None

    def copy_step_gates(self) -> None:
        """Copy gates that were kept in the kernel's memory."""
        if self.step_gates is not None:
            self.gates, self.step_gates = [[self.step_gates.copied()]], None

    @property
    def weights(self) -> list[Tensor]:
        """The weights among its arguments, as a flat list."""
        weights: list[Tensor] = self.kernel.weights(self.arguments)
        return weights

    @property
    def output(self) -> Tensor:
        """The output of each step: (T, B, D * H), (B, T, D * H), (N, D * H) or (B, H)."""
        output: Tensor = self.result if self.kernel.is_cell else self.result[0]
        return output

    @property
    def is_time_major(self) -> bool:
        """Whether input and output are (T, B, width)."""
        return self.kernel.name == "gru.input" and not self.arguments[-1]

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        size: int = self.arguments[self.kernel.state_index].shape[-2]
        return size

    @property
    def options(self) -> tuple[Any, ...]:
        """The arguments that are not tensors."""
        return () if self.kernel.is_cell else self.arguments[self.kernel.state_index + 2 :]

    @property
    def device(self) -> str:
        """The device type that it ran on."""
        device: str = self.arguments[0].device.type
        return device

    @property
    def nbytes(self) -> int:
        """Bytes that `kept` copies, and bytes of the gates."""
        kernel, arguments = self.kernel, self.arguments
        size: int = arguments[0].nbytes + arguments[kernel.state_index].nbytes + self.output.nbytes
        for layer in self.layers[:-1]:
            size += layer.output.nbytes
        for directions in self.gates or ():
            size += sum(
                gate.nbytes for layer_gates in directions for gate in layer_gates.gates.values()
            )
        for set_gates in self.gates_as_set or ():
            size += sum(direction.nbytes for direction in set_gates or ())
        return size

    def with_weights(self, weights: list[Tensor]) -> KernelRun:
        """Return the same call with these weights."""
        return self._replace(self.arguments, self.result, self.layers, weights)

    def without_values(self) -> KernelRun:
        """Return the same call without input, initial state and output, for `replaced`."""
        nothing: Any = None
        return self.replaced(nothing, nothing, nothing)

    def replaced(self, input: Tensor, initial: Tensor, output: Tensor) -> KernelRun:
        """Return a call of one layer with these copies in place of its tensors."""
        arguments = list(self.arguments)
        arguments[0], arguments[self.kernel.state_index] = input, initial
        result = output if self.kernel.is_cell else (output,)
        run = self._replace(tuple(arguments), result, [], self.weights)
        run.is_kept = True
        return run

    def copied(
        self,
        weights: list[Tensor],
        copy: Callable[[Tensor], Tensor],
        copy_input: Callable[[Tensor], Tensor],
        copy_output: Callable[[Tensor], Tensor],
    ) -> KernelRun:
        """Return the same call with copies of all tensors that the model can change.

        Args:
            weights: The weights that it used, which will not change.
            copy: Copies a tensor.
            copy_input: Copies the input.
            copy_output: Copies the output.
        """
        arguments, state_index = list(self.arguments), self.kernel.state_index
        arguments[0] = copy_input(arguments[0])
        arguments[state_index] = copy(arguments[state_index])
        result = self.result
        result = copy_output(result) if self.kernel.is_cell else (copy_output(result[0]),)
        # The model cannot access tensors between the layers.
        layers = [Layer(layer.input.detach(), layer.output.detach()) for layer in self.layers]
        if layers:
            input = _to_kernel_call(self.kernel, tuple(arguments)).input
            layers[0] = layers[0]._replace(input=input)
            output = _time_major_output(self.kernel, self.arguments, result)
            layers[-1] = layers[-1]._replace(output=output)
        run = self._replace(tuple(arguments), result, layers, weights)
        run.is_kept = True
        return run

    def _replace(
        self, arguments: tuple[Any, ...], result: Any, layers: list[Layer], weights: list[Tensor]
    ) -> KernelRun:
        """Return the same call with these tensors."""
        return KernelRun(
            self.kernel,
            self.kernel.with_weights(arguments, weights),
            result,
            layers,
            self.gates,
            self.steps,
            self.training,
            self.gates_as_set,
        )

    def observation(self) -> Observation:
        """Return the call in one form for all kernels."""
        call, layers = _to_kernel_call(self.kernel, self.arguments), self.layers
        if not layers:
            output = _time_major_output(self.kernel, self.arguments, self.result)
            layers = [Layer(call.input, output)]
        if self.gates is not None:
            layers = [
                layer._replace(gates=gates) for layer, gates in zip(layers, self.gates, strict=True)
            ]
        steps = self.steps or PaddedLayout(*layers[-1].output.shape[:2])
        return Observation(call, steps, layers, self.training, self.is_kept, self.gates_as_set)


#: Runs PyTorch's kernel for one layer, given its number and its input.
RunLayer: TypeAlias = Callable[[int, Tensor], tuple[Layer, Tensor]]

#: Prepares a call whose output may be replaced.
Prepare: TypeAlias = Callable[[KernelCall, SequenceLayout, RunLayer], PreparedCall]

#: Returns the data of a kernel call, or why it is skipped. Must be called right after the call.
Observe: TypeAlias = Callable[[], KernelRun | SkippedCall]


def run_kernel(
    module: GRUModule,
    kernel: GRUKernel,
    arguments: tuple[Any, ...],
    find_sorted_indices: Callable[[Tensor], Tensor | None],
    stacks: Stacks,
    request: GateRequest,
    *,
    is_transformed: bool,
    replace: Prepare | None = None,
) -> tuple[Any, Observe]:
    """Run a kernel call so that it can be observed.

    Args:
        module: The module whose forward makes the call.
        kernel: The kernel.
        arguments: Its positional arguments.
        find_sorted_indices: Returns, for the batch sizes of a packed input, the user's batch index
            of each of the kernel's sequences; None if they are equal.
        stacks: How to observe the lower layers of a stack.
        request: The gates to copy from the kernel, if that is possible and cheaper.
        is_transformed: Whether a transform of torch.func may hold one of the arguments.
        replace: Prepares the call if its output may be replaced.

    Returns:
        The result for the model, and a function that observes the call.
    """
    call, copies_gates, rng_state = None, False, None
    prepared: PreparedCall | None = None
    if replace is not None:
        call = _to_kernel_call(kernel, arguments)
        layout = _layout(kernel, arguments, call, find_sorted_indices)
        prepared = replace(call, layout, _layer_runner(kernel, arguments, call))
        if not prepared.is_changed:
            call = None
    is_replaced = prepared is not None and prepared.is_changed
    copies = bool(request.columns) and not is_replaced and kernel_gates.can_intercept(arguments[0])
    keeps_step = request.keeps_steps and copies and _is_one_step(kernel, arguments)
    if copies and not keeps_step:
        call = _to_kernel_call(kernel, arguments)
        copies_gates = call.should_copy_kernel_gates(request)
    is_stack = not kernel.is_cell and kernel.options(arguments)[1] > 1
    if is_stack:
        call = call or _to_kernel_call(kernel, arguments)
        if call.has_dropout and not is_replaced and not _should_split(call, stacks):
            if not _on_cpu(call):
                return kernel(*arguments), partial(_dropout_mask_unknown, call)
            # Running the lower layers again draws the same dropout masks from it.
            rng_state = torch.get_rng_state()
    should_split = call is not None and is_stack and _should_split(call, stacks)
    gates: list[list[KernelGates]] | None = None
    gates_as_set = None
    step_gates: StepGates | None = None
    layers: list[Layer] = []
    if prepared is not None and is_replaced:
        replaced = prepared.run()
        result = _to_result(kernel, arguments, replaced.output, replaced.final)
        layers = replaced.layers if is_stack else []
        gates_as_set = replaced.gates
    elif keeps_step:
        (batch, size), dtype = arguments[kernel.state_index].shape[-2:], arguments[0].dtype
        run_step = partial(kernel, *arguments)
        result, step_gates = kernel_gates.keep_step_gates(
            run_step, batch, size, dtype, request.columns
        )
    elif call is not None and copies_gates:
        run = partial(_run, kernel, arguments, call, should_split)
        (result, layers), gates = call.copy_kernel_gates(run, request.columns)
    elif call is not None and should_split:
        result, layers = _run_split(call, arguments)
    else:
        result = kernel(*arguments)
    if prepared is not None:
        prepared.finish(_final_states(kernel, result))

    def observe() -> KernelRun:
        run_arguments, run_result, run_layers = arguments, result, layers
        if is_transformed:
            run_arguments, run_result = _unwrap_all(arguments), _unwrap_all(result)
            run_layers = [
                Layer(unwrap_functorch(layer.input), unwrap_functorch(layer.output))
                for layer in layers
            ]
        if is_stack and not run_layers:
            with isolated_context():
                output = _time_major_output(kernel, run_arguments, run_result)
                run_layers = rerun_lower_layers(
                    _to_kernel_call(kernel, run_arguments), output, rng_state
                )
        steps = None
        if kernel.name == "gru.data":
            with isolated_context():
                # The frames of the call hold the batch sizes as they were passed: not unwrapped.
                steps = PackedLayout(run_arguments[1], find_sorted_indices(arguments[1]))
        observed = KernelRun(
            kernel,
            run_arguments,
            run_result,
            run_layers,
            gates,
            steps,
            module.training,
            gates_as_set,
        )
        observed.step_gates = step_gates
        return observed

    return result, observe


def _is_one_step(kernel: GRUKernel, arguments: tuple[Any, ...]) -> bool:
    """Whether a call is one step of one direction of one layer."""
    if kernel.is_cell:
        return True
    if kernel.name != "gru.input":
        return False
    _, layers, _, _, bidirectional = kernel.options(arguments)
    is_time_major = not arguments[-1]
    return layers == 1 and not bidirectional and arguments[0].shape[0 if is_time_major else 1] == 1


def _run(
    kernel: GRUKernel, arguments: tuple[Any, ...], call: KernelCall, should_split: bool
) -> tuple[Any, list[Layer]]:
    """Run the kernel, or the layers one by one. Return the model's result and observed layers."""
    return _run_split(call, arguments) if should_split else (kernel(*arguments), [])


def _run_split(call: KernelCall, arguments: tuple[Any, ...]) -> tuple[Any, list[Layer]]:
    """Run the layers one by one."""
    output, final, layers = run_layerwise(call)
    # The last argument of a padded call is batch_first.
    batch_first = call.batch_sizes is None and bool(arguments[-1])
    return (output.transpose(0, 1) if batch_first else output, final), layers


def _to_result(kernel: GRUKernel, arguments: tuple[Any, ...], output: Tensor, final: Tensor) -> Any:
    """Return the output (T, B, D * H) or (N, D * H) in the kernel's own form."""
    if kernel.is_cell:
        return output[0]
    batch_first = kernel.name == "gru.input" and bool(arguments[-1])
    return (output.transpose(0, 1) if batch_first else output, final)


def _final_states(kernel: GRUKernel, result: Any) -> Tensor:
    """Return the final states of a call, (L * D, B, H), in the kernel's batch order."""
    final: Tensor = result.unsqueeze(0) if kernel.is_cell else result[1]
    return final


def _layout(
    kernel: GRUKernel,
    arguments: tuple[Any, ...],
    call: KernelCall,
    find_sorted_indices: Callable[[Tensor], Tensor | None],
) -> SequenceLayout:
    """Return the layout of the steps of a call that has not run yet."""
    if kernel.name != "gru.data":
        return PaddedLayout(*call.input.shape[:2])
    batch_sizes = arguments[1]
    with isolated_context():
        return PackedLayout(_unwrap_all(batch_sizes), find_sorted_indices(batch_sizes))


def _layer_runner(kernel: GRUKernel, arguments: tuple[Any, ...], call: KernelCall) -> RunLayer:
    """Return a function that runs one layer as the call itself does."""
    if not kernel.is_cell:
        return call.run_layer

    def run_cell(_: int, input: Tensor) -> tuple[Layer, Tensor]:
        state = kernel(*arguments)
        return Layer(input, state.unsqueeze(0)), state.unsqueeze(0)

    return run_cell


def _should_split(call: KernelCall, stacks: Stacks) -> bool:
    """Whether the call of a stack is replaced with one call per layer."""
    return stacks == "split" or (stacks == "auto" and _on_cpu(call))


def _to_kernel_call(kernel: GRUKernel, arguments: tuple[Any, ...]) -> KernelCall:
    """Return the arguments of any kernel in one form. A cell is a layer with one step."""
    if not kernel.is_cell:
        return KernelCall.of_gru(*arguments)
    input, initial = arguments[:2]
    weights = kernel.weights(arguments)
    return KernelCall(input.unsqueeze(0), None, initial.unsqueeze(0), weights, len(weights) == 4)


def _time_major_output(kernel: GRUKernel, arguments: tuple[Any, ...], result: Any) -> Tensor:
    """Return the kernel's output as (T, B, D * H), or as (N, D * H) if it is packed."""
    output: Tensor
    if kernel.is_cell:
        output = result.unsqueeze(0)
    elif kernel.name == "gru.input" and arguments[-1]:
        output = result[0].transpose(0, 1)
    else:
        output = result[0]
    return output


def _on_cpu(call: KernelCall) -> bool:
    return call.input.device.type == "cpu"


def _dropout_mask_unknown(call: KernelCall) -> SkippedCall:
    return SkippedCall(
        f"it applies dropout between its layers on {call.input.device}, where the masks are "
        "unknown after the call: pass stacks='split' (with other masks than the fused stack), or "
        "trace it in eval mode"
    )


def _unwrap_all(values: Any) -> Any:
    """Return the values with the tensors inside torch.func's wrappers."""
    if isinstance(values, Tensor):
        return unwrap_functorch(values) if is_wrapped(values) else values
    if isinstance(values, (list, tuple)):
        return type(values)(map(_unwrap_all, values))
    return values
