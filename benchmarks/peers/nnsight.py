"""nnsight gives what goes into and out of a module, and the operations of its Python forward. Of
nn.GRU's the last is the fused kernel: it gives the output, and no gate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.peer import Peer, Running, need


class Model(nn.Module):
    """A model that contains the layer, because nnsight names modules by their path in a model."""

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Any:
        return self.layer(input)


@contextmanager
def prepare(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    nnsight = need("nnsight")
    model = nnsight.NNsight(Model(layer))

    def call() -> Any:
        with model.trace(input):
            output = model.layer.output.save()
        # nnsight runs the block later, apart from this function: it cannot return from within it.
        return output  # noqa: RET504

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Running(call, lambda output: {"output": output[0]})


NNSIGHT = Peer("nnsight on the layer", "output", prepare, gates=False, package="nnsight")
