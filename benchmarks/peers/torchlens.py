"""TorchLens logs each operation of a forward. A fused layer is one, so of nn.GRU it has the output;
of a GRU written as a Python loop it has every gate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.loops import first_state, loop
from benchmarks.peers.peer import Peer, Running, Values, need


class Loop(nn.Module):
    """The loop as a model."""

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return loop(input, first_state(self.layer, input), *self.layer._flat_weights)[0]


@contextmanager
def logging(model: nn.Module, input: Tensor) -> Iterator[Any]:
    """Yield a call that logs a forward, and remove TorchLens' wrappers from torch afterwards."""
    torchlens = need("torchlens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield lambda: torchlens.trace(model, input)
        finally:
            # Otherwise they stay after a call, and slow down the next measurement.
            options = torchlens.options.CaptureOptions(unwrap_when_done=True)
            torchlens.trace(nn.Identity(), torch.zeros(1), capture=options)


@contextmanager
def of_layer(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    with logging(layer, input) as call:
        yield Running(call, lambda log: {"output": outputs(log, "gru")[0]})


@contextmanager
def of_loop(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    with logging(Loop(layer), input) as call:
        yield Running(call, read)


def read(log: Any) -> Values:
    """The gates are the sigmoids, reset and update in turn, and the tanhs."""
    sigmoids = outputs(log, "sigmoid")
    return {
        "output": outputs(log, "stack")[0],
        "reset": torch.stack(sigmoids[::2]),
        "update": torch.stack(sigmoids[1::2]),
        "candidate": torch.stack(outputs(log, "tanh")),
    }


def outputs(log: Any, function: str) -> list[Tensor]:
    """What all calls of a function gave, in order."""
    return [operation.out for operation in log.ops if operation.func_name == function]


TORCHLENS = (
    Peer(
        "TorchLens on the layer",
        "output",
        of_layer,
        gates=False,
        package="torchlens",
        only_small=True,
    ),
    Peer(
        "TorchLens on a Python loop",
        "output, all gates",
        of_loop,
        package="torchlens",
        only_small=True,
    ),
)
