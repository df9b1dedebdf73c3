"""Observe one kernel call: the input and the output of every layer.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from grutrace.capture.kernel_calls.registration import GRUKernel as Kernel
from grutrace.capture.kernel_calls.torch_context import (
    SkippedCall,
    is_wrapped,
    isolated_context,
    plain,
)
from grutrace.gru import kernel_gates
from grutrace.gru.gate_requests import GateRequest
from grutrace.gru.kernel import KernelCall, Layer, rerun_lower_layers, run_layerwise
from grutrace.gru.kernel_gates import KernelGates
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
        seconds: How long the kernel ran.
        is_kept: Whether input and output are copies that will not change.
    """

    call: KernelCall
    steps: SequenceLayout
    layers: list[Layer]
    training: bool
    seconds: float = 0.0
    is_kept: bool = False


def first_weight(module: nn.Module) -> Tensor | None:
    """Return the first weight that a module passes to the kernel; None if it is parametrized.

    Reading a parametrized weight would compute it again.
    """
    name = "weight_ih" if isinstance(module, nn.GRUCell) else "weight_ih_l0"
    found = module._parameters.get(name)
    return vars(module).get(name) if found is None else found


def is_own_call(module: GRUModule, kernel: Kernel, arguments: tuple[Any, ...]) -> bool:
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
        answer: The result that the model gets.
        layers: Input and output of each layer; empty for a single layer, where the arguments and
            the result hold them.
        gates: By layer and direction, the kernel's own gates; None if they were not copied.
        steps: The layout of a packed call's steps; None for a padded call.
        training: Whether the module was in training mode.
        seconds: How long the kernel ran.
    """

    __slots__ = (
        *("answer", "arguments", "gates", "is_kept", "kernel", "layers", "seconds", "steps"),
        "training",
    )

    def __init__(
        self,
        kernel: Kernel,
        arguments: tuple[Any, ...],
        answer: Any,
        layers: list[Layer],
        gates: list[list[KernelGates]] | None,
        steps: SequenceLayout | None,
        training: bool,
        seconds: float,
    ) -> None:
        self.kernel, self.arguments, self.answer = kernel, arguments, answer
        self.layers, self.gates, self.steps = layers, gates, steps
        self.training, self.seconds = training, seconds
        self.is_kept = False

    @property
    def weights(self) -> list[Tensor]:
        """The weights among its arguments, as a flat list."""
        weights: list[Tensor] = self.kernel.weights(self.arguments)
        return weights

    @property
    def output(self) -> Tensor:
        """The output of each step: (T, B, D * H), (B, T, D * H), (N, D * H) or (B, H)."""
        output: Tensor = self.answer if self.kernel.is_cell else self.answer[0]
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
    def device(self) -> str:
        """The device type that it ran on."""
        kind: str = self.arguments[0].device.type
        return kind

    @property
    def nbytes(self) -> int:
        """Bytes that `kept` copies, and bytes of the gates."""
        kernel, arguments = self.kernel, self.arguments
        size: int = arguments[0].nbytes + arguments[kernel.state_index].nbytes + self.output.nbytes
        for layer in self.layers[:-1]:
            size += layer.output.nbytes
        for directions in self.gates or ():
            size += sum(gate.nbytes for each in directions for gate in each.gates.values())
        return size

    def with_weights(self, weights: list[Tensor]) -> KernelRun:
        """Return the same call with these weights."""
        return self._with(self.arguments, self.answer, self.layers, weights)

    def kept(
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
        arguments, place = list(self.arguments), self.kernel.state_index
        arguments[0], arguments[place] = copy_input(arguments[0]), copy(arguments[place])
        answer = self.answer
        answer = copy_output(answer) if self.kernel.is_cell else (copy_output(answer[0]),)
        # The model cannot access tensors between the layers.
        layers = [Layer(each.input.detach(), each.output.detach()) for each in self.layers]
        if layers:
            input = _to_kernel_call(self.kernel, tuple(arguments)).input
            layers[0] = layers[0]._replace(input=input)
            output = _output(self.kernel, self.arguments, answer)
            layers[-1] = layers[-1]._replace(output=output)
        run = self._with(tuple(arguments), answer, layers, weights)
        run.is_kept = True
        return run

    def _with(
        self, arguments: tuple[Any, ...], answer: Any, layers: list[Layer], weights: list[Tensor]
    ) -> KernelRun:
        kernel = self.kernel
        given = kernel.with_weights(arguments, weights)
        of_call = self.steps, self.training, self.seconds
        return KernelRun(kernel, given, answer, layers, self.gates, *of_call)

    def observation(self) -> Observation:
        """Return the call in one form for all kernels."""
        call, layers = _to_kernel_call(self.kernel, self.arguments), self.layers
        if not layers:
            layers = [Layer(call.input, _output(self.kernel, self.arguments, self.answer))]
        if self.gates is not None:
            layers = [
                each._replace(gates=own) for each, own in zip(layers, self.gates, strict=True)
            ]
        steps = self.steps or PaddedLayout(*layers[-1].output.shape[:2])
        return Observation(call, steps, layers, self.training, self.seconds, self.is_kept)


#: Returns the data of a kernel call, or why it is skipped. Must be called right after the call.
Observe: TypeAlias = Callable[[], KernelRun | SkippedCall]


def run_kernel(
    module: GRUModule,
    kernel: Kernel,
    arguments: tuple[Any, ...],
    find_sorted_indices: Callable[[Tensor], Tensor | None],
    stacks: Stacks,
    request: GateRequest,
    *,
    is_transformed: bool,
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

    Returns:
        The result for the model, and a function that observes the call.
    """
    call, harvests, state = None, False, None
    if request.columns and kernel_gates.can_intercept(arguments[0]):
        call = _to_kernel_call(kernel, arguments)
        harvests = call.should_copy_kernel_gates(request)
    is_stack = not kernel.is_cell and kernel.options(arguments)[1] > 1
    if is_stack:
        call = call or _to_kernel_call(kernel, arguments)
        if call.has_dropout and not _splits(call, stacks):
            if not _on_cpu(call):
                return kernel(*arguments), partial(_dropout_mask_unknown, call)
            state = torch.get_rng_state()
    splits = call is not None and is_stack and _splits(call, stacks)
    began = time.perf_counter()
    gates: list[list[KernelGates]] | None = None
    if call is not None and harvests:
        run = partial(_run, kernel, arguments, call, splits)
        (answer, layers), gates = call.copy_kernel_gates(run, request.columns)
    elif call is not None and splits:
        answer, layers = _split(call, arguments)
    else:
        answer, layers = kernel(*arguments), []
    seconds = time.perf_counter() - began

    def observe() -> KernelRun:
        own, returned, found = arguments, answer, layers
        if is_transformed:
            own, returned = _unwrapped(arguments), _unwrapped(answer)
            found = [Layer(plain(each.input), plain(each.output)) for each in layers]
        if is_stack and not found:
            with isolated_context():
                made = _to_kernel_call(kernel, own)
                found = rerun_lower_layers(made, _output(kernel, own, returned), state)
        steps = None
        if kernel.name == "gru.data":
            with isolated_context():
                steps = PackedLayout(own[1], find_sorted_indices(arguments[1]))
        return KernelRun(kernel, own, returned, found, gates, steps, module.training, seconds)

    return answer, observe


def _run(
    kernel: Kernel, arguments: tuple[Any, ...], call: KernelCall, splits: bool
) -> tuple[Any, list[Layer]]:
    return _split(call, arguments) if splits else (kernel(*arguments), [])


def _split(call: KernelCall, arguments: tuple[Any, ...]) -> tuple[Any, list[Layer]]:
    """Run a call layer by layer."""
    output, final, layers = run_layerwise(call)
    batch_first = call.batch_sizes is None and bool(arguments[-1])
    return (output.transpose(0, 1) if batch_first else output, final), layers


def _splits(call: KernelCall, stacks: Stacks) -> bool:
    return stacks == "split" or (stacks == "auto" and _on_cpu(call))


def _to_kernel_call(kernel: Kernel, arguments: tuple[Any, ...]) -> KernelCall:
    if not kernel.is_cell:
        return KernelCall.of_gru(*arguments)
    input, initial = arguments[:2]
    weights = kernel.weights(arguments)
    return KernelCall(input.unsqueeze(0), None, initial.unsqueeze(0), weights, len(weights) == 4)


def _output(kernel: Kernel, arguments: tuple[Any, ...], answer: Any) -> Tensor:
    """Return the kernel's output as (T, B, D * H) or (N, D * H)."""
    output: Tensor
    if kernel.is_cell:
        output = answer.unsqueeze(0)
    elif kernel.name == "gru.input" and arguments[-1]:
        output = answer[0].transpose(0, 1)
    else:
        output = answer[0]
    return output


def _on_cpu(call: KernelCall) -> bool:
    return call.input.device.type == "cpu"


def _dropout_mask_unknown(call: KernelCall) -> SkippedCall:
    return SkippedCall(
        f"it applies dropout between its layers on {call.input.device}, where the masks are "
        "unknown after the call: pass stacks='split' (with other masks than the fused stack), or "
        "trace it in eval mode"
    )


def _unwrapped(values: Any) -> Any:
    """Return the values with the tensors inside torch.func's wrappers."""
    if isinstance(values, Tensor):
        return plain(values) if is_wrapped(values) else values
    if isinstance(values, (list, tuple)):
        return type(values)(map(_unwrapped, values))
    return values
