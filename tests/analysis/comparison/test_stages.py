"""Tests of `stages`: means against NumPy, the test against truths that were planted."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis import SiteArrays, stages
from grutrace.analysis.comparison import stages as module
from grutrace.analysis.engine import map_reduce
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis.everywhere import check_everywhere


def arrays(random, drift=(), sequences=40, units=8, correlated=False):
    """Sequences of 3 to 9 steps; the units of `drift` grow from sequence to sequence."""
    lengths = random.integers(3, 10, sequences)
    hidden = random.normal(size=(lengths.sum(), units))
    if correlated:
        # All steps of a sequence are nearly equal: steps are no independent samples.
        hidden = 0.1 * hidden + np.repeat(random.normal(size=(sequences, units)), lengths, axis=0)
    numbers = np.repeat(np.arange(sequences), lengths)
    for unit in drift:
        hidden[:, unit] += 3 * numbers / sequences
    return SiteArrays(hidden=hidden, lengths=lengths)


def test_means_are_those_of_the_sequences_of_each_stage(monkeypatch) -> None:
    site = arrays(np.random.default_rng(0), sequences=11)
    rows = np.split(site.hidden, np.cumsum(site.lengths)[:-1])
    means = np.array([each.mean(0) for each in rows])
    stage = np.arange(11) * 4 // 11
    expected = np.array([means[stage == number].mean(0) for number in range(4)])
    for size in (1, map_reduce.PART_BYTES):
        monkeypatch.setattr(map_reduce, "PART_BYTES", size)
        found = stages(site, 4, permutations=9)
        np.testing.assert_allclose(found.mean["hidden"], expected)
        np.testing.assert_allclose(found.moved["hidden"], expected[-1] - expected[0])
        assert found.first.tolist() == [list(stage).index(number) for number in range(4)]
    order = np.arange(11) - 5.0
    correlation = [np.corrcoef(order, column)[0, 1] for column in means.T]
    np.testing.assert_allclose(found.trend["hidden"], correlation)


def test_a_unit_that_drifts_is_found() -> None:
    found = stages(arrays(np.random.default_rng(1), drift=[5]))
    assert np.flatnonzero(found.p["hidden"] < 0.05).tolist() == [5]


@pytest.mark.parametrize("correlated", [False, True])
def test_under_noise_no_more_than_the_level_is_found(correlated) -> None:
    """At a level of 5 %, 100 traces without drift give more than 12 findings once in 400 times."""
    random = np.random.default_rng(2)
    false = sum(
        (stages(arrays(random, correlated=correlated), permutations=199).p["hidden"] < 0.05).any()
        for _ in range(100)
    )
    assert false <= 12


def test_control_without_correction_noise_gives_findings() -> None:
    random = np.random.default_rng(2)
    single = [stages(arrays(random), permutations=199).p["hidden"] for _ in range(20)]
    largest = [stages(arrays(random, units=1), permutations=199).p["hidden"] for _ in range(100)]
    assert np.mean([(p < 0.05).any() for p in single]) < 0.3
    # The smallest of eight uncorrected p-values is below 5 % in a third of the traces.
    assert np.mean(np.reshape(largest[:96], (12, 8)).min(1) < 0.05) > 0.1


def test_few_sequences_cannot_show_anything() -> None:
    found = stages(arrays(np.random.default_rng(3), drift=[5], sequences=3))
    assert found.p["hidden"].min() > 0.2
    alone = stages(arrays(np.random.default_rng(3), sequences=1))
    assert np.isnan(alone.p["hidden"]).all()
    assert alone.moved["hidden"].tolist() == [0.0] * 8


def test_constant_units_and_nan_have_no_trend() -> None:
    hidden = np.random.default_rng(0).normal(size=(60, 3))
    hidden[:, 0], hidden[30, 1] = 0.1, np.nan
    found = stages(SiteArrays(hidden=hidden, lengths=[5] * 12))
    assert np.isnan(found.p["hidden"]).tolist() == [True, True, False]


def test_many_sequences_are_grouped(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_GROUPS", 8)
    found = stages(arrays(np.random.default_rng(1), drift=[5]))
    assert (found.sequences, found.groups) == (40, 8)
    assert np.flatnonzero(found.p["hidden"] < 0.05).tolist() == [5]


def test_memory_file_and_dask_agree(tmp_path, monkeypatch) -> None:
    check_everywhere(stages, tmp_path, monkeypatch)


@pytest.mark.parametrize("arguments", [{"count": 0}, {"count": 1.5}, {"permutations": 0}])
def test_wrong_numbers_are_refused(arguments) -> None:
    with pytest.raises(OptionError, match=next(iter(arguments))):
        stages(arrays(np.random.default_rng(0)), **arguments)


def test_gates_or_states_are_needed() -> None:
    with pytest.raises(NotRecordedError):
        stages(SiteArrays(input=np.zeros((3, 2))))


def test_an_empty_site_has_no_stages() -> None:
    found = stages(SiteArrays(hidden=np.zeros((0, 2)), lengths=[]))
    assert found.sequences == 0
    assert np.isnan(found.p["hidden"]).all()
