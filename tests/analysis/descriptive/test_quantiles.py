"""Tests of quantiles, against sorted values within the stated error, and of histograms."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.descriptive.quantiles import quantiles
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, assert_same, check_everywhere

SHARES = (0.0, 0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999, 1.0)


def sorted_out(values: np.ndarray, share: float) -> np.ndarray:
    return np.quantile(values.astype(np.float64), share, axis=0, method="inverted_cdf")


def test_within_the_stated_error_of_sorting() -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        result = quantiles(trace[name])
        for quantity in ("reset", "update", "candidate", "hidden"):
            values = np.asarray(trace[name].rows(quantity))
            inside = (np.abs(values) <= 1).all(axis=0)
            for share in SHARES:
                off = np.abs(result.quantile(quantity, share) - sorted_out(values, share))
                assert (off <= result.error[quantity])[inside].all()
            assert result.median[quantity].tolist() == result.quantile(quantity, 0.5).tolist()
            np.testing.assert_array_equal(result.minimum[quantity], values.min(0))
            np.testing.assert_array_equal(result.maximum[quantity], values.max(0))


@pytest.mark.parametrize("kind", ["uniform", "two values", "close to 1", "steps of a bin"])
def test_any_distribution(kind) -> None:
    random = np.random.default_rng(0)
    values = {
        "uniform": random.uniform(size=(5000, 3)),
        "two values": random.choice([0.1, 0.9], size=(5000, 3)),
        "close to 1": 1 - 1e-5 * random.uniform(size=(5000, 3)) ** 4,
        "steps of a bin": random.integers(0, 1025, (5000, 3)) / 1024,
    }[kind]
    result = quantiles(SiteArrays(update=values))
    for share in SHARES:
        off = np.abs(result.quantile("update", share) - sorted_out(values, share)).max()
        assert off <= result.error["update"] == 1 / 1024
    for unit in range(3):
        expected = np.histogram(values[:, unit], result.edges["update"])[0]
        np.testing.assert_array_equal(result.histogram["update"][unit], expected)


def test_control_few_bins_exceed_the_error_of_many() -> None:
    values = np.random.default_rng(0).beta(2, 30, (5000, 4))
    result = quantiles(SiteArrays(update=values), bins=2)
    off = np.abs(result.median["update"] - np.median(values, axis=0)).max()
    assert 1 / 1024 < off <= result.error["update"] == 0.5


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    def derived(actual, expected) -> None:
        for quantity, error in expected.error.items():
            off = np.abs(actual.median[quantity] - expected.median[quantity])
            assert (off <= error).all()

    check_everywhere(quantiles, tmp_path, monkeypatch, derived=derived)
    site = sites.in_memory()["encoder.l1_reverse"]
    assert_same(quantiles(as_arrays(site)), quantiles(site), 0)


def test_counts_equal_numpy_with_states_beyond_the_edges() -> None:
    states = np.array([[-3.0], [-1.0], [0.0], [1.0], [1.5], [np.nan], [7.0]])
    result = quantiles(SiteArrays(hidden=states), bins=4)
    assert result.histogram["hidden"].tolist() == [[1, 0, 1, 1]]
    assert (result.underflow["hidden"], result.overflow["hidden"]) == (1, 2)
    assert (result.minimum["hidden"], result.maximum["hidden"]) == (-3, 7)
    assert 0 <= result.median["hidden"] <= 0.5


def test_many_units_in_groups() -> None:
    values = np.random.default_rng(0).uniform(size=(50, 150)).astype(np.float16)
    result = quantiles(SiteArrays(reset=values))
    assert (result.histogram["reset"].sum(axis=1) == 50).all()
    assert (np.abs(result.q25["reset"] - sorted_out(values, 0.25)) <= 1 / 1024).all()


def test_wrong_options_are_errors() -> None:
    empty = quantiles(SiteArrays(update=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(empty.median["update"]).all()
    assert "histogram" not in empty.to_dict()
    with pytest.raises(OptionError, match="share: expected a number from 0 to 1; found 2"):
        empty.quantile("update", 2)
    with pytest.raises(OptionError, match="expected one of update; found 'reset'"):
        empty.quantile("reset", 0.5)
    with pytest.raises(OptionError, match="bins: expected one of 2, 4"):
        quantiles(SiteArrays(update=np.zeros((1, 1))), bins=100)
    with pytest.raises(NotRecordedError, match="neither gates nor states"):
        quantiles(SiteArrays(input=np.zeros((1, 1))))
