"""The GRU as a Python loop over time, which is the common way to see its gates today.

The order of operations is the CPU kernel's own, so that the states are the layer's, and the product
with the input is made for all steps at once. A loop over nn.GRUCell does neither, and is slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.peers.peer import GATES, Absent, Peer, Running, Values

#: The backend of torch.compile.
BACKEND = "inductor"

#: States and gates, (T, B, H) each: hidden, reset, update, candidate.
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def loop(
    input: Tensor,
    hidden: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A GRU as a loop over time that returns states and gates.

    Args:
        input: (T, B, I)
        hidden: (B, H), the state before the first step.
        weight_ih: (3H, I)
        weight_hh: (3H, H)
        bias_ih: (3H,)
        bias_hh: (3H,)
    """
    products = torch.nn.functional.linear(input, weight_ih, bias_ih)
    states: list[Tensor] = []
    resets: list[Tensor] = []
    updates: list[Tensor] = []
    candidates: list[Tensor] = []
    for product in products.unbind(0):
        input_r, input_z, input_n = product.chunk(3, 1)
        hidden_r, hidden_z, hidden_n = torch.nn.functional.linear(hidden, weight_hh, bias_hh).chunk(
            3, 1
        )
        reset = torch.sigmoid(input_r + hidden_r)
        update = torch.sigmoid(input_z + hidden_z)
        candidate = torch.tanh(input_n + reset * hidden_n)
        hidden = (hidden - candidate) * update + candidate
        states.append(hidden)
        resets.append(reset)
        updates.append(update)
        candidates.append(candidate)
    return torch.stack(states), torch.stack(resets), torch.stack(updates), torch.stack(candidates)


def step(product: Tensor, hidden: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> Results:
    """One step of `loop`, for a compiler that would unroll the loop. ``product`` is (B, 3H)."""
    input_r, input_z, input_n = product.chunk(3, 1)
    hidden_r, hidden_z, hidden_n = linear(hidden, weight_hh, bias_hh).chunk(3, 1)
    reset = torch.sigmoid(input_r + hidden_r)
    update = torch.sigmoid(input_z + hidden_z)
    candidate = torch.tanh(input_n + reset * hidden_n)
    return (hidden - candidate) * update + candidate, reset, update, candidate


def read(results: Results) -> Values:
    """Name what `loop` returned."""
    return dict(zip(("output", *GATES), results, strict=True))


def first_state(layer: nn.GRU, input: Tensor) -> Tensor:
    return torch.zeros(input.shape[1], layer.hidden_size)


@contextmanager
def beside(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    """The layer, and the loop after it. The model is unchanged."""
    hidden = first_state(layer, input)

    def call() -> Results:
        output = layer(input)[0]
        _, *gates = loop(input, hidden, *layer._flat_weights)
        return (output, *gates)

    yield Running(call, read)


def instead(function: Callable[[], Callable[..., Results]]) -> Any:
    """The loop instead of the layer, as ``function`` makes it."""

    @contextmanager
    def prepare(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
        hidden, made = first_state(layer, input), function()
        yield Running(lambda: made(input, hidden, *layer._flat_weights), read)

    return prepare


@cache
def scripted() -> Callable[..., Results]:
    with warnings.catch_warnings():
        # torch.jit.script is deprecated, but still widely used.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(loop)


@contextmanager
def compiled_loop(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    """The whole loop compiled, unrolled over its steps."""
    hidden = first_state(layer, input)
    with _compiled(loop) as function:
        yield _tried(lambda: function(input, hidden, *layer._flat_weights))


@contextmanager
def compiled_step(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    """The compiled step, called in a Python loop."""
    hidden = first_state(layer, input)
    weight_ih, weight_hh, bias_ih, bias_hh = layer._flat_weights
    with _compiled(step) as function:

        def call() -> Results:
            state, results = hidden, []
            for product in linear(input, weight_ih, bias_ih).unbind(0):
                results.append(function(product, state, weight_hh, bias_hh))
                state = results[-1][0]
            states, resets, updates, candidates = map(torch.stack, zip(*results, strict=True))
            return states, resets, updates, candidates

        yield _tried(call)


@contextmanager
def _compiled(function: Callable[..., Results]) -> Iterator[Callable[..., Results]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield torch.compile(function, backend=BACKEND, dynamic=False)
        finally:
            # Each shape is compiled from an empty cache, so no time goes to searching it.
            torch.compiler.reset()


def _tried(call: Callable[[], Results]) -> Running:
    """Compile, in the first call. This fails without a C++ compiler."""
    try:
        call()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise Absent(f"absent: torch.compile failed: {type(error).__name__}: {reason}") from error
    return Running(call, read)


LOOPS = (
    Peer("Python loop beside the layer", "output, all gates", beside),
    Peer("Python loop instead", "output, all gates", instead(lambda: loop)),
    Peer("loop under torch.jit.script", "output, all gates", instead(scripted)),
    Peer("step under torch.compile, in a Python loop", "output, all gates", compiled_step),
    Peer(
        "loop under torch.compile",
        "output, all gates",
        compiled_loop,
        # Unrolled: 50 steps took half a minute to compile, and it grows with their number.
        most_steps=50,
    ),
)
