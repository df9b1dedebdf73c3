"""The cost of interventions, relative to a loop in the layer's place.

Without gradients, a constant that is held from the first step on is compared with a loop under
torch.jit.script that holds it, too. Everything else is compared with the untraced layer and a plain
Python loop together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

import grutrace
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import ratio
from benchmarks.workloads import SHAPES, Workload, single_layer

#: The units that are held.
UNITS = [3, 7]

TARGET = Target(1.15)


def loop(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    mask: Tensor,
    value: Tensor,
) -> Tensor:
    """The layer, with the update gate held at a value where the mask is true."""
    products = torch.nn.functional.linear(input, weight_ih, bias_ih)
    states: list[Tensor] = []
    for step in range(input.shape[0]):
        input_r, input_z, input_n = products[step].chunk(3, 1)
        product = torch.nn.functional.linear(hidden, weight_hh, bias_hh)
        hidden_r, hidden_z, hidden_n = product.chunk(3, 1)
        reset = torch.sigmoid(input_r + hidden_r)
        update = torch.where(mask, value, torch.sigmoid(input_z + hidden_z))
        candidate = torch.tanh(input_n + reset * hidden_n)
        hidden = (hidden - candidate) * update + candidate
        states.append(hidden)
    return torch.stack(states)


@cache
def scripted() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        # torch.jit.script is deprecated, but still widely used.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(loop)


def figures() -> Iterator[Figure]:
    """Yield all figures."""
    for shape in SHAPES:
        torch.manual_seed(0)
        workload = single_layer(*shape)
        with torch.no_grad():
            held = grutrace.intervene(workload.model, "l0", update=0.0, units=UNITS)
            name = f"held from step 0, {workload.name}, over the scripted loop"
            with held:
                result = ratio(_repeated(scripted(), workload), workload.run, limit=1.0)
            yield measured(name, result, TARGET)
            both = _both(workload.run, _repeated(loop, workload))
            name = f"a function, {workload.name}, over the layer and a loop"
            halved = grutrace.intervene(workload.model, "l0", update=lambda gate, _: gate * 0.5)
            yield _figure(name, both, workload.run, halved)
        if workload.kind == "one step":
            continue
        layer, input = cast(nn.GRU, workload.model), workload.input
        name = f"held, with gradients, {workload.name}, over the layer and a loop"
        arguments = _arguments(workload)

        def train(run: Callable[[], Tensor], layer: nn.GRU = layer) -> None:
            layer.zero_grad()
            run().sum().backward()

        def base(arguments: Any = arguments, layer: nn.GRU = layer, input: Any = input) -> None:
            train(lambda: layer(input)[0])
            train(lambda: loop(*arguments))

        def other(layer: nn.GRU = layer, input: Any = input) -> None:
            train(lambda: layer(input)[0])

        yield _figure(name, base, other, held)


def _figure(
    name: str, base: Callable[[], object], run: Callable[[], object], intervention: Any
) -> Figure:
    """Measure a run within an intervention."""

    def intervened() -> None:
        with intervention:
            run()

    return measured(name, ratio(base, intervened, limit=1.0), TARGET)


def _arguments(workload: Workload) -> tuple[Tensor, ...]:
    """Return the arguments of the loop."""
    layer, input = cast(nn.GRU, workload.model), workload.input
    assert input is not None
    mask = torch.zeros(layer.hidden_size, dtype=torch.bool)
    mask[UNITS] = True
    state = torch.zeros(input.shape[1], layer.hidden_size)
    return (input, state, *cast(Any, layer)._flat_weights, mask, torch.tensor(0.0))


def _repeated(function: Callable[..., Tensor], workload: Workload) -> Callable[[], None]:
    """Return a function that runs the loop as often as the workload calls its layer."""
    arguments = _arguments(workload)

    def run() -> None:
        for _ in range(workload.calls):
            function(*arguments)

    return run


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run
