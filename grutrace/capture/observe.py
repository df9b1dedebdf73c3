"""From a kernel call, or a plain forward call, to what every layer read and made in it.

T steps, B sequences in a batch, I input size, H hidden size, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from grutrace.capture.surroundings import Missed, aside, is_wrapped, plain
from grutrace.capture.tap import Kernel
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
        given_state: Whether the module may have been given a state to start from.
        training: Whether the module was in training mode.
    """

    call: KernelCall
    steps: Steps
    layers: list[Layer]
    given_state: bool
    training: bool


def plain_call(
    module: GRUModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Observation:
    """Observe a call of a module with one layer, through what a forward hook is given.

    Args:
        module: The module.
        args: What it was called with.
        kwargs: Likewise.
        output: What it returned.
    """
    input = args[0] if args else kwargs["input"]
    initial = args[1] if len(args) > 1 else kwargs.get("hx")
    if isinstance(module, nn.GRUCell):
        return _plain_cell(module, input, initial, output)
    if isinstance(input, PackedSequence):
        return _plain_packed(module, input, initial, output[0])
    return _plain_padded(module, input, initial, output[0])


def _plain_cell(
    module: nn.GRUCell, input: Tensor, initial: Tensor | None, output: Tensor
) -> Observation:
    weights = cell_weights(module)
    given_state = initial is not None
    if input.dim() == 1:
        input, output = input.unsqueeze(0), output.unsqueeze(0)
        initial = None if initial is None else initial.unsqueeze(0)
    if initial is None:
        initial = _zeros(module, 1, len(output), like=output)
    else:
        initial = initial.unsqueeze(0)
    call = KernelCall(input.unsqueeze(0), None, initial, weights, bool(module.bias))
    layer = Layer(call.input, output.unsqueeze(0))
    return _observation(module, call, [layer], None, given_state)


def _plain_padded(
    module: nn.GRU, input: Tensor, initial: Tensor | None, output: Tensor
) -> Observation:
    if input.dim() == 2:
        input, output = input.unsqueeze(1), output.unsqueeze(1)
        initial = None if initial is None else initial.unsqueeze(1)
    elif module.batch_first:
        input, output = input.transpose(0, 1), output.transpose(0, 1)
    call = _plain_gru(module, input, None, initial, input.shape[1])
    return _observation(module, call, [Layer(input, output)], None, initial is not None)


def _plain_packed(
    module: nn.GRU, input: PackedSequence, initial: Tensor | None, output: PackedSequence
) -> Observation:
    order = input.sorted_indices
    if initial is not None and order is not None:
        initial = initial.index_select(1, order)
    batch = int(input.batch_sizes[0])
    call = _plain_gru(module, input.data, input.batch_sizes, initial, batch)
    layer = Layer(input.data, output.data)
    return _observation(module, call, [layer], order, initial is not None)


def _plain_gru(
    module: nn.GRU, input: Tensor, batch_sizes: Tensor | None, initial: Tensor | None, batch: int
) -> KernelCall:
    directions = 2 if module.bidirectional else 1
    if initial is None:
        initial = _zeros(module, directions, batch, like=input)
    return KernelCall(
        input,
        batch_sizes,
        initial,
        _weights(module),
        module.bias,
        training=module.training,
        bidirectional=module.bidirectional,
    )


def _weights(module: GRUModule) -> list[Tensor]:
    if isinstance(module, nn.GRUCell):
        return cell_weights(module)
    return cast("list[Tensor]", module._flat_weights)


def cell_weights(module: nn.GRUCell) -> list[Tensor]:
    """Return the weights of a cell in the order in which torch.gru takes a layer's."""
    weights: tuple[Tensor | None, ...]
    weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    return [weight for weight in weights if weight is not None]


def _zeros(module: GRUModule, directions: int, batch: int, *, like: Tensor) -> Tensor:
    return like.new_zeros((directions, batch, module.hidden_size))


def is_own_call(module: GRUModule, arguments: tuple[Any, ...]) -> bool:
    """Whether a kernel call made within the module's forward is that of the module itself.

    It is not if its weights are those of a layer inside the module, or do not fit the module.
    """
    if isinstance(module, nn.GRUCell):
        return isinstance(arguments[2], Tensor) and arguments[1].shape[-1] == module.hidden_size
    weights = arguments[3] if isinstance(arguments[2], Tensor) else arguments[2]
    if weights is module._flat_weights:
        return True
    inner = (each for each in module.modules() if isinstance(each, nn.RNNBase))
    return isinstance(weights, (list, tuple)) and not any(
        weights is each._flat_weights for each in inner
    )


def kernel_call(
    module: GRUModule,
    kernel: Kernel,
    arguments: tuple[Any, ...],
    sorted_indices: Tensor | None,
    stacks: Stacks,
    asked: Asked,
) -> tuple[Any, Observation | Missed]:
    """Make a kernel call, and observe it.

    Args:
        module: The module whose forward makes the call.
        kernel: torch.gru or torch.gru_cell.
        arguments: Its positional arguments.
        sorted_indices: The user's place of each of the kernel's sequences, if known.
        stacks: How to see between the layers of a stack.
        asked: Which gates to harvest, where that can be done and pays.

    Returns:
        The kernel's answer, and the observation; or why the layers below the top cannot be seen.
    """
    if isinstance(module, nn.GRUCell):
        return _cell_call(module, kernel, arguments, asked)
    call = KernelCall.of_gru(*arguments)
    padded = call.batch_sizes is None
    batch_first = padded and bool(arguments[-1])
    splits = stacks == "split" or (stacks == "auto" and _on_cpu(call))
    if call.drops and not splits and not _on_cpu(call):
        return kernel(*arguments), _masks_unknown(call)
    state = torch.get_rng_state() if call.drops and not splits else None

    def run() -> tuple[Any, list[Layer]]:
        if not splits or call.num_layers == 1:
            return kernel(*arguments), []
        output, final, layers = split(call)
        return (output.transpose(0, 1) if batch_first else output, final), layers

    (result, layers), gates = _run(call, run, asked)
    if not layers:
        output = result[0].transpose(0, 1) if batch_first else result[0]
        with aside():
            layers = rerun(_plain(call), plain(output), state)
    layers = _with_gates(layers, gates)
    return result, _observation(module, call, layers, sorted_indices, given_state=True)


def _cell_call(
    module: nn.GRUCell, kernel: Kernel, arguments: tuple[Any, ...], asked: Asked
) -> tuple[Tensor, Observation]:
    input, initial, *weights = arguments
    weights = [each for each in weights if each is not None]
    call = KernelCall(input.unsqueeze(0), None, initial.unsqueeze(0), weights, len(weights) == 4)
    made: Tensor
    made, gates = _run(call, lambda: kernel(*arguments), asked)
    layers = _with_gates([Layer(call.input, made.unsqueeze(0))], gates)
    return made, _observation(module, call, layers, None, given_state=True)


def _run(
    call: KernelCall, run: Callable[[], Result], asked: Asked
) -> tuple[Result, list[list[Harvest]] | None]:
    if asked.columns and call.is_worth_harvesting(asked):
        return call.harvest(run, asked.columns)
    return run(), None


def _with_gates(layers: list[Layer], gates: list[list[Harvest]] | None) -> list[Layer]:
    if gates is None:
        return layers
    return [layer._replace(gates=own) for layer, own in zip(layers, gates, strict=True)]


def is_worth_harvesting(
    module: GRUModule, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Asked
) -> bool:
    """Whether a call that is about to be made is better heard by a tap, to harvest its gates."""
    input = args[0] if args else kwargs.get("input")
    if isinstance(input, PackedSequence):
        times, rows = len(input.batch_sizes), len(input.data)
    elif not isinstance(input, Tensor) or input.dim() not in _dimensions(module):
        # What the module says to that is its own.
        return False
    else:
        rows = input.shape[:-1].numel()
        in_time = 1 if input.dim() == 3 and isinstance(module, nn.GRU) and module.batch_first else 0
        times = 1 if isinstance(module, nn.GRUCell) else input.shape[in_time]
    batch = rows / max(1, times)
    return harvest.pays(
        times, batch, module.input_size, module.hidden_size, asked
    ) and harvest.is_undisturbed(input.data)


def _dimensions(module: GRUModule) -> tuple[int, int]:
    """How many a tensor may have that the module takes."""
    return (1, 2) if isinstance(module, nn.GRUCell) else (2, 3)


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
    sorted_indices: Tensor | None,
    given_state: bool,
) -> Observation:
    steps: Steps
    if call.batch_sizes is None:
        steps = PaddedSteps(*layers[-1].output.shape[:2])
    else:
        steps = PackedSteps(call.batch_sizes, sorted_indices)
    if any(map(is_wrapped, (call.input, call.initial, *call.weights, layers[-1].output))):
        call = _plain(call)
        layers = [Layer(plain(each.input), plain(each.output)) for each in layers]
    return Observation(call, steps, layers, given_state, module.training)


def _plain(call: KernelCall) -> KernelCall:
    weights = [plain(weight) for weight in call.weights]
    return call._replace(input=plain(call.input), initial=plain(call.initial), weights=weights)
