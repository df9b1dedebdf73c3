"""Opacus' DPGRU: an nn.GRU written in Python, for gradients sample by sample. It keeps no gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from benchmarks.peers.peer import Peer, Running, need


@contextmanager
def prepare(layer: nn.GRU, input: Tensor) -> Iterator[Running]:
    need("opacus")
    from opacus.layers import DPGRU

    other = DPGRU(layer.input_size, layer.hidden_size)
    # Its parameters have the names of nn.GRU's.
    other.load_state_dict(layer.state_dict())
    yield Running(lambda: other(input)[0], lambda output: {"output": output})


OPACUS = Peer("Opacus' DPGRU instead", "output", prepare, gates=False, package="opacus")
