"""From a kernel call to what every layer read and made in it.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from grutrace.capture.kernel_registration import GRUKernel as Kernel
from grutrace.capture.surroundings import Missed, is_wrapped, plain
from grutrace.gru import harvest
from grutrace.gru.gather import Asked
from grutrace.gru.harvest import Harvest
from grutrace.gru.kernel import KernelCall, Layer, rerun, split
from grutrace.gru.steps import PackedSteps, PaddedSteps, Steps

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
    call, harvests, state = None, False, None
    if asked.columns and harvest.is_undisturbed(arguments[0]):
        call = _as_call(kernel, arguments)
        harvests = call.is_worth_harvesting(asked)
    is_stack = not kernel.is_cell and kernel.options(arguments)[1] > 1
    if is_stack:
        call = call or _as_call(kernel, arguments)
        if call.drops and not _splits(call, stacks):
            if not _on_cpu(call):
                return KernelResult(kernel(*arguments), partial(_masks_unknown, call))
            state = torch.get_rng_state()

    def run() -> tuple[Any, list[Layer]]:
        began = time.perf_counter()
        if call is not None and is_stack and _splits(call, stacks):
            answer, layers = _split(call, arguments)
        else:
            answer, layers = kernel(*arguments), []
        took.seconds = time.perf_counter() - began
        return answer, layers

    gates: list[list[Harvest]] | None = None
    if call is not None and harvests:
        (answer, layers), gates = call.harvest(run, asked.columns)
    else:
        answer, layers = run()

    def observe() -> Observation:
        own, returned, found = arguments, answer, layers
        if _is_transformed(arguments):
            own, returned = _unwrapped(arguments), _unwrapped(answer)
            found = [Layer(plain(each.input), plain(each.output)) for each in layers]
        made = _as_call(kernel, own)
        if not found:
            output = _output(kernel, own, returned)
            found = rerun(made, output, state) if is_stack else [Layer(made.input, output)]
        return _observation(module, made, _with_gates(found, gates), find_order, took.seconds)

    return KernelResult(answer, observe)


class _Stopwatch:
    seconds = 0.0


def _split(call: KernelCall, arguments: tuple[Any, ...]) -> tuple[Any, list[Layer]]:
    """Answer a call layer by layer."""
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
    return Observation(call, steps, layers, module.training, seconds)


def _is_transformed(arguments: tuple[Any, ...]) -> bool:
    """Whether a transform of torch.func holds one of the tensors among some arguments."""
    return any(
        _is_transformed(tuple(each)) if isinstance(each, (list, tuple)) else is_wrapped(each)
        for each in arguments
        if isinstance(each, (Tensor, list, tuple))
    )


def _unwrapped(values: Any) -> Any:
    """Return the same with the tensors that torch.func's transforms have wrapped."""
    if isinstance(values, Tensor):
        return plain(values) if is_wrapped(values) else values
    if isinstance(values, (list, tuple)):
        return type(values)(map(_unwrapped, values))
    return values
