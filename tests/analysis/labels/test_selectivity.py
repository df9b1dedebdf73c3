"""Tests of selectivity: planted units are found, and areas equal scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, roc_auc_score

from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.labels import selectivity as counting
from grutrace.analysis.labels.selectivity import selectivity
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere

LENGTHS = np.full(30, 40)


def slow_states(random, units=24) -> np.ndarray:
    """States that change slowly and follow nothing, in sequences of `LENGTHS`."""
    states = random.normal(size=(30, 40, units))
    for step in range(1, 40):
        states[:, step] = 0.9 * states[:, step - 1] + 0.4 * states[:, step]
    return np.tanh(states).reshape(-1, units)


def slow_labels(random, classes=3) -> np.ndarray:
    """Labels in runs of 8 steps, whose borders lie elsewhere in each sequence."""
    runs = np.repeat(random.integers(0, classes, (30, 6)), 8, axis=1)
    starts = random.integers(0, 8, 30)
    return np.concatenate(
        [run[start : start + 40] for run, start in zip(runs, starts, strict=True)]
    )


def arrays(states, labels) -> SiteArrays:
    return SiteArrays(hidden=states.astype(np.float32), lengths=LENGTHS, labels={"x": labels})


def test_a_planted_unit_is_found_first() -> None:
    random = np.random.default_rng(0)
    states, labels = slow_states(random), slow_labels(random)
    states[:, 7] = np.tanh(labels - 1 + random.normal(0, 0.3, len(labels)))
    result = selectivity(arrays(states, labels), "x")
    assert result.ranking[0] == 7
    assert result.p[7] == pytest.approx(1 / 101)
    assert result.selective == 1
    assert result.best[7] in (0.0, 2.0)
    assert max(result.auc[7], 1 - result.auc[7]) > 0.95
    assert result.null == "swapped"
    # Shuffled, the same labels find none.
    shuffled = np.concatenate(random.permutation(np.split(labels, 30)))
    assert selectivity(arrays(states, shuffled), "x").selective == 0


def test_false_positives_match_the_stated_level() -> None:
    """At level 0.05, once in 20: binomial, 120 traces, 6 expected."""
    hits = 0
    for seed in range(120):
        random = np.random.default_rng(seed)
        states, labels = slow_states(random, 6), slow_labels(random, 2)
        hits += selectivity(arrays(states, labels), "x", permutations=40, seed=seed).selective > 0
    # 13 or more: with probability 0.007 if it is 1 in 20.
    assert hits <= 12


def test_control_shuffled_steps_give_false_positives() -> None:
    """Labels are rotated because slow states and slow labels correlate by chance."""
    hits = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        states, labels = slow_states(random, 6), slow_labels(random, 2)
        alone = SiteArrays(
            hidden=states, lengths=np.full(1200, 1), labels={"x": labels.astype(float)}
        )
        hits += selectivity(alone, "x", permutations=40, seed=seed).selective > 0
    assert hits >= 10


def test_a_label_of_whole_sequences() -> None:
    random = np.random.default_rng(0)
    states = slow_states(random)
    speaker = random.permutation(np.repeat([0, 1], 15))
    states[:, 3] = np.clip(states[:, 3] * 0.3 + np.repeat(speaker - 0.5, 40), -1, 1)
    names = np.array(["ann", "bob"])[np.repeat(speaker, 40)]
    result = selectivity(arrays(states, names), "x")
    assert (result.null, result.ranking[0], result.selective) == ("swapped", 3, 1)
    assert (result.best[3], result.classes) == ("bob", ("ann", "bob"))
    assert result.auc[3] > 0.9
    others = np.array(["ann", "bob"])[np.repeat(random.permutation(speaker), 40)]
    assert selectivity(arrays(np.delete(states, 3, 1), others), "x").selective == 0


def test_areas_and_information_equal_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels = slow_labels(random)
    states = (slow_states(random, 5) + 0.1 * labels[:, np.newaxis]).astype(np.float32)
    states[:, 4] = np.round(states[:, 4], 1)
    codes = np.where(random.uniform(size=1200) < 0.1, np.nan, labels)
    result = selectivity(arrays(states, codes), "x", permutations=0)
    is_labelled = ~np.isnan(codes)
    assert result.steps == is_labelled.sum()
    assert result.auc_error.max() < 0.05
    assert result.auc_error[:4].max() < 2e-3
    for code in range(3):
        for unit in range(5):
            exact = roc_auc_score(codes[is_labelled] == code, states[is_labelled, unit])
            # Rounded values all lie in bins of their own, so nothing is lost by bins.
            bound = result.auc_error[unit] if unit < 4 else 1e-12
            assert abs(result.aucs[code, unit] - exact) <= bound + 1e-12
    for unit in range(4):
        levels = np.searchsorted(
            np.quantile(states[is_labelled, unit], np.arange(1, 8) / 8), states[is_labelled, unit]
        )
        bits = mutual_info_score(levels, codes[is_labelled]) / math.log(2)
        # The borders of levels are those of bins.
        assert result.information[unit] == pytest.approx(bits, abs=0.01)
    assert np.isnan(result.p).all()


def test_the_null_information_equals_miller_madow() -> None:
    """For independent steps: (levels - 1) (classes - 1) / (2 N ln 2) bits."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 4000).astype(float)
    states = random.uniform(size=(4000, 3))
    one = SiteArrays(hidden=states, labels={"x": labels})
    result = selectivity(one, "x")
    expected = 7 * 2 / (2 * 4000 * math.log(2))
    np.testing.assert_allclose(result.null_mean, expected, rtol=0.15)


def test_values_and_units_that_are_not_finite() -> None:
    random = np.random.default_rng(0)
    states, labels = slow_states(random, 4), slow_labels(random, 2)
    states[5, 0], states[9, 0], states[:, 1], states[:, 2] = np.nan, np.inf, np.nan, 0.5
    states[:, 3] = labels
    result = selectivity(arrays(states, labels), "x")
    assert result.not_finite.tolist() == [2, 1200, 0, 0]
    assert np.isnan([result.auc[1], result.information[1], result.p[1]]).all()
    # A unit that never moves says nothing.
    assert (result.auc[2], result.information[2], result.p[2]) == (0.5, 0, 1)
    assert (result.auc[3], result.selective) == (1, 1)
    keep = np.delete(np.arange(1200), [5, 9])
    exact = roc_auc_score(labels[keep], states[keep, 0])
    assert result.auc[0] == pytest.approx(exact, abs=result.auc_error[0] + 1e-9)


def test_less_memory_gives_the_same_null_distribution(monkeypatch) -> None:
    random = np.random.default_rng(0)
    one = arrays(slow_states(random, 4), slow_labels(random))
    monkeypatch.setattr(counting, "MIN_BINS", 1024)
    whole = selectivity(one, "x", permutations=7)
    monkeypatch.setattr("grutrace.analysis.labels.selectivity.COUNT_BYTES", 8 * 3 * 4 * 8 * 2)
    monkeypatch.setattr(counting, "PRODUCT_BYTES", 1000)
    parts = selectivity(one, "x", permutations=7)
    np.testing.assert_array_equal(parts.null_mean, whole.null_mean)
    np.testing.assert_array_equal(parts.p, whole.p)


def test_missing_labels_are_errors() -> None:
    with pytest.raises(NotRecordedError, match="no label 'y'; there are: x"):
        selectivity(arrays(np.zeros((1200, 2)), np.zeros(1200)), "y")
    with pytest.raises(OptionError, match=r"at least two values; 'x' has 0\.0"):
        selectivity(arrays(np.zeros((1200, 2)), np.zeros(1200)), "x")
    with pytest.raises(NotRecordedError, match="no 'update'"):
        selectivity(arrays(np.zeros((1200, 2)), np.zeros(1200)), "x", "update")
    with pytest.raises(OptionError, match=r"labels\['x'\]: expected 3 values, one a row, found 2"):
        selectivity(SiteArrays(hidden=np.zeros((3, 2)), labels={"x": [1, 2]}), "x")
    counts = selectivity(arrays(np.random.default_rng(0).normal(size=(1200, 2)), [0, 1] * 600), "x")
    assert "counts" not in counts.columns()


@pytest.mark.parametrize("label", ["word", "speaker"])
def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch, label) -> None:
    check_everywhere(lambda site: selectivity(site, label, permutations=5), tmp_path, monkeypatch)


def test_tokens_of_a_trace() -> None:
    result = selectivity(sites.in_memory()["encoder.l0"], "word", permutations=0)
    assert result.classes == ("w0", "w1", "w2")
    # Those of the last call have none.
    assert result.steps == 4 * 3 + 4 * 9
