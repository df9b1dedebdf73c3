"""Tests of timescales, for known gates: constant, chrono initialisation, inverse gamma."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.memory import timescales as inverse_gamma
from grutrace.analysis.memory.timescales import fit_inverse_gamma, timescales
from grutrace.errors import NotRecordedError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same, check_everywhere


def with_biases(biases: np.ndarray, steps: int = 50) -> grutrace.Trace:
    """A trace of a layer without weights: z = sigmoid(bias), the same at all steps."""
    layer = nn.GRU(1, len(biases), dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_hh_l0[len(biases) : 2 * len(biases)] = torch.from_numpy(biases)
    with grutrace.trace(layer) as trace:
        layer(torch.zeros(steps, 1, dtype=torch.float64))
    return trace


def test_a_constant_gate_has_its_theoretical_timescale() -> None:
    taus = np.array([0.3, 1.0, 7.0, 100.0, 1e5])
    gate = np.exp(-1 / taus)
    result = timescales(with_biases(np.log(gate / (1 - gate)))["l0"])
    np.testing.assert_allclose(result.tau, taus, rtol=1e-8)
    np.testing.assert_allclose(result.tau_of_mean, taus, rtol=1e-8)


def test_states_of_a_constant_gate_decay_at_its_timescale() -> None:
    """h = z h' + (1 - z) noise is a process with autocorrelation z^k."""
    random, gate = np.random.default_rng(0), np.array([0.5, 0.9, 0.95])
    noise, states = random.normal(size=(50_000, 3)), np.zeros((50_000, 3))
    before = np.zeros(3)
    for step in range(len(states)):
        states[step] = before = gate * before + (1 - gate) * noise[step]
    update = np.broadcast_to(gate, states.shape)
    result = timescales(SiteArrays(update=update, hidden=states))
    np.testing.assert_allclose(result.tau_of_states, -1 / np.log(gate), rtol=0.1)
    np.testing.assert_allclose(result.tau, -1 / np.log(gate), rtol=1e-12)


def test_geometric_and_arithmetic_mean() -> None:
    update = np.tile([[0.99], [0.5]], (50, 1))
    result = timescales(SiteArrays(update=update))
    assert result.tau == pytest.approx(-2 / (np.log(0.99) + np.log(0.5)))
    assert result.tau_of_mean == pytest.approx(-1 / np.log(0.745))
    # What is left after all steps is what the first says, and the second does not.
    assert np.exp(-100 / result.tau) == pytest.approx(np.prod(update), rel=1e-9)
    assert np.exp(-100 / result.tau_of_mean) > 100 * np.prod(update)


def test_chrono_initialisation_gives_its_range() -> None:
    """Tallec and Ollivier (2018): bias log(u), u uniform from 1 to T - 1. tau is u + 1/2."""
    random, longest = np.random.default_rng(0), 200
    drawn = random.uniform(1, longest - 1, 500)
    result = timescales(with_biases(np.log(drawn), 3)["l0"])
    assert result.tau.min() >= 1 / np.log(2)
    assert result.tau.max() <= longest - 0.5
    np.testing.assert_allclose(result.tau, drawn + 0.5, atol=0.06)
    # As even as it was drawn: the greatest distance of 500 uniform values is above 0.073 in 1 %.
    ordered = np.sort(result.tau - 0.5)
    assert np.abs((ordered - 1) / (longest - 2) - np.arange(500) / 500).max() < 0.073
    # Control: PyTorch's own initialisation remembers two steps or so.
    torch.manual_seed(0)
    layer = nn.GRU(1, 500)
    with grutrace.trace(layer) as trace:
        layer(torch.zeros(3, 1))
    assert timescales(trace["l0"]).tau.max() < 3
    # An even distribution is none of those that are fitted.
    assert result.fit_p < 0.01


def test_inverse_gamma_initialisation_gives_its_parameters() -> None:
    """As Mahto et al. (2021) initialise: shape 0.56, scale 1."""
    drawn = 1 / np.random.default_rng(2).gamma(0.56, 1.0, 400)
    # exp(-1 / T) as a sigmoid of a bias.
    result = timescales(with_biases(-np.log(np.expm1(1 / drawn)), 3)["l0"])
    assert result.fitted == 400
    assert abs(result.shape - 0.56) < 3 * result.shape_error < 0.15
    assert abs(result.scale - 1) < 3 * result.scale_error < 0.4
    assert result.fit_p > 0.05


def test_the_standard_errors_of_the_fit_are_right(monkeypatch) -> None:
    monkeypatch.setattr(inverse_gamma, "SAMPLES", 99)
    random = np.random.default_rng(0)
    fits = [fit_inverse_gamma(1 / random.gamma(2.0, 1 / 5.0, 200)) for _ in range(200)]
    shapes, scales = np.array([(fit.shape, fit.scale) for fit in fits]).T
    assert np.mean([fit.shape_error for fit in fits]) == pytest.approx(shapes.std(), rel=0.2)
    assert np.mean([fit.scale_error for fit in fits]) == pytest.approx(scales.std(), rel=0.2)
    # Under the fitted distribution p-values are even: 1 in 20 is below 0.05.
    rejected = np.mean([fit.p_value <= 0.05 for fit in fits])
    assert 0.01 < rejected < 0.12


def test_the_fit_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    timescales_ = 1 / np.random.default_rng(5).gamma(0.8, 2.0, 300)
    fit = fit_inverse_gamma(timescales_)
    shape, _, scale = stats.invgamma.fit(timescales_, floc=0)
    assert (fit.shape, fit.scale) == pytest.approx((shape, scale), rel=1e-3)
    distance = stats.kstest(timescales_, stats.invgamma(fit.shape, scale=fit.scale).cdf).statistic
    assert fit.distance == pytest.approx(distance, rel=1e-9)


def test_gates_of_exactly_0_or_1_and_nan() -> None:
    update = np.full((10, 4), 0.5)
    update[3, 0], update[:, 1] = 0.0, 1.0
    update[4, 2], update[5, 2], update[6, 2] = np.nan, 1.5, -np.inf
    result = timescales(SiteArrays(update=update))
    assert result.tau[0] == 0
    assert result.tau[1] == result.tau_of_mean[1] == np.inf
    assert result.tau[2] == pytest.approx(result.tau[3])
    assert result.invalid_steps.tolist() == [0, 0, 3, 0]
    assert result.fitted == 2
    assert np.isnan(result.shape)


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    def derived(actual, expected) -> None:
        np.testing.assert_allclose(actual.tau, expected.tau, 1e-4)
        np.testing.assert_allclose(actual.tau_of_states, expected.tau_of_states, 1e-4)

    check_everywhere(timescales, tmp_path, monkeypatch, derived=derived)
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(timescales(as_arrays(site)), timescales(site), 1e-9)


def test_nothing_recorded() -> None:
    result = timescales(SiteArrays(update=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(result.tau).all()
    assert np.isnan(result.tau_of_states).all()
    with pytest.raises(NotRecordedError, match="no 'update'"):
        timescales(SiteArrays(hidden=np.zeros((2, 1))))
