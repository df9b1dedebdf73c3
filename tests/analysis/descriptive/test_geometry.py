"""Tests of principal components, against NumPy's covariance and spaces of known dimension."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.descriptive.geometry import geometry
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere


def test_equals_numpy() -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        states = np.asarray(trace[name].hidden, np.float64)
        result = geometry(trace[name])
        covariance = np.cov(states.T)
        variance = np.linalg.eigvalsh(covariance)[::-1]
        np.testing.assert_allclose(result.variance, variance, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(result.share, variance / variance.sum(), rtol=1e-6, atol=1e-12)
        ratio = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
        assert result.participation_ratio == pytest.approx(ratio)
        np.testing.assert_allclose(result.mean, states.mean(0), rtol=1e-6, atol=1e-9)
        rebuilt = result.directions.T * result.variance @ result.directions
        np.testing.assert_allclose(rebuilt, covariance, atol=1e-9)
        np.testing.assert_allclose(
            result.directions @ result.directions.T, np.eye(len(variance)), atol=1e-9
        )
        assert (result.directions.max(1) == np.abs(result.directions).max(1)).all()


def test_known_dimensions() -> None:
    random = np.random.default_rng(0)
    sphere = geometry(SiteArrays(hidden=random.normal(size=(20_000, 10))))
    assert sphere.participation_ratio == pytest.approx(10, abs=0.1)
    assert sphere.dimensions in (9, 10)
    plane = random.normal(size=(5_000, 2)) @ random.normal(size=(2, 30)) + 5
    flat = geometry(SiteArrays(hidden=plane))
    assert flat.participation_ratio < 2.001
    assert flat.share[:2].sum() == pytest.approx(1)
    projected = flat.project(plane)
    assert projected.shape == (5_000, 2)
    np.testing.assert_allclose(projected.var(0, ddof=1), flat.variance[:2], rtol=1e-6)
    np.testing.assert_allclose(projected @ flat.directions[:2] + flat.mean, plane, atol=1e-6)


def test_a_large_mean_loses_no_precision() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(4_000, 3)) * [1e-6, 1e-7, 1e-8] + 0.999
    result = geometry(SiteArrays(hidden=states))
    np.testing.assert_allclose(np.sqrt(result.variance), [1e-6, 1e-7, 1e-8], rtol=0.05)


def test_values_that_are_not_finite_are_skipped() -> None:
    states = np.random.default_rng(0).normal(size=(50, 4))
    broken = np.insert(states, [10, 30], [[np.nan, 0, 0, 0], [0, np.inf, 0, 0]], axis=0)
    result, whole = geometry(SiteArrays(hidden=broken)), geometry(SiteArrays(hidden=states))
    assert (result.steps, result.not_finite) == (50, 2)
    np.testing.assert_allclose(result.variance, whole.variance)


def test_constant_states() -> None:
    for states in (np.zeros((0, 3)), np.ones((1, 3)), np.ones((9, 3))):
        result = geometry(SiteArrays(hidden=states))
        assert np.isnan(result.participation_ratio)
        assert result.dimensions == 0
    with pytest.raises(NotRecordedError, match="no 'hidden'"):
        geometry(SiteArrays(update=np.zeros((3, 2))))


def test_the_mean_has_one_value_per_unit() -> None:
    result = geometry(SiteArrays(hidden=np.random.default_rng(0).normal(size=(9, 3))))
    assert list(result.columns()) == ["component", "variance", "share"]


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    check_everywhere(geometry, tmp_path, monkeypatch)
