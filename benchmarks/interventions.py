"""The cost of interventions, relative to a loop in the layer's place.

Without gradients, a constant that is held from the first step on is compared with a loop under
torch.jit.script, which returns all gates. Everything else is compared with the untraced layer and a
plain Python loop together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

import grutrace
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import ratio
from benchmarks.peers import loops
from benchmarks.workloads import SHAPES, Workload, single_layer

#: The units that are held.
UNITS = [3, 7]

TARGET = Target(1.15)


def figures() -> Iterator[Figure]:
    """Yield all figures."""
    for shape in SHAPES:
        torch.manual_seed(0)
        workload = single_layer(*shape)
        with torch.no_grad():
            held = grutrace.intervene(workload.model, "l0", update=0.0, units=UNITS)
            name = f"held from step 0, {workload.name}, over the scripted loop"
            with held:
                result = ratio(_repeated(loops.scripted(), workload), workload.run, limit=1.0)
            yield measured(name, result, TARGET)
            if workload.kind == "one step":
                yield _from_other_state(workload, held)
            both = _both(workload.run, _repeated(loops.loop, workload))
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
            train(lambda: loops.loop(*arguments)[0])

        def other(layer: nn.GRU = layer, input: Any = input) -> None:
            train(lambda: layer(input)[0])

        yield _figure(name, base, other, held)


def _from_other_state(workload: Workload, held: Any) -> Figure:
    """Measure calls that do not start from zeros, whose products are those of one row."""
    layer, (input, hidden, *weights) = cast(nn.GRU, workload.model), _arguments(workload)
    state, loop = torch.randn_like(hidden), loops.scripted()

    def base() -> None:
        for _ in range(workload.calls):
            loop(input, state, *weights)

    def run() -> None:
        for _ in range(workload.calls):
            layer(input, state.unsqueeze(0))

    name = f"held from step 0, {workload.name}, not from zeros, over the scripted loop"
    with held:
        return measured(name, ratio(base, run, limit=1.0), TARGET)


def _figure(
    name: str, base: Callable[[], object], run: Callable[[], object], intervention: Any
) -> Figure:
    """Measure a run within an intervention."""

    def intervened() -> None:
        with intervention:
            run()

    return measured(name, ratio(base, intervened, limit=1.0), TARGET)


def _repeated(function: Callable[..., loops.Results], workload: Workload) -> Callable[[], None]:
    """Return a function that runs the loop as often as the workload calls its layer."""
    arguments = _arguments(workload)

    def run() -> None:
        for _ in range(workload.calls):
            function(*arguments)

    return run


def _arguments(workload: Workload) -> tuple[Tensor, ...]:
    """Return the arguments of the loop."""
    layer, input = cast(nn.GRU, workload.model), workload.input
    assert input is not None
    return (input, loops.first_state(layer, input), *cast(Any, layer)._flat_weights)


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run
