"""The journal: calls that wait are worked out in order, with the right weights, and are bounded."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture import journal, versions
from tests import oracles


@pytest.fixture
def dear(monkeypatch) -> None:
    """Weights are compared only where they must be, and no sample finds a change."""
    monkeypatch.setattr(versions, "SHARE", -1.0)
    monkeypatch.setattr(versions, "SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr(versions._Seen, "has_sample_of", lambda *_: True)


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_frozen_and_a_trained_cell(tokens, gates, to_file, dear, tmp_path) -> None:
    """Calls of the frozen one wait; new weights of the other come all the while."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.GRUCell(3, 8), "trained": nn.GRUCell(3, 8)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["trained"].parameters(), 0.1)
    expected: list[np.ndarray] = []
    with grutrace.trace(model, tmp_path / "a.h5" if to_file else None, gates=gates) as trace:
        for step in range(12):
            state = torch.randn(2, 8)
            for _ in range(tokens):
                state = model["frozen"](torch.randn(2, 3), state)
            weights = oracles.weights_of(model["trained"], "cell")
            previous, x = state.clone(), torch.randn(2, 3)
            model["trained"](x, state).square().sum().backward()
            found = oracles.gates(weights, x.numpy(), previous.numpy(), 2**-20)
            expected.append(found.values["update"])
            optimizer.step()
            optimizer.zero_grad()
            if step == 7:
                assert len(trace.calls) == 8 * (tokens + 1)
        order = (["frozen"] * tokens + ["trained"]) * 12
        assert trace.calls["module"].tolist() == order
        assert trace.calls["weights"][tokens :: tokens + 1].tolist() == list(range(12))
        update = np.concatenate([each.update for each in trace["trained.cell"]])
    np.testing.assert_allclose(update, np.concatenate(expected), rtol=0, atol=1e-5)
    assert "unproven" not in trace.calls["proof"]


@pytest.mark.parametrize("gates", ["background", "deferred"])
def test_gates_that_states_do_not_tell_are_not_called_proven(gates, dear) -> None:
    """From zeros, without biases, the reset gate has no influence: both weights fit the states."""
    torch.manual_seed(0)
    cell, x = nn.GRUCell(4, 8, bias=False).requires_grad_(False), torch.randn(2, 4)
    with grutrace.trace(cell, gates=gates) as trace:
        for call in range(4):
            cell(x)
            if call == 1:
                cell.weight_ih.data[3] += 2
        with pytest.warns(grutrace.ResidualWarning, match="call 1 are unproven"):
            assert trace["cell"].reset[:].shape == (8, 8)
    # The first call was compared, and so was what the weights are in the end.
    assert trace.calls["proof"].tolist() == ["proven", "unproven", "unproven", "unproven"]
    # The control: where they are compared, everything is known.
    with grutrace.trace(cell, gates=gates, weights="exact") as exact:
        cell(x)
        cell.weight_ih.data[3] -= 2
        cell(x)
    assert exact.calls["proof"].tolist() == ["proven", "proven"]


def test_inline_gates_are_those_of_the_weights_whatever_the_states_tell(dear) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(4, 8, bias=False).requires_grad_(False), torch.randn(2, 4)
    with grutrace.trace(cell, gates="inline", record=["reset"]) as trace:
        cell(x)
        cell.weight_ih.data[3] += 2
        cell(x)
    expected = torch.sigmoid(x @ cell.weight_ih[:8].T)
    np.testing.assert_allclose(trace["cell"].reset[2:], expected.numpy(), rtol=0, atol=1e-6)
    assert trace.calls["weights"].tolist() == [0, 1]


def test_what_waits_behind_a_call_is_bounded(dear, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 64 * 1024)
    model = nn.ModuleDict({"cell": nn.GRUCell(3, 8), "layer": nn.GRU(3, 64)})
    x = torch.randn(20, 4, 3)
    with torch.no_grad(), grutrace.trace(model, tmp_path / "a.h5", gates="deferred") as trace:
        for call in range(30):
            if call < 3:
                model["cell"](x[0])
            model["layer"](x)
            assert trace._journal.nbytes <= 64 * 1024 + 2 * 20 * 4 * (64 + 3) * 4
    assert len(trace.calls) == 33


def test_nothing_waits_for_long(dear, monkeypatch) -> None:
    monkeypatch.setattr(journal, "MOST_SECONDS", 0.01)
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        cell(x)
        cell(x)
        assert len(trace._journal) == 2
        time.sleep(0.02)
        cell(x)
        assert len(trace._journal) == 0


def test_a_trace_that_was_emptied_knows_no_weights_of_before(dear) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(3, 8).requires_grad_(False), torch.randn(2, 3)
    other = torch.randn(24, 8)
    kept = cell.weight_hh.detach().clone()
    with grutrace.trace(cell, gates="background", check="off") as trace:
        cell(x, torch.ones(2, 8))
        cell.weight_hh.copy_(other)
        cell(x, torch.ones(2, 8))
        assert trace["cell"].update.shape == (4, 8)
        cell.weight_hh.copy_(kept)
        trace.clear()
        cell(x, torch.ones(2, 8))
        cell.weight_hh.data.copy_(other)
        cell(x, torch.ones(2, 8))
        cell.weight_hh.data.copy_(kept)
        cell(x, torch.ones(2, 8))
        assert trace["cell"].update.shape == (6, 8)
    assert trace.calls["weights"].tolist() == [0, 0, 0]
    assert trace.calls["proof"].tolist() == ["proven", "unproven", "proven"]
