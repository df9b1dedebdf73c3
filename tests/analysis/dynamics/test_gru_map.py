"""Tests of the map of a GRU to first order, against automatic differentiation of nn.GRUCell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.analysis.dynamics.gru_map import GRUMap

STATES, INPUT, UNITS = 4, 3, 5


def make(bias: bool = True) -> tuple[nn.GRUCell, torch.Tensor, torch.Tensor, GRUMap]:
    torch.manual_seed(0)
    cell = nn.GRUCell(INPUT, UNITS, bias=bias).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(0, 0.8)
    x, states = torch.randn(INPUT).double(), torch.randn(STATES, UNITS).double()
    weights = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    return cell, x, states, GRUMap(weights, x.numpy())


def matrices(linearization) -> np.ndarray:
    return np.array([linearization.matrix(row) for row in range(STATES)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_the_motion_of_several_steps(bias, period) -> None:
    cell, x, states, step = make(bias)

    def moved(h: torch.Tensor) -> torch.Tensor:
        place = h[None]
        for _ in range(period):
            place = cell(x[None], place)
        return place[0] - h

    motion = step.motion(states.numpy(), period)
    values = torch.stack([moved(state) for state in states]).detach()
    np.testing.assert_allclose(motion.value, values, atol=1e-13)
    jacobians = [torch.func.jacrev(moved)(state) for state in states]
    expected = torch.stack(jacobians).detach().numpy()
    np.testing.assert_allclose(matrices(motion), expected, atol=1e-12)
    vectors = np.random.default_rng(0).standard_normal((STATES, UNITS))
    pulled = np.einsum("kij,ki->kj", expected, vectors)
    np.testing.assert_allclose(motion.pull_back(vectors), pulled, atol=1e-12)
    # Control: the Jacobian that is not transposed gives something else.
    assert np.abs(np.einsum("kij,kj->ki", expected, vectors) - pulled).max() > 0.1


def test_the_gap_to_the_candidate() -> None:
    cell, x, states, step = make()
    scale = torch.rand(STATES, UNITS).double()

    def gap(h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        of_x, of_h = cell.weight_ih @ x + cell.bias_ih, cell.weight_hh @ h + cell.bias_hh
        r = torch.sigmoid((of_x + of_h)[:UNITS])
        return factor * (torch.tanh(of_x[2 * UNITS :] + r * of_h[2 * UNITS :]) - h)

    found = step.candidate_gap(states.numpy(), scale.numpy())
    expected = torch.func.vmap(gap)(states, scale).detach()
    np.testing.assert_allclose(found.value, expected, atol=1e-14)
    jacobian = torch.func.vmap(torch.func.jacrev(gap))(states, scale).detach()
    np.testing.assert_allclose(matrices(found), jacobian, atol=1e-13)
    # The motion is the gap times 1 - z.
    rest = 1 - step.update(states.numpy())
    np.testing.assert_allclose(
        step.motion(states.numpy()).value, found.value / scale.numpy() * rest, atol=1e-14
    )


def test_the_derivative_by_the_input() -> None:
    cell, x, states, step = make()
    for state in states:
        expected = torch.func.jacrev(lambda u, h=state: cell(u[None], h[None])[0])(x).detach()
        found = step.input_jacobian(state.numpy())
        np.testing.assert_allclose(found, expected, atol=1e-14)


def test_single_precision_is_close_and_stays_single() -> None:
    _, _, states, step = make()
    single = step.astype(np.float32)
    motion = single.motion(states.numpy().astype(np.float32))
    assert motion.value.dtype == motion.pull_back(motion.value).dtype == np.float32
    np.testing.assert_allclose(motion.value, step.motion(states.numpy()).value, atol=1e-5)
    assert step(states.numpy()).dtype == np.float64
