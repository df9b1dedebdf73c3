"""Tests of the equations, against float64 NumPy, nn.GRUCell and other conventions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.gru import cell
from tests import oracles


@pytest.fixture
def drawn() -> tuple[nn.GRUCell, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return nn.GRUCell(5, 4).double(), torch.randn(7, 5).double(), torch.randn(7, 4).double()


def products(layer: nn.GRUCell, x: torch.Tensor, h: torch.Tensor) -> cell.Products:
    return cell.products(x, h, layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh)


def test_gates_equal_the_equations(drawn) -> None:
    layer, x, h = drawn
    expected = oracles.gates(oracles.weights_of(layer, "cell"), x.numpy(), h.numpy(), 2.3e-16)
    result = cell.gates(products(*drawn))
    for name, value in result._asdict().items():
        off = np.abs(value.detach().numpy() - expected.values[name])
        assert (off <= expected.bounds[name]).all()


def test_a_step_equals_pytorchs_cell_within_rounding(drawn) -> None:
    layer, x, h = drawn
    off = (cell.step(cell.gates(products(*drawn)), h) - layer(x, h)).abs().max()
    assert off <= 8 * torch.finfo(torch.float64).eps


def test_preactivations_are_the_arguments_of_the_activations(drawn) -> None:
    result, before = cell.gates(products(*drawn)), cell.preactivations(products(*drawn))
    assert torch.equal(result.reset, before.reset.sigmoid())
    assert torch.equal(result.update, before.update.sigmoid())
    assert torch.equal(result.candidate, before.candidate.tanh())


def test_an_update_gate_of_one_keeps_the_state(drawn) -> None:
    _, _, h = drawn
    ones, zeros = torch.ones_like(h), torch.zeros_like(h)
    candidate = torch.full_like(h, 0.5)
    assert torch.equal(cell.step(cell.Gates(ones, ones, candidate), h), h)
    assert torch.equal(cell.step(cell.Gates(ones, zeros, candidate), h), candidate)


@pytest.mark.parametrize("swap", [(0, 1), (0, 2), (1, 2)])
def test_control_swapped_gates_do_not_fit_the_equations(drawn, swap) -> None:
    layer, x, h = drawn
    parts = list(layer.weight_ih.chunk(3))
    parts[swap[0]], parts[swap[1]] = parts[swap[1]], parts[swap[0]]
    wrong = cell.products(x, h, torch.cat(parts), layer.weight_hh, layer.bias_ih, layer.bias_hh)
    assert not torch.allclose(cell.step(cell.gates(wrong), h), layer(x, h), atol=1e-3)
