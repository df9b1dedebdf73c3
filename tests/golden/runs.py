"""The runs of the golden files: models, calls and options.

Each is run three times: traced, when a file was made; left alone, for what must be in it; and
traced again, when a test appends to the file. So nothing here may depend on chance but the inputs,
which come from a generator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

EVERYTHING = ("reset", "update", "candidate", "hidden", "input")

#: Gives the context in which a stretch of a run is recorded.
Recording = Callable[..., AbstractContextManager[Any]]


def unrecorded(**_: Any) -> AbstractContextManager[Any]:
    """The same part of the run, without recording."""
    return nullcontext()


@dataclass(frozen=True)
class Call:
    """The expected record of a call, as the run states it.

    Attributes:
        module: Path of the module.
        sequences: Which sequence of the module each batch row is a piece of.
        weights: Version of the weights.
        tag: Of the stretch of recording.
        training: Whether the module was in training mode.
    """

    module: str
    sequences: tuple[int, ...]
    weights: int = 0
    tag: str | None = None
    training: bool = True


@dataclass(frozen=True)
class Golden:
    """A run, and the expected content of its trace.

    Attributes:
        build: Makes the model.
        run: Uses the model, and records some of that.
        calls: The recorded calls in order.
        options: Of the tracer.
        forks: By path of the module, (sequence, parent, steps of the parent by then).
        annotations: By path and sequence, by name, a value of each step.
    """

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Recording], None]
    calls: tuple[Call, ...]
    options: Mapping[str, Any]
    forks: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)
    annotations: Mapping[tuple[str, int], Mapping[str, list[Any]]] = field(default_factory=dict)


def built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with weights that are the same each time, and wide enough to move the gates."""
    model = make()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        wide = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.data = wide.to(weight.dtype)
    return model


def numbers(seed: int, *shape: int) -> Tensor:
    """Inputs or states."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Kinds(nn.Module):
    """One of each kind: two directions, a path with a slash, no biases, float64, float16."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.GRU(3, 4, bidirectional=True, batch_first=True)
        self.cells = nn.ModuleDict({"a/b": nn.GRUCell(2, 3, bias=False).double()})
        self.brief = nn.GRU(2, 3).half()


def run_inline(model: nn.Module, recording: Recording) -> None:
    """Padded and packed, training and not, two versions of weights, one call of no sequences."""
    assert isinstance(model, Kinds)
    cell = model.cells["a/b"]
    with torch.no_grad():
        with recording(tag="first", tokens={"both": [["the", "ю"], ["a", "x"]]}):
            model.both(numbers(1, 2, 2, 3))
            cell(numbers(2, 2, 2).double())
        model.both.weight_ih_l0 += 0.5
        model.eval()
        with recording(labels={"pos": {"both": [[1.0, 2.5, -3.0], [4.0]]}}):
            padded = pack_padded_sequence(numbers(3, 2, 3, 3), torch.tensor([3, 1]), True)
            model.both(padded, numbers(4, 2, 2, 4))
            model.brief(numbers(5, 2, 1, 2).half())
            cell(numbers(6, 0, 2).double())


class Stack(nn.Module):
    """Two layers in two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, 2, bidirectional=True)


def run_deferred(model: nn.Module, recording: Recording) -> None:
    """Two calls, the second from states that are given, with other weights."""
    assert isinstance(model, Stack)
    with torch.no_grad():
        with recording():
            model.rnn(numbers(1, 3, 2, 3))
        model.rnn.weight_hh_l1_reverse *= 0.5
        with recording():
            model.rnn(numbers(2, 2, 1, 3), numbers(3, 4, 1, 4))


class Decoder(nn.Module):
    """A layer that is called once a token."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)


def run_decoder(model: nn.Module, recording: Recording) -> None:
    """Beam search: of two beams the second is taken twice, and the first is dropped and back."""
    assert isinstance(model, Decoder)
    words = {"rnn": [["<s>", "a", "b"], ["<s>", "c", "c"]]}
    probabilities = {"rnn": [[0.5, 0.25, 0.125], [1.0, 0.5, 0.0]]}
    with torch.no_grad(), recording(tag="beam", tokens=words, labels={"p": probabilities}):
        state = numbers(1, 1, 2, 4)
        for step in range(3):
            _, state = model.rnn(numbers(2 + step, 1, 2, 3), state)
    with torch.no_grad(), recording(tag="beam"):
        model.rnn(numbers(7, 1, 3, 3), state[:, [1, 1, 0]].contiguous())


class Encoder(nn.Module):
    """What `run_parts` calls first."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, batch: Tensor) -> Tensor:
        states: Tensor = self.rnn(batch)[0]
        return states


class Speaker(nn.Module):
    """What it calls later, with a module of the same path."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRUCell(2, 3)

    def forward(self, batch: Tensor, state: Tensor | None = None) -> Tensor:
        after: Tensor = self.rnn(batch, state)
        return after


def run_parts(encoder: nn.Module, speaker: nn.Module) -> None:
    """Calls of two models in turn."""
    with torch.no_grad():
        encoder(numbers(1, 2, 2, 3))
        state = speaker(numbers(2, 2, 2))
        encoder(numbers(3, 1, 1, 3))
        speaker(numbers(4, 2, 2), state)


INLINE = Golden(
    lambda: built(Kinds, 1),
    run_inline,
    (
        Call("both", (0, 1), 0, "first"),
        Call("cells.a/b", (0, 1), 0, "first"),
        Call("both", (2, 3), 1, training=False),
        Call("brief", (0,), 0, training=False),
        Call("cells.a/b", (), 0, training=False),
    ),
    {"record": EVERYTHING, "gates": "inline", "stacks": "split", "check": "raise"},
    annotations={
        ("both", 0): {"tokens": ["the", "ю"]},
        ("both", 1): {"tokens": ["a", "x"]},
        ("both", 2): {"pos": [1.0, 2.5, -3.0]},
        ("both", 3): {"pos": [4.0]},
    },
)

DEFERRED = Golden(
    lambda: built(Stack, 2),
    run_deferred,
    (Call("rnn", (0, 1), 0), Call("rnn", (2,), 1)),
    {"record": EVERYTHING, "gates": "deferred", "stacks": "split", "check": "raise"},
)

DECODER = Golden(
    lambda: built(Decoder, 3),
    run_decoder,
    (*[Call("rnn", (0, 1), 0, "beam")] * 3, Call("rnn", (1, 2, 0), 0, "beam")),
    {"record": EVERYTHING, "gates": "inline", "units": [3, 1], "check": "raise"},
    forks={"rnn": ((2, 1, 3),)},
    annotations={
        ("rnn", 0): {"tokens": ["<s>", "a", "b", None], "p": [0.5, 0.25, 0.125, None]},
        ("rnn", 1): {"tokens": ["<s>", "c", "c", None], "p": [1.0, 0.5, 0.0, None]},
    },
)

#: Runs with one tracer, by the name of the file. The killed one had committed all of a run, and of
#: the same once more no counts.
GOLDENS = {"inline": INLINE, "deferred": DEFERRED, "decoder": DECODER, "killed": DEFERRED}

#: The calls of `run_parts`, by the number of the part.
PART_CALLS = {
    1: (Call("rnn", (0, 1)), Call("rnn", (2,))),
    2: (Call("rnn", (0, 1)), Call("rnn", (0, 1))),
}
