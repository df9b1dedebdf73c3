"""The decay of gradients: known rates, and a network whose rate follows from its gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis import SiteArrays, gradients
from grutrace.cli.app import main
from grutrace.errors import NotRecordedError


def leaky_layer(*keep: float, reverse: bool = False) -> nn.GRU:
    """A linear layer: h(t) = z h(t - 1), with a fixed z for each unit."""
    layer = nn.GRU(2, len(keep), batch_first=True, bidirectional=reverse).double()
    bias = torch.logit(torch.tensor(keep, dtype=torch.float64))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.zero_()
            if name.startswith("bias_ih"):
                parameter[len(keep) : 2 * len(keep)] = bias
    return layer


def recorded(layer: nn.GRU, path: Path | None = None, steps: int = 30) -> Any:
    torch.manual_seed(0)
    with grutrace.trace(layer, path, record=("hidden", "gradient")) as trace:
        _, final = layer(torch.randn(3, steps, 2, dtype=torch.float64))
        (final * torch.randn_like(final)).sum().backward()
    return trace


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.99])
def test_a_linear_layer_has_the_half_life_of_its_gate(keep: float) -> None:
    found = gradients(recorded(leaky_layer(keep, keep))["l0"])
    assert found.factor == pytest.approx(keep, abs=1e-9)
    assert found.half_life == pytest.approx(np.log(2) / -np.log(keep))
    assert (found.sequences, found.without_gradient) == (3, 0)
    np.testing.assert_allclose(found.norms / found.norms[0], keep ** np.arange(30))


def test_each_unit_has_its_own_half_life() -> None:
    keep = (0.5, 0.8, 0.99)
    found = gradients(recorded(leaky_layer(*keep))["l0"])
    np.testing.assert_allclose(found.unit_factor, keep)
    np.testing.assert_allclose(found.unit_half_life, np.log(2) / -np.log(keep))
    # All units together follow none of them.
    assert found.half_life < found.unit_half_life[2]


def test_the_reverse_direction_counts_from_the_first_step() -> None:
    found = gradients(recorded(leaky_layer(0.8, reverse=True))["l0_reverse"])
    assert found.factor == pytest.approx(0.8)


def test_an_exploding_gradient_has_no_half_life() -> None:
    rows = 1.1 ** np.arange(20)[::-1, np.newaxis] * np.ones((1, 2))
    found = gradients(SiteArrays(gradient=rows))
    assert found.factor == pytest.approx(1.1)
    assert found.half_life == np.inf


def test_a_loss_before_the_end_is_where_distances_begin() -> None:
    rows = np.zeros((12, 1))
    rows[:8, 0] = 0.5 ** np.arange(8)[::-1]
    found = gradients(SiteArrays(gradient=rows))
    assert found.factor == pytest.approx(0.5)
    assert found.counts.tolist() == [1] * 8 + [0] * 4


def test_sequences_without_a_gradient_are_left_out() -> None:
    rows = np.concatenate([np.full((5, 2), np.nan), np.zeros((5, 2)), np.ones((5, 2))])
    found = gradients(SiteArrays(gradient=rows, lengths=[5, 5, 5]))
    assert (found.sequences, found.without_gradient) == (1, 2)
    assert found.norms.tolist() == pytest.approx([np.sqrt(2)] * 5)


def test_truncated_backpropagation_is_measured_between_detached_states() -> None:
    layer, x = leaky_layer(0.8), torch.randn(2, 12, 2, dtype=torch.float64)
    found = {}
    for cuts in ((), (4, 8)):
        with grutrace.trace(layer, record=("hidden", "gradient")) as trace:
            state, losses = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64), []
            for step in range(12):
                state = state.detach() if step in cuts else state
                _, state = layer(x[:, step : step + 1], state)
                if step + 1 in (*cuts, 12):
                    losses.append(state.sum())
            torch.stack(losses).sum().backward()
        found[cuts] = gradients(trace["l0"])
    assert found[4, 8].factor == pytest.approx(0.8)
    assert found[4, 8].counts.tolist() == [6] * 4 + [0] * 8
    # Control: attached, the same losses add up along the way.
    assert found[()].counts.tolist() == [2] * 12


def test_stages_follow_the_order_of_the_run() -> None:
    factors = np.linspace(0.5, 0.95, 10)
    rows = np.concatenate([factor ** np.arange(12)[::-1] for factor in factors])[:, np.newaxis]
    found = gradients(SiteArrays(gradient=rows, lengths=[12] * 10))
    np.testing.assert_allclose(found.stage_half_life, np.log(2) / -np.log(factors))
    assert found.first_half_life == found.stage_half_life[0] < found.last_half_life


def test_no_sequences_and_no_gradient() -> None:
    found = gradients(SiteArrays(gradient=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(found.half_life)
    assert found.sequences == 0
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(4, 2, 2))
    with pytest.raises(NotRecordedError, match=r"record=\('hidden', 'gradient'\)"):
        gradients(trace["l0"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(leaky_layer(0.8, 0.8), tmp_path / "run.h5")
    assert main(["stats", str(tmp_path / "run.h5"), "gradients"]) == 0
    printed = capsys.readouterr().out
    assert "half_life" in printed
    assert "3.1" in printed
