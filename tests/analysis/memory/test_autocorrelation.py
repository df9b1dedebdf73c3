"""Tests of autocorrelation, against its definition and known processes."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.engine import segments
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.memory import autocorrelation as module
from grutrace.analysis.memory.autocorrelation import (
    autocorrelation,
    count_pairs,
    efolding_time,
    integrated_time,
)
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same, check_everywhere


def by_definition(parts: list[np.ndarray], lags: int) -> np.ndarray:
    """(L + 1, H), pair by pair of steps of one sequence."""
    mean = np.concatenate(parts).mean(0)
    parts = [part - mean for part in parts]
    covariance = []
    for lag in range(lags + 1):
        products = [part[: len(part) - lag] * part[lag:] for part in parts if len(part) > lag]
        covariance.append(np.concatenate(products).mean(0))
    return np.array(covariance) / covariance[0]


#: Sequences of no, one and few steps, of as many as a chunk has, and of several chunks.
LENGTHS = ([2500, 1, 0, 1500, 3, 96], [41] * 100, [4100], [983, 984, 985, 1148])


@pytest.mark.parametrize("block", [800, 10**9])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["mixed", "alike", "one", "chunks"])
def test_equals_the_definition(lengths, block, monkeypatch) -> None:
    monkeypatch.setattr(segments, "BLOCK_BYTES", block)
    states = np.random.default_rng(0).normal(size=(4100, 2)).cumsum(axis=0) * 0.01
    ends = np.cumsum(lengths)
    for skip in (0, 7):
        parts = [states[e - n + min(skip, n) : e] for e, n in zip(ends, lengths, strict=True)]
        for lags in (0, 3, 40, 300):
            result = autocorrelation(SiteArrays(hidden=states, lengths=lengths), lags, skip)
            expected = by_definition(parts, result.lags)
            np.testing.assert_allclose(result.correlation, expected, atol=1e-9)
            pairs = [sum(max(0, len(part) - k) for part in parts) for k in range(result.lags + 1)]
            assert result.pairs.tolist() == pairs
            assert result.steps == pairs[0]


def test_control_pairs_across_sequences_are_detected() -> None:
    states = np.random.default_rng(0).normal(size=(400, 2)).cumsum(axis=0)
    apart = autocorrelation(SiteArrays(hidden=states, lengths=[20] * 20), 10)
    assert np.abs(apart.correlation - by_definition([states], 10)).max() > 0.01


def test_a_known_process() -> None:
    """x(t) = a x(t - 1) + noise: e-folding time -1 / log a, integrated (1 + a) / (1 - a)."""
    random, factors = np.random.default_rng(0), np.array([0.0, 0.2, 0.5, 0.9, 0.97])
    steps, lengths = 100_000, [1000] * 100
    noise, states = random.normal(size=(steps, 5)), np.zeros((steps, 5))
    before = np.zeros(5)
    for step in range(steps):
        states[step] = before = factors * before + noise[step]
    result = autocorrelation(SiteArrays(hidden=states, lengths=lengths), skip=100)
    # The standard error of an integrated time is about tau sqrt(2 (2 window + 1) / steps): 8 %.
    integrated = (1 + factors) / (1 - factors)
    np.testing.assert_allclose(result.integrated, integrated, rtol=0.2)
    with np.errstate(divide="ignore"):
        efolding = -1 / np.log(factors)
    np.testing.assert_allclose(result.efolding[1:], efolding[1:], rtol=0.15)
    assert result.efolding[0] < 1
    np.testing.assert_allclose(result.independent, result.steps / result.integrated)
    # Control: without leaving out where they began nothing much changes, but a trend does.
    trend = autocorrelation(SiteArrays(hidden=states + np.linspace(0, 50, steps)[:, np.newaxis]))
    assert np.isnan(trend.integrated).all()


def test_exact_exponentials_give_their_time_constant() -> None:
    factors = np.array([0.2, 0.9, 0.999])
    correlation = factors ** np.arange(2000)[:, np.newaxis]
    np.testing.assert_allclose(efolding_time(correlation), -1 / np.log(factors))
    exact = (1 + factors) / (1 - factors)
    assert integrated_time(correlation)[:2] == pytest.approx(exact[:2], rel=0.02)
    assert np.isnan(efolding_time(correlation[:500])[2])
    assert np.isnan(integrated_time(correlation[:500])[2])


def test_pairs() -> None:
    assert count_pairs(np.array([3, 0, 1, 5]), 5).tolist() == [9, 6, 4, 2, 1, 0]


@pytest.mark.parametrize("together", [1, 10**9])
def test_every_kind_of_site_gives_the_same(together, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", together)
    check_everywhere(lambda site: autocorrelation(site, 20), tmp_path, monkeypatch)
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(autocorrelation(as_arrays(site)), autocorrelation(site), 1e-11)


def test_invalid_input_gives_nan() -> None:
    states = np.random.default_rng(0).normal(size=(50, 4))
    states[:, 1] = 0.1  # Whose mean is rounded.
    states[7, 2], states[8, 3] = np.nan, np.inf
    result = autocorrelation(SiteArrays(hidden=states))
    assert np.isfinite(result.correlation[:, 0]).all()
    assert np.isnan(result.correlation[:, 1:]).all()
    assert np.isnan(result.efolding[1:]).all()
    assert np.isnan(result.integrated[1:]).all()


def test_wrong_options_are_errors() -> None:
    empty = autocorrelation(SiteArrays(hidden=np.zeros((0, 3)), lengths=[]))
    assert (empty.steps, empty.lags) == (0, 0)
    assert np.isnan(empty.efolding).all()
    with pytest.raises(NotRecordedError, match="no 'hidden'"):
        autocorrelation(SiteArrays(update=np.zeros((2, 1))))
    with pytest.raises(OptionError, match="lags: expected a number of steps, 0 or more; found -1"):
        autocorrelation(SiteArrays(hidden=np.zeros((2, 1))), lags=-1)
    with pytest.raises(OptionError, match="skip: expected"):
        autocorrelation(SiteArrays(hidden=np.zeros((2, 1))), skip=0.5)
