"""Tests of the peers: their gates equal those of the trace; a missing peer is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, loops
from benchmarks.peers.loops import LOOPS
from benchmarks.peers.peer import (
    GATES,
    Absent,
    Peer,
    Values,
    disagreement,
    need,
    traced_values,
)
from tests import oracles

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture
def layer() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(6, 6)


@pytest.fixture
def input() -> Tensor:
    return torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1))


def values(peer: Peer, layer: nn.GRU, input: Tensor) -> Values:
    try:
        with torch.no_grad(), peer.prepare(layer, input) as running:
            return running.read(running.call())
    except Absent as absent:
        pytest.skip(f"{peer.name}: {absent}")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating code takes up to half a minute. What it gives is compared before it is timed."""
    monkeypatch.setattr(loops, "BACKEND", "eager")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
# What the packages warn about is theirs.
@pytest.mark.filterwarnings("ignore")
def test_a_peer_gives_what_it_claims(peer: Peer, layer: nn.GRU, input: Tensor) -> None:
    result = values(peer, layer, input)
    assert set(result) == {"output", *(GATES if peer.gates else ())}
    with torch.no_grad():
        assert disagreement(peer, result, traced_values(layer, input)) == ""
    if not peer.gates:
        return
    states = result["output"].numpy()
    previous = np.concatenate([np.zeros((1, 3, 6), np.float32), states[:-1]])
    weights = oracles.weights_of(layer, "l0")
    rows = input.numpy().reshape(-1, 6)
    expected = oracles.gates(weights, rows, previous.reshape(-1, 6), EPS)
    for name in GATES:
        off = np.abs(result[name].numpy().reshape(-1, 6) - expected.values[name])
        assert (off <= expected.bounds[name]).all(), name


def test_a_peer_with_wrong_values_is_detected(layer: nn.GRU, input: Tensor) -> None:
    loop = LOOPS[1]
    result = values(loop, layer, input)
    expected = traced_values(layer, input)
    assert disagreement(loop, result, expected) == ""
    swapped = result | {"reset": result["update"], "update": result["reset"]}
    assert disagreement(loop, swapped, expected).startswith("reset differs by ")
    assert disagreement(loop, result | {"update": result["update"] * torch.nan}, expected)
    assert disagreement(loop, {"output": result["output"]}, expected) == "gives no reset"
    assert disagreement(replace(loop, gates=False), {"output": result["output"]}, expected) == ""


def test_a_missing_package_is_named() -> None:
    with pytest.raises(Absent, match="absent: no-such-package is not installed"):
        need("no-such-package")


@pytest.mark.filterwarnings("ignore")
def test_torch_is_unwrapped_afterwards(layer: nn.GRU, input: Tensor) -> None:
    before = torch.sigmoid, torch.nn.functional.linear, torch.Tensor.__add__
    peer = next(peer for peer in PEERS if peer.name == "TorchLens on the layer")
    values(peer, layer, input)
    assert (torch.sigmoid, torch.nn.functional.linear, torch.Tensor.__add__) == before
