"""Tests of changes between traces: size and direction of a change, and its standard error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.comparison.change import change
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import as_arrays, check_everywhere
from tests.checks import EVERYTHING


def slow(random, units=3, sequences=40) -> np.ndarray:
    """Values that hardly change within a sequence of 25 steps, so that few are independent."""
    means = random.normal(size=(sequences, 1, units))
    return (means + 0.1 * random.normal(size=(sequences, 25, units))).reshape(-1, units)


def test_effect_sizes_equal_cohens_d() -> None:
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, (5000, 3)), random.normal([0, 0.5, -2], [1, 1, 3], (5000, 3))
    result = change(SiteArrays(update=one, name="a"), SiteArrays(update=other, name="b"))
    assert (result.site, result.other, result.paired) == ("a", "b", False)
    moved = other.mean(0) - one.mean(0)
    np.testing.assert_allclose(result.moved["update"], moved)
    pooled = np.sqrt((one.var(0) + other.var(0)) / 2)
    np.testing.assert_allclose(result.effect["update"], moved / pooled, rtol=1e-9)
    np.testing.assert_allclose(result.effect["update"], [0, 0.5, -2 / np.sqrt(5)], atol=0.05)
    assert result.rmse == result.correlation == {}
    assert list(result.columns())[:3] == ["unit", "update_before", "update_after"]


@pytest.mark.parametrize("paired", [False, True])
def test_standard_errors_match_repetitions(paired) -> None:
    """Over 300 repetitions, the spread of the difference matches the stated error."""
    moved, errors, alone = [], [], []
    for seed in range(300):
        random = np.random.default_rng(seed)
        one = slow(random, 1)
        other = one + slow(random, 1) if paired else slow(random, 1)
        lengths = np.full(40, 25)
        result = change(
            SiteArrays(hidden=one, lengths=lengths),
            SiteArrays(hidden=other, lengths=lengths),
            paired=paired,
        )
        moved.append(result.moved["hidden"][0])
        errors.append(result.error["hidden"][0])
        alone.append(np.sqrt((one.var() + other.var()) / 1000))
    assert np.mean(errors) == pytest.approx(np.std(moved), rel=0.1)
    assert np.mean(alone) < np.std(moved) / 2


def test_paired_steps_are_compared_pairwise() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(200, 4))
    noise = random.normal(size=(200, 4))
    other = np.stack([one[:, 0], -one[:, 1], one[:, 2] + noise[:, 2], noise[:, 3]], axis=1) + 7
    result = change(SiteArrays(hidden=one), SiteArrays(hidden=other), paired=True)
    for unit in range(4):
        expected = np.corrcoef(one[:, unit], other[:, unit])[0, 1]
        assert result.correlation["hidden"][unit] == pytest.approx(expected)
    np.testing.assert_allclose(result.correlation["hidden"][:2], [1, -1])
    root = np.sqrt(np.square(other - one).mean(0))
    np.testing.assert_allclose(result.rmse["hidden"], root)
    assert result.rmse["hidden"][0] == pytest.approx(7)


def trained(tmp_path, decay: float):
    """A model before and after one of its units was given other weights, on the same inputs."""
    torch.manual_seed(0)
    layer, batch = nn.GRU(3, 6, bidirectional=True), torch.randn(20, 5, 3)
    for name in ("before", "after"):
        with grutrace.trace(layer, tmp_path / f"{name}.h5", record=EVERYTHING, gates="inline"):
            layer(batch)
        with torch.no_grad():
            for suffix in ("l0", "l0_reverse"):
                getattr(layer, f"bias_ih_{suffix}")[6 + 2] += decay
    return [grutrace.open(tmp_path / f"{name}.h5") for name in ("before", "after")]


def test_the_changed_unit_is_found(tmp_path) -> None:
    before, after = trained(tmp_path, 4.0)
    with before, after:
        for name in before.sites:
            result = change(before[name], after[name], paired=True)
            # The gate of that unit alone has other weights.
            assert np.flatnonzero(result.weights["update"]).tolist() == [2]
            assert not result.weights["reset"].any()
            size = np.abs(result.effect["update"])
            assert size.argmax() == 2
            assert size[2] > 5
            assert np.delete(size, 2).max() < 1
            rows = before[name].weights()
            norm = np.sqrt(sum(np.square(rows[row][6 + 2].astype(float)).sum() for row in rows))
            assert result.weights["update"][2] == pytest.approx(4 / norm)


def test_equal_traces_have_no_change(tmp_path) -> None:
    before, after = trained(tmp_path, 0.0)
    with before, after:
        result = change(before["l0"], after["l0"], paired=True)
        for mapping in (result.moved, result.effect, result.rmse, result.weights):
            assert all(not values.any() for values in mapping.values())
        np.testing.assert_allclose(result.correlation["hidden"], 1)


def test_units_are_aligned_by_their_numbers() -> None:
    torch.manual_seed(0)
    layer, batch = nn.GRU(3, 6), torch.randn(10, 2, 3)
    traces = []
    for units in ([4, 1, 3], [0, 3, 4]):
        with grutrace.trace(layer, record=("update", "hidden"), units=units) as trace:
            layer(batch)
        traces.append(trace)
    result = change(traces[0]["l0"], traces[1]["l0"], paired=True)
    assert result.units.tolist() == [3, 4]
    assert all(np.abs(values).max() < 1e-6 for values in result.rmse.values())
    with grutrace.trace(layer, record=("update",), units=[5]) as trace:
        layer(batch)
    with pytest.raises(NotRecordedError, match="no unit was recorded in both"):
        change(traces[0]["l0"], trace["l0"])


def test_rows_in_another_order_are_aligned() -> None:
    """A trace of a stepwise decoder and one of a full call have rows in different orders."""
    site = sites.in_memory()["decoder.rnn.l0"]
    assert not isinstance(site.rows_between(0, len(site)), slice)
    same = change(site, as_arrays(site), paired=True)
    assert not same.rmse["hidden"].any()
    other_way = change(as_arrays(site), site, paired=True)
    assert not other_way.rmse["hidden"].any()
    # The control: in the order of the rows they would not be.
    rows = np.asarray(site.hidden)
    wrong = SiteArrays(hidden=rows, lengths=site.lengths)
    assert change(site, wrong, paired=True).rmse["hidden"].any()


def test_a_constant_unit() -> None:
    still = np.full((6, 3), 0.5)
    other = still + [0, 0.1, 0]
    result = change(SiteArrays(update=still), SiteArrays(update=other), paired=True)
    assert result.effect["update"].tolist() == [0, np.inf, 0]
    assert np.isnan(result.correlation["update"]).all()
    assert np.isnan(result.error["update"]).all()


def test_nan_gives_nan() -> None:
    one = np.random.default_rng(0).normal(size=(9, 2))
    broken = one.copy()
    broken[4, 0] = np.nan
    result = change(SiteArrays(update=one), SiteArrays(update=broken))
    assert np.isnan(result.moved["update"]).tolist() == [True, False]
    empty = SiteArrays(update=np.zeros((0, 2)), lengths=[])
    assert np.isnan(change(empty, SiteArrays(update=one)).moved["update"]).all()
    assert np.isnan(change(empty, empty, paired=True).rmse["update"]).all()


def test_wrong_input_is_an_error() -> None:
    one, other = SiteArrays(update=np.zeros((4, 2))), SiteArrays(hidden=np.zeros((4, 2)))
    with pytest.raises(NotRecordedError, match="nothing in common"):
        change(one, other)
    longer = SiteArrays(update=np.zeros((4, 2)), lengths=[1, 3])
    with pytest.raises(OptionError, match="paired: expected sequences of the same lengths"):
        change(one, longer, paired=True)
    back = SiteArrays(update=np.zeros((4, 2)), reverse=True)
    with pytest.raises(OptionError, match="opposite directions"):
        change(one, back, paired=True)


@pytest.mark.parametrize("paired", [False, True])
def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch, paired) -> None:
    trace = sites.in_memory()

    def analyse(site):
        other = as_arrays(trace[site.name])
        shifted = SiteArrays(
            update=np.square(other.update),
            hidden=np.square(other.hidden),
            lengths=other.lengths,
            weights={name: 2 * weight for name, weight in other.weights.items()},
            reverse=other.reverse,
        )
        return change(site, shifted, paired=paired)

    check_everywhere(analyse, tmp_path, monkeypatch)
