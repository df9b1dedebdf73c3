"""Tests of the benchmark of dynamics, with the smallest sizes. No time is asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from benchmarks import dynamics
from grutrace.analysis import fixed_points, lyapunov
from grutrace.records import DEFAULT_RECORD


def test_figures_of_a_search() -> None:
    names = [figure.name for figure in dynamics.search(1.0, units=8, starts=4, steps=3)]
    assert len(names) == len(set(names)) == 8
    assert names[0] == "fixed points at gain 1"


@pytest.fixture
def flip_flop() -> tuple[nn.GRUCell, torch.Tensor]:
    """What the benchmark trains to, without the training: each unit keeps one of three bits."""
    cell = nn.GRUCell(3, 3).double().requires_grad_(False)
    for parameter in cell.parameters():
        parameter.zero_()
    cell.weight_hh[6:] = 4 * torch.eye(3)
    torch.manual_seed(0)
    return cell, 2 * torch.rand(200, 3).double() - 1


def test_every_point_that_adam_finds_in_a_flip_flop_is_found(
    flip_flop: tuple[nn.GRUCell, torch.Tensor],
) -> None:
    figures = [figure for figure in dynamics.compare("bits", *flip_flop) if "only" in figure.name]
    assert [figure.value for figure in figures] == [0, 0]
    for figure in figures:
        assert figure.details["ours"] == 27
        assert 8 <= figure.details["theirs"] <= 27


def test_control_a_search_that_finds_less_is_noticed(
    flip_flop: tuple[nn.GRUCell, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_only(*arguments: Any, **options: Any) -> Any:
        points = fixed_points(*arguments, **options)
        if "slow" not in options:  # the refinement of Adam's ends
            return points
        return replace(points, fixed=points.fixed & (points.points == 0))

    monkeypatch.setattr(dynamics, "fixed_points", first_only)
    figures = [f for f in dynamics.compare("bits", *flip_flop, steps=300) if "only" in f.name]
    assert all(figure.value for figure in figures)


def test_flips_are_remembered() -> None:
    torch.manual_seed(0)
    inputs, targets = dynamics.draw_flips()
    last = torch.zeros(inputs.shape[0], inputs.shape[2])
    for step in range(inputs.shape[1]):
        last = torch.where(inputs[:, step] == 0, last, inputs[:, step])
        assert (targets[:, step] == last).all()


@pytest.mark.parametrize("kind", dynamics.SCHEDULES)
def test_adam_finds_the_fixed_point_of_a_network_that_forgets(kind: str) -> None:
    cell = dynamics.random_cell(0.5, 8)
    states = 0.5 * torch.ones(3, 8).double()
    rate, schedule, steps = dynamics.SCHEDULES[kind]
    found = dynamics.minimize_with_adam(cell, states, rate, schedule, steps)
    assert dynamics.speeds(cell, found).max() < 1e-12 < dynamics.speeds(cell, states).min()


def test_the_loop_gives_our_exponents() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 6, dtype=torch.float64)
    with torch.no_grad(), grutrace.trace(layer, record=DEFAULT_RECORD, gates="inline") as trace:
        layer(torch.randn(2000, 2, 2).double())
    found = dynamics.loop(trace["l0"], 6)
    np.testing.assert_allclose(found, lyapunov(trace["l0"], count=6, skip=0).exponents, atol=0.01)
