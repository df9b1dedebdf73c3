"""Tests of moments, against float64 NumPy over all steps and known distributions."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.descriptive import moments as module
from grutrace.analysis.descriptive.moments import moments
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same, check_everywhere


def plain(values: np.ndarray) -> dict[str, np.ndarray]:
    """By definition."""
    values = values.astype(np.float64)
    apart = values - values.mean(0)
    std = np.sqrt((apart**2).mean(0))
    return {
        "mean": values.mean(0),
        "std": std,
        "skewness": (apart**3).mean(0) / std**3,
        "kurtosis": (apart**4).mean(0) / std**4 - 3,
        "minimum": values.min(0),
        "maximum": values.max(0),
    }


@pytest.mark.usefixtures("instruction_set")
def test_equals_all_steps_at_once() -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        result = moments(trace[name])
        for quantity in ("reset", "update", "candidate", "hidden"):
            for figure, expected in plain(np.asarray(trace[name].rows(quantity))).items():
                np.testing.assert_allclose(
                    getattr(result, figure)[quantity], expected, 1e-9, 1e-9, err_msg=figure
                )


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    check_everywhere(moments, tmp_path, monkeypatch)
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(moments(as_arrays(site)), moments(site), 1e-11)


@pytest.mark.parametrize("block", [7, 1000, 128 * 1024])
def test_known_distributions(block, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    random = np.random.default_rng(0)
    count = 400_000
    values = np.stack(
        [
            random.uniform(size=count),
            random.random(count) < 0.5,
            random.beta(2, 5, count),
            0.5 + 0.1 * random.normal(size=count),
        ],
        axis=1,
    )
    # Sorted, so that no part of it is like the whole.
    result = moments(SiteArrays(update=np.sort(values, axis=0)))
    # Of a Beta(2, 5): variance 10/392, skewness 0.5963, excess kurtosis -0.12.
    expected_std = [np.sqrt(1 / 12), 0.5, np.sqrt(10 / 392), 0.1]
    np.testing.assert_allclose(result.std["update"], expected_std, rtol=0.01)
    np.testing.assert_allclose(result.skewness["update"], [0, 0, 0.5963, 0], atol=0.02)
    np.testing.assert_allclose(result.kurtosis["update"], [-1.2, -2, -0.12, 0], atol=0.04)
    for figure, expected in plain(values).items():
        np.testing.assert_allclose(getattr(result, figure)["update"], expected, 1e-9, 1e-9)


@pytest.mark.usefixtures("instruction_set")
def test_a_nearly_constant_gate_keeps_its_spread() -> None:
    """Control: raw sums of powers lose it."""
    random = np.random.default_rng(1)
    values = np.stack([1 - 1e-7 * random.uniform(size=10_000), np.full(10_000, 0.1)], axis=1)
    result = moments(SiteArrays(update=values))
    expected = plain(values[:, :1] - 1)
    np.testing.assert_allclose(result.std["update"][0], expected["std"][0], rtol=1e-6)
    np.testing.assert_allclose(result.kurtosis["update"][0], expected["kurtosis"][0], rtol=1e-3)
    assert result.std["update"][1] == 0
    assert np.isnan(result.skewness["update"][1])
    raw = (values[:, 0] ** 2).mean() - values[:, 0].mean() ** 2
    assert abs(np.sqrt(abs(raw)) / expected["std"][0] - 1) > 0.01


@pytest.mark.usefixtures("instruction_set")
def test_nan_values_are_counted_separately() -> None:
    values = np.array([[0.25], [np.nan], [0.75], [np.inf]], np.float32)
    result = moments(SiteArrays(update=values, hidden=values * 1e30))
    assert (result.mean["update"], result.std["update"]) == (0.5, 0.25)
    assert result.not_finite["update"].tolist() == [2]
    assert result.columns()["update_not_finite"].tolist() == [2]


@pytest.mark.usefixtures("instruction_set")
def test_powers_too_large_for_float64_are_not_finite() -> None:
    result = moments(SiteArrays(hidden=np.array([[1e200], [-1e200], [3e200]])))
    assert not np.isfinite(result.kurtosis["hidden"]).any()
    assert result.maximum["hidden"] == 3e200


def test_nothing_recorded() -> None:
    result = moments(SiteArrays(update=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(result.mean["update"]).all()
    assert np.isnan(result.minimum["update"]).all()
    with pytest.raises(NotRecordedError, match="neither gates nor states; it has input"):
        moments(SiteArrays(input=np.zeros((2, 3))))
