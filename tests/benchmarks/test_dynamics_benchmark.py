"""Tests of the benchmark of dynamics, with the smallest sizes. No time is asserted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from benchmarks import dynamics
from grutrace.analysis import lyapunov
from grutrace.records import DEFAULT_RECORD


def test_figures_of_a_search() -> None:
    names = [figure.name for figure in dynamics.search(1.0, units=8, starts=4, steps=3)]
    assert len(names) == len(set(names)) == 6
    assert names[0] == "fixed points at gain 1"


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
