"""Tests of a site's summary, against NumPy over all values and known gates."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.descriptive.saturation import summarize_site
from grutrace.analysis.engine import map_reduce


@pytest.fixture(params=[None, "run.h5"])
def trace(request, tmp_path):
    torch.manual_seed(0)
    layer = nn.GRU(3, 5, bidirectional=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(6)
    path = request.param and tmp_path / request.param
    with grutrace.trace(layer, path) as trace:
        layer(torch.randn(40, 7, 3))
        layer(torch.randn(2, 3))
    with grutrace.open(path) if path else nullcontext(trace) as trace:
        yield trace


@pytest.mark.parametrize("block", [1, 200, 10**9])
def test_equals_all_values_at_once(trace, block, monkeypatch) -> None:
    monkeypatch.setattr(map_reduce, "BLOCK_BYTES", block)
    monkeypatch.setattr(map_reduce, "PART_BYTES", 3 * block)
    for name in trace.sites:
        result = summarize_site(trace[name])
        assert (result.site, result.sequences, result.steps) == (name, 8, 282)
        assert result.residual == trace[name].residual
        for gate, of_gate in result.gates.items():
            values = np.asarray(trace[name].rows(gate)).astype(np.float64)
            assert of_gate.mean == pytest.approx(values.mean(), abs=1e-9)
            assert of_gate.below == (np.abs(values) < np.float32(0.1)).mean()
            assert of_gate.above == (np.abs(values) > np.float32(0.9)).mean()
            assert 0 < of_gate.below + of_gate.above < 1


def test_known_gates() -> None:
    """Biases alone decide where the weights are zero: z = sigmoid(5) is open, r = sigmoid(-5)."""
    layer = nn.GRU(2, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[:4] = -5
        layer.bias_hh_l0[4:8] = 5
    with grutrace.trace(layer) as trace:
        layer(torch.randn(6, 2))
    gates = summarize_site(trace["l0"]).gates
    assert (gates["reset"].below, gates["reset"].above) == (1, 0)
    assert (gates["update"].below, gates["update"].above) == (0, 1)
    assert gates["update"].mean == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)
    assert gates["candidate"].mean == 0


def test_an_empty_site_gives_nan() -> None:
    with grutrace.Tracer(nn.GRU(2, 4), recording=False) as trace:
        pass
    for item in summarize_site(trace["l0"]).gates.values():
        assert np.isnan([item.mean, item.below, item.above]).all()


def test_a_value_that_is_not_finite_shows_in_the_mean() -> None:
    layer = nn.GRU(2, 4)
    finite, overflowing = torch.ones(6, 2), torch.ones(6, 2)
    overflowing[3, 1] = torch.nan
    means = []
    for input in (finite, overflowing):
        with grutrace.trace(layer) as trace:
            layer(input)
        means.append([gate.mean for gate in summarize_site(trace["l0"]).gates.values()])
    assert np.isfinite(means[0]).all()
    assert np.isnan(means[1]).all()


def test_only_recorded_quantities() -> None:
    layer = nn.GRU(2, 4)
    with grutrace.trace(layer, record=("update", "hidden")) as trace:
        layer(torch.randn(6, 2))
    assert list(summarize_site(trace["l0"]).gates) == ["update"]
