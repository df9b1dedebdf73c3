"""From a kernel call to what every layer read and made in it.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from grutrace.capture.kernel_registration import GRUKernel as Kernel
from grutrace.capture.surroundings import Missed, is_wrapped, plain
from grutrace.gru import harvest
from grutrace.gru.gather import Asked
from grutrace.gru.harvest import Harvest
from grutrace.gru.kernel import KernelCall, Layer, rerun, split
from grutrace.gru.steps import PackedSteps, PaddedSteps, Steps

Result = TypeVar("Result")
GRUModule: TypeAlias = nn.GRU | nn.GRUCell
Stacks: TypeAlias = Literal["rerun", "auto", "split"]

#: The ways to see between the layers of a stack; where several are asked for, the first wins.
STACKS: tuple[Stacks, ...] = ("rerun", "auto", "split")


class Observation(NamedTuple):
    """One call of the kernel, just after it ran.

    Attributes:
        call: What the kernel was called with.
        steps: The layout of the call's steps.
        layers: What each layer read and made, from the lowest to the top.
        training: Whether the module was in training mode.
        seconds: How long the kernel ran.
    """

    call: KernelCall
    steps: Steps
    layers: list[Layer]
    training: bool
    seconds: float = 0.0


def first_weight(module: nn.Module) -> Tensor | None:
    """Return the first weight that a module would give to the kernel, if it can be had as it is.

    A parametrized weight is none: reading it computes it anew.
    """
    name = "weight_ih" if isinstance(module, nn.GRUCell) else "weight_ih_l0"
    found = module._parameters.get(name)
    return vars(module).get(name) if found is None else found


def is_own_call(module: GRUModule, kernel: Kernel, arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel call made within a module's forward is that of the module itself.

    It is not if its weights do not fit the module: then it is that of something inside it.
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


class KernelResult(NamedTuple):
    """What a kernel call gave.

    Attributes:
        answer: For the model.
        observe: Returns the observation, or why the layers below the top cannot be seen. To be
            called at once, isolated from what surrounds the model (`surroundings.aside`).
    """

    answer: Any
    observe: Callable[[], Observation | Missed]


def run_kernel(
    module: GRUModule,
    kernel: Kernel,
    arguments: tuple[Any, ...],
    find_order: Callable[[Tensor], Tensor | None],
    stacks: Stacks,
    asked: Asked,
) -> KernelResult:
    """Make a kernel call that can be observed.

    Args:
        module: The module whose forward makes the call.
        kernel: The kernel.
        arguments: Its positional arguments.
        find_order: Returns, for the batch sizes of a packed input, the user's batch index of each
            of the kernel's sequences; None where they are the same.
        stacks: How to see between the layers of a stack.
        asked: Which gates to harvest, where that can be done and pays.
    """
    took = _Stopwatch()
    if asked.columns and harvest.is_undisturbed(arguments[0]):
        call = _as_call(kernel, arguments)
        if call.is_worth_harvesting(asked):
            gates: list[list[Harvest]] | None
            (answer, layers), gates = call.harvest(
                took.timed(lambda: _run(call, kernel, arguments, stacks)), asked.columns
            )
            return _result(module, kernel, arguments, answer, layers, gates, find_order, took)
    if kernel.is_cell or kernel.options(arguments)[1] == 1:
        answer = took.timed(lambda: kernel(*arguments))()
        return _result(module, kernel, arguments, answer, [], None, find_order, took)
    call = _as_call(kernel, arguments)
    if call.drops and not _on_cpu(call) and stacks != "split":
        return KernelResult(kernel(*arguments), lambda: _masks_unknown(call))
    if call.drops and not _splits(call, stacks):
        state = torch.get_rng_state()
        answer = took.timed(lambda: kernel(*arguments))()

        def rerun_with_masks() -> Observation:
            layers = rerun(_plain(call), plain(_output(kernel, arguments, answer)), state)
            return _observation(module, call, layers, find_order, took.seconds)

        return KernelResult(answer, rerun_with_masks)
    answer, layers = took.timed(lambda: _run(call, kernel, arguments, stacks))()
    return _result(module, kernel, arguments, answer, layers, None, find_order, took)


class _Stopwatch:
    seconds = 0.0

    def timed(self, run: Callable[[], Result]) -> Callable[[], Result]:
        def timed() -> Result:
            began = time.perf_counter()
            result = run()
            self.seconds = time.perf_counter() - began
            return result

        return timed


def _run(
    call: KernelCall, kernel: Kernel, arguments: tuple[Any, ...], stacks: Stacks
) -> tuple[Any, list[Layer]]:
    """Run a call as it is, or a stack layer by layer; then also return the layers."""
    if call.num_layers == 1 or not _splits(call, stacks):
        return kernel(*arguments), []
    output, final, layers = split(call)
    batch_first = call.batch_sizes is None and bool(arguments[-1])
    return (output.transpose(0, 1) if batch_first else output, final), layers


def _splits(call: KernelCall, stacks: Stacks) -> bool:
    return stacks == "split" or (stacks == "auto" and _on_cpu(call))


def _as_call(kernel: Kernel, arguments: tuple[Any, ...]) -> KernelCall:
    if not kernel.is_cell:
        return KernelCall.of_gru(*arguments)
    input, initial = arguments[:2]
    weights = kernel.weights(arguments)
    return KernelCall(input.unsqueeze(0), None, initial.unsqueeze(0), weights, len(weights) == 4)


def _output(kernel: Kernel, arguments: tuple[Any, ...], answer: Any) -> Tensor:
    """Return (T, B, D * H) or (N, D * H) of what the kernel gave."""
    output: Tensor
    if kernel.is_cell:
        output = answer.unsqueeze(0)
    elif kernel.name == "gru.input" and arguments[-1]:
        output = answer[0].transpose(0, 1)
    else:
        output = answer[0]
    return output


def _result(
    module: GRUModule,
    kernel: Kernel,
    arguments: tuple[Any, ...],
    answer: Any,
    layers: list[Layer],
    gates: list[list[Harvest]] | None,
    find_order: Callable[[Tensor], Tensor | None],
    took: _Stopwatch,
) -> KernelResult:
    def observe() -> Observation:
        call, found = _as_call(kernel, arguments), layers
        if not found:
            output = _output(kernel, arguments, answer)
            if call.num_layers == 1:
                found = [Layer(call.input, output)]
            else:
                found = rerun(_plain(call), plain(output), None)
        return _observation(module, call, _with_gates(found, gates), find_order, took.seconds)

    return KernelResult(answer, observe)


def _with_gates(layers: list[Layer], gates: list[list[Harvest]] | None) -> list[Layer]:
    if gates is None:
        return layers
    return [layer._replace(gates=own) for layer, own in zip(layers, gates, strict=True)]


def _on_cpu(call: KernelCall) -> bool:
    return call.input.device.type == "cpu"


def _masks_unknown(call: KernelCall) -> Missed:
    return Missed(
        f"it drops out between its layers on {call.input.device}, where the masks cannot be known "
        "afterwards: pass stacks='split' (other masks than the fused stack's), or trace it in eval"
    )


def _observation(
    module: GRUModule,
    call: KernelCall,
    layers: list[Layer],
    find_order: Callable[[Tensor], Tensor | None],
    seconds: float,
) -> Observation:
    steps: Steps
    if call.batch_sizes is None:
        steps = PaddedSteps(*layers[-1].output.shape[:2])
    else:
        steps = PackedSteps(call.batch_sizes, find_order(call.batch_sizes))
    if any(map(is_wrapped, (call.input, call.initial, *call.weights, layers[-1].output))):
        call = _plain(call)
        layers = [Layer(plain(each.input), plain(each.output)) for each in layers]
    return Observation(call, steps, layers, module.training, seconds)


def _plain(call: KernelCall) -> KernelCall:
    weights = [plain(weight) for weight in call.weights]
    return call._replace(input=plain(call.input), initial=plain(call.initial), weights=weights)
