"""The workloads: layers of many shapes, an encoder-decoder, a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["compute bound", "one step", "training", "other"]


@dataclass(frozen=True)
class Workload:
    """A model and one run of it.

    Attributes:
        name: What the table calls it.
        model: What a tracer attaches to.
        run: Runs it once; returns the output.
        input: The input of a single layer, (T, B, I); None for other models.
        calls: How often a run calls a single layer.
        kind: What its targets depend on.
    """

    name: str
    model: nn.Module
    run: Callable[[], object]
    input: Tensor | None = None
    calls: int = 1
    kind: Kind = "other"


#: T, B, I, H
SHAPES = (
    (128, 32, 256, 256),
    (64, 1, 128, 128),
    (256, 64, 512, 512),
    (50, 16, 64, 64),
    (100, 32, 1024, 1024),
    (1, 32, 512, 512),
    (1000, 1, 64, 64),
    (512, 8, 256, 256),
)

#: Their time goes into matrix products, which tracing would have to make anew.
COMPUTE_BOUND = {(128, 32, 256, 256), (256, 64, 512, 512), (100, 32, 1024, 1024)}

#: Calls of a run, so that it takes some 50 milliseconds: a program makes one call after another
#: while it records. The first call after a pause costs more, since the caches are cold. To start
#: and stop a tracer takes 0.3 milliseconds.
CALLS = {
    (128, 32, 256, 256): 2,
    (64, 1, 128, 128): 50,
    (50, 16, 64, 64): 40,
    (1, 32, 512, 512): 60,
    (1000, 1, 64, 64): 6,
}

#: The same for the encoder-decoder.
TRANSLATIONS = 4

#: On these what takes hundreds of times the layer's time is measured, too.
SMALL = {(64, 1, 128, 128), (50, 16, 64, 64)}


def single_layer(steps: int, batch: int, input_size: int, hidden_size: int) -> Workload:
    """One fused layer under no_grad."""
    layer = nn.GRU(input_size, hidden_size)
    input = torch.randn(steps, batch, input_size)
    shape = (steps, batch, input_size, hidden_size)
    calls = CALLS.get(shape, 1)
    kind: Kind = "other"
    if steps == 1:
        kind = "one step"
    elif shape in COMPUTE_BOUND:
        kind = "compute bound"

    def run() -> Tensor:
        with torch.no_grad():
            for _ in range(calls):
                output, _ = layer(input)
        return output

    name = f"T{steps} B{batch} I{input_size} H{hidden_size}"
    return Workload(name, layer, run, input, calls, kind)


class EncoderDecoder(nn.Module):
    """A 2-layer bidirectional encoder and a decoder that calls its GRU once a token."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.encoder = nn.GRU(size, size, 2, bidirectional=True)
        self.decoder = nn.GRU(size, size)

    def forward(self, input: Tensor, steps: int) -> Tensor:
        _, final = self.encoder(input)
        state, token = final[-1:], input[:1]
        for _ in range(steps):
            token, state = self.decoder(token, state)
        return token


def encoder_decoder() -> Workload:
    model, input = EncoderDecoder(), torch.randn(50, 16, 128)

    def run() -> Tensor:
        with torch.no_grad():
            for _ in range(TRANSLATIONS):
                output = model(input, 20)
        return output

    return Workload("encoder-decoder B16 T50/20 H128", model, run)


def training_step() -> Workload:
    """Forward, backward and Adam."""
    layer, input = nn.GRU(256, 256), torch.randn(128, 32, 256)
    optimizer = torch.optim.Adam(layer.parameters())

    def run() -> None:
        optimizer.zero_grad()
        layer(input)[0].square().mean().backward()
        optimizer.step()

    return Workload("training step T128 B32 I256 H256", layer, run, kind="training")


class TokenDecoder(nn.Module):
    """A 2-layer encoder, and a decoder that calls its cell once a token."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(size, size, 2), nn.GRUCell(size, size)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        state = self.encoder(input)[1][-1]
        outputs = []
        for token in target:
            state = self.cell(token, state)
            outputs.append(state)
        return torch.stack(outputs)


def training_encoder_decoder() -> Workload:
    """Forward, backward and Adam, so that every step has new weights."""
    model = TokenDecoder()
    input, target = torch.randn(20, 32, 128), torch.randn(20, 32, 128)
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        optimizer.zero_grad()
        model(input, target).square().mean().backward()
        optimizer.step()

    return Workload("training encoder-decoder B32 T20/20 H128", model, run, kind="training")


def all_workloads() -> list[Callable[[], Workload]]:
    """Return what makes each of them."""
    layers = [partial(single_layer, *shape) for shape in SHAPES]
    return [*layers, encoder_decoder, training_step, training_encoder_decoder]
