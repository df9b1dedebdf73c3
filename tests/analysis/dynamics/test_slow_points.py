"""Tests of the search for slow points, against minimizing the speed with Adam in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.analysis.dynamics import slow_points as module
from grutrace.analysis.dynamics.gru_map import GRUMap
from grutrace.analysis.dynamics.slow_points import half_square, lbfgs, minimise


def random_cell(units: int, gain: float, seed: int = 0) -> nn.GRUCell:
    """Recurrent weights of this spread over sqrt(H), and no biases."""
    torch.manual_seed(seed)
    cell = nn.GRUCell(1, units).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.weight_hh.normal_(0, gain / units**0.5)
    return cell


def map_of(cell: nn.GRUCell) -> GRUMap:
    weights = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    return GRUMap(weights, np.zeros(1))


def adam(cell: nn.GRUCell, states: np.ndarray, steps: int) -> np.ndarray:
    """Minimize the speed as Golub and Sussillo's FixedPointFinder does."""
    h = torch.tensor(states, requires_grad=True)
    x = torch.zeros(len(states), 1).double()
    optimizer = torch.optim.Adam([h], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (cell(x, h) - h).square().sum(1).mean().backward()
        optimizer.step()
    return h.detach().numpy()


def speeds(step: GRUMap, states: np.ndarray) -> np.ndarray:
    return half_square(step.motion(states).value)


def settled(step: GRUMap, states: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        states = step(states)
    return states


def test_a_chaotic_network_has_slower_points_than_adam_finds() -> None:
    cell = random_cell(64, 3.0)
    step = map_of(cell)
    states = np.random.default_rng(0).uniform(-1, 1, (32, 64))
    states = settled(step, states, 50)
    ours, theirs = speeds(step, minimise(step, states)), speeds(step, adam(cell, states, 1000))
    assert np.median(ours) < np.median(theirs)
    # Control: the states themselves are fast.
    assert np.median(speeds(step, states)) > 100 * np.median(theirs)


def test_every_fixed_point_that_adam_finds_is_found() -> None:
    """Both are refined by Newton's method, from the same starts."""
    found = 0
    for seed in range(3):
        cell = random_cell(8, 5.0, seed)
        step = map_of(cell)
        states = np.random.default_rng(0).uniform(-1, 1, (200, 8))
        ours, theirs = minimise(step, states), adam(cell, states, 3000)
        for _ in range(8):
            moves = [
                np.linalg.lstsq(step.motion(h[None]).matrix(0), step.motion(h[None]).value[0])[0]
                for h in theirs
            ]
            theirs = theirs - np.array(moves)
        inside = (np.abs(theirs) <= 1).all(1) & (speeds(step, theirs) < 1e-20)
        ours = ours[speeds(step, ours) < 1e-16]
        for point in np.unique(theirs[inside].round(4), axis=0):
            assert np.abs(ours - point).max(1).min() < 1e-3
            found += 1
    assert found > 6


def test_close_states_share_a_factorization(monkeypatch) -> None:
    """The same points as with one factorization a state, by far fewer of them."""
    step = map_of(random_cell(32, 1.5))
    states = np.random.default_rng(0).uniform(-1, 1, (300, 32))
    counts = []
    for radius in (module.SHARED_RADIUS, 0.0):
        monkeypatch.setattr(module, "SHARED_RADIUS", radius)
        count = 0
        newton = module._newton_steps

        def counting(motion, leaders, *rest, newton=newton):
            nonlocal count
            count += len(leaders)
            return newton(motion, leaders, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_newton_steps", counting)
            assert np.abs(minimise(step, states)).max() < 1e-9
        counts.append(count)
    assert counts[0] * 10 < counts[1]


def test_blocks_do_not_matter(monkeypatch) -> None:
    step = map_of(random_cell(16, 3.0))
    states = np.random.default_rng(0).uniform(-1, 1, (40, 16))
    progress: list[tuple[int, int]] = []
    expected = speeds(step, minimise(step, states))
    monkeypatch.setattr(module, "BLOCK_VALUES", 16 * 7)
    found = speeds(step, minimise(step, states, advance=lambda *at: progress.append(at)))
    assert progress == [(min(7 * n, 40), 40) for n in range(1, 7)]
    # Sums of other blocks round differently, and a chaotic search takes another course.
    assert np.median(np.abs(np.log10(found + 1e-30) - np.log10(expected + 1e-30))) < 1


def test_no_states_give_no_points() -> None:
    step = map_of(random_cell(4, 1.0))
    assert minimise(step, np.empty((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lbfgs_finds_the_minimum_of_a_quadratic_function(dtype) -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    curvature = (basis * np.logspace(-2, 0, 6)) @ basis.T
    center = rng.uniform(-0.5, 0.5, 6)

    def evaluate(states, rows):
        gradient = ((states - center) @ curvature).astype(dtype)
        return 0.5 * np.einsum("kh,kh->k", gradient, (states - center).astype(dtype)), gradient

    states = rng.uniform(-1, 1, (10, 6)).astype(dtype)
    found = lbfgs(evaluate, states, 1.0, 1e-10)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.tile(center, (10, 1)), atol=2e-4)
    # Control: held in a box that leaves the minimum out, it ends on the wall.
    assert np.abs(lbfgs(evaluate, states / 100, 0.01, 1e-10)).max() == dtype(0.01)
