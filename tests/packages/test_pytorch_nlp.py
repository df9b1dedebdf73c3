"""Weight drop: weight_hh is a new tensor in every call, and no parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.packages.needs import needs
from tests.runs import check_run, rebuilt, run_once

needs("torchnlp.nn")

from torchnlp.nn import LockedDropout, WeightDrop, WeightDropGRU  # noqa: E402


class LanguageModel(nn.Module):
    """As in AWD-LSTM: locked dropout around a stack whose recurrent weights are dropped."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.locked = LockedDropout(0.3)
        self.rnn = WeightDropGRU(8, 12, layers, weight_dropout=0.5)
        self.out = nn.Linear(12, 20)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, state = self.rnn(self.locked(self.embedding(tokens)), state)
        return self.out(self.locked(output)), state


class Cells(nn.Module):
    """A cell whose weights are dropped, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 12)
        self.dropped = WeightDrop(self.cell, ["weight_hh", "weight_ih"], dropout=0.5)

    def forward(self, input: Tensor) -> Tensor:
        state = torch.randn(input.shape[1], 12)
        for step in input:
            state = self.step(step, state)
        return state

    def step(self, input: Tensor, state: Tensor) -> Tensor:
        return self.cell(input, state)


class WrappedCells(Cells):
    """The same through the wrapper, which calls the cell's forward, and not the cell."""

    def step(self, input: Tensor, state: Tensor) -> Tensor:
        return self.dropped(input, state)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_weight_drop(training: bool, layers: int, tmp_path: Path) -> None:
    model = LanguageModel(layers).train(training)
    batches = torch.randint(20, (3, 6, 4))

    def run(model: LanguageModel) -> list[Tensor]:
        """Backpropagation through time: the state is carried from one batch to the next."""
        outputs, state = [], None
        for batch in batches:
            output, state = model(batch, state)
            output.logsumexp(-1).mean().backward()
            state = state.detach()
            outputs += [output, state]
        return outputs

    duplicate = rebuilt(lambda: LanguageModel(layers))
    trace = check_run(model, run, tmp_path, duplicate)
    assert trace.sites == tuple(f"rnn.l{layer}" for layer in range(layers))
    top = trace[trace.sites[-1]]
    assert top.lengths.tolist() == [18] * 4
    # In training, every call drops other weights, in eval none.
    assert top.extent.versions == (3 if training else 1)
    assert trace.calls["weights"].tolist() == ([0, 1, 2] if training else [0, 0, 0])
    dropped = (top.weights(0)["weight_hh"] == 0).mean()
    assert 0.3 < dropped < 0.7 if training else dropped == 0


@pytest.mark.parametrize("training", [True, False])
def test_weight_drop_around_a_cell(training: bool, tmp_path: Path) -> None:
    model = Cells().train(training)
    input = torch.randn(5, 4, 8)

    def run(model: Cells) -> Tensor:
        output = model(input)
        output.square().mean().backward()
        return output

    trace = check_run(model, run, tmp_path, rebuilt(Cells))
    assert trace["cell.cell"].lengths.tolist() == [5] * 4
    assert trace["cell.cell"].extent.versions == (5 if training else 1)


def test_a_wrapper_that_bypasses_call_is_recorded(tmp_path: Path) -> None:
    """It calls `module.forward(...)`, where PyTorch calls no hooks."""
    model, input = WrappedCells(), torch.randn(5, 4, 8)
    expected = run_once(rebuilt(WrappedCells)(model), lambda model: model(input))
    with grutrace.trace(model, check="raise") as trace:
        expected.assert_same(run_once(model, lambda model: model(input)))
    assert set(trace.calls["module"]) == {"cell"}
