"""Tests of probes: a decodable label is decoded, and others are at chance level."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.engine.site_data import SiteArrays, as_site_data, sequence_ids
from grutrace.analysis.labels import probe as probes
from grutrace.analysis.labels.probe import _root_sequences, probe, split_rows
from grutrace.errors import MissingExtraError, NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere

LENGTHS = np.full(60, 20)


def arrays(states, **labels) -> SiteArrays:
    return SiteArrays(hidden=states.astype(np.float32), lengths=LENGTHS, labels=labels)


def test_only_an_encoded_label_is_decoded() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(1200, 16))
    label = np.where(states[:, 3] > 0.3, "up", "down")
    result = probe(arrays(states, x=label), "x")
    assert result.score > 0.95
    assert result.kind == "classes"
    assert result.classes == ("down", "up")
    assert result.weight.argmax() == 3
    assert result.converged
    other = probe(arrays(states, x=random.permutation(label)), "x")
    assert abs(other.score - other.baseline) < 4 * other.error + 0.05
    assert np.isnan(result.control_score)
    assert result.control == ""


def test_memorised_labels_show_in_the_control_task() -> None:
    """The states encode the token, so a probe decodes any label of tokens, also a random one."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, 40, 1200)
    tokens = [f"t{kind:02}" for kind in kinds]
    label = np.where(kinds % 2, "odd", "even")
    names = np.eye(40)[kinds] + random.normal(0, 0.05, (1200, 40))
    by_heart = probe(arrays(names, x=label, tokens=tokens), "x")
    assert by_heart.control == "tokens"
    assert by_heart.score > 0.98
    assert by_heart.control_score > 0.98
    assert abs(by_heart.selectivity) < 0.02
    # States that say the label and not the token: the probe cannot learn the control.
    says = (kinds % 2)[:, np.newaxis] + random.normal(0, 0.1, (1200, 40))
    selective = probe(arrays(says, x=label, tokens=tokens), "x")
    assert selective.score > 0.98
    assert selective.selectivity == selective.score - selective.control_score
    assert selective.selectivity > 0.2


def test_numbers_are_read_as_numbers() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(1200, 8))
    noise = random.normal(size=1200)
    result = probe(arrays(states, x=states[:, 1] * 2 + noise), "x", steps=10_000)
    assert result.kind == "numbers"
    # Of the variance 5, 4 can be known.
    assert result.score == pytest.approx(0.8, abs=0.05)
    assert result.weight.argmax() == 1
    nothing = probe(arrays(states, x=noise), "x")
    assert nothing.score == pytest.approx(0, abs=0.1)
    assert len(result.recall) == 0


def test_sequences_are_not_split() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 1200).astype(float)
    labels[random.uniform(size=1200) < 0.3] = np.nan
    of = as_site_data(arrays(np.zeros((1200, 2)), x=labels))
    used, for_test = split_rows(
        of, sequence_ids(of), of.labels("x"), 0.25, 10**9, np.random.default_rng(1)
    )
    np.testing.assert_array_equal(used, ~np.isnan(labels))
    by_sequence = for_test.reshape(60, 20)
    assert (by_sequence.all(1) | ~by_sequence.any(1)).all()
    share = np.count_nonzero(used & for_test) / used.sum()
    assert share == pytest.approx(0.25, abs=0.03)
    few, _ = split_rows(of, sequence_ids(of), of.labels("x"), 0.25, 30, np.random.default_rng(1))
    assert (np.count_nonzero(few & for_test), np.count_nonzero(few & ~for_test)) == (30, 30)


def test_control_a_split_by_step_leaks_the_sequence() -> None:
    """States that encode their sequence reveal its label."""
    random = np.random.default_rng(0)
    names = np.repeat(np.eye(60), 20, axis=0) + random.normal(0, 0.02, (1200, 60))
    label = np.repeat(random.integers(0, 2, 60), 20)
    whole = probe(arrays(names, x=label), "x")
    assert whole.score < 0.75
    site = SiteArrays(hidden=names, lengths=np.full(1200, 1), labels={"x": label})
    assert probe(site, "x").score > 0.98


def test_forks_stay_with_their_parent() -> None:
    parents = np.array([-1, 0, 1, -1, 3, 2])
    assert _root_sequences(parents).tolist() == [0, 0, 0, 3, 3, 0]
    cell, state = nn.GRUCell(2, 3), torch.randn(2, 3)
    tracer = grutrace.Tracer(cell)
    with tracer.recording() as recording:
        state = cell(torch.randn(2, 2), state)
        # Beams: two rows go on from the first.
        state = cell(torch.randn(3, 2), state[[0, 0, 1]])
        recording.annotate(labels={"x": {"": [[1.0, 2.0], [1.0, 2.0]]}})
    of = as_site_data(tracer["cell"])
    assert (of.parents >= 0).sum() == 1
    used, for_test = split_rows(
        of, sequence_ids(of), of.labels("x"), 0.5, 100, np.random.default_rng(0)
    )
    assert used.any()
    child = int(np.flatnonzero(of.parents >= 0)[0])
    for_sequence = [for_test[of.rows_between(number, number + 1)] for number in range(3)]
    together = np.concatenate([for_sequence[child], for_sequence[of.parents[child]]])
    assert together.all() or not together.any()


def test_the_error_counts_sequences() -> None:
    """If all steps of a sequence are right or wrong together, it counts once."""
    right = np.repeat(np.random.default_rng(0).integers(0, 2, 50), 20).astype(bool)
    error = probes._clustered_error(right, np.repeat(np.arange(50), 20))
    share = right.mean()
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 49))
    assert np.isnan(probes._clustered_error(right[:20], np.zeros(20, int)))


def test_rows_that_are_not_finite_are_left_out() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(1200, 4))
    label = (states[:, 0] > 0).astype(float)
    states[::10, 2] = np.nan
    result = probe(arrays(states, x=label), "x")
    assert result.train_steps + result.test_steps == 1200 - 120
    assert result.score > 0.9


def test_missing_labels_are_errors(monkeypatch) -> None:
    states = np.random.default_rng(0).normal(size=(1200, 3))
    one = SiteArrays(hidden=states, labels={"x": np.arange(1200) % 2})
    with pytest.raises(OptionError, match=r"in at least two sequences.*found it in 1"):
        probe(one, "x")
    with pytest.raises(OptionError, match="test: expected a share between 0 and 1, found 2"):
        probe(arrays(states, x=np.arange(1200) % 2), "x", test=2)
    with pytest.raises(NotRecordedError, match="no label 'kinds'"):
        probe(arrays(states, x=np.arange(1200) % 2), "x", control="kinds")
    with pytest.raises(OptionError, match="no step with finite hidden is left"):
        probe(arrays(np.full((1200, 3), np.nan), x=np.arange(1200) % 2), "x")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r'needs sklearn, .*pip install .*"scikit-learn'):
        probe(one, "x")


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    def analyse(site):
        return probe(site, "word", control="speaker", test=0.4)

    check_everywhere(analyse, tmp_path, monkeypatch)


def test_of_a_trace() -> None:
    result = probe(sites.in_memory()["encoder.l1"], "word")
    assert result.train_steps + result.test_steps == 4 * 3 + 4 * 9
    assert result.train_sequences + result.test_sequences == 8
