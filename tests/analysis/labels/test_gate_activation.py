"""Tests of the gate activation signal, against NumPy and planted boundaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.labels.segmentation import (
    gate_activation,
    label_boundaries,
    score_boundaries,
)
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere


@pytest.mark.parametrize("name", ["encoder.l0", "encoder.l1_reverse", "decoder.rnn.l0"])
def test_equals_numpy_sequence_by_sequence(name) -> None:
    site = sites.in_memory()[name]
    result = gate_activation(site, "reset", direction="both", threshold=0.01)
    ends = np.cumsum(site.lengths)
    for sequence, end in zip(site, ends, strict=True):
        own = slice(end - len(sequence), end)
        signal = sequence.reset.astype(np.float64).mean(1)
        np.testing.assert_allclose(result.signal[own], signal, rtol=1e-12)
        way = -1 if site.site.reverse else 1
        np.testing.assert_allclose(
            result.difference[own], [np.nan, *np.diff(signal) * way], rtol=1e-7, atol=1e-12
        )
        size = [0, *np.abs(np.diff(signal)), 0]
        peaked = [
            size[step] > 0.01 and size[step] > size[step - 1] and size[step] >= size[step + 1]
            for step in range(1, len(sequence))
        ]
        assert result.boundary[own].tolist() == [False, *peaked]
    assert result.boundaries == result.boundary.sum() > 0


def segments(random, count=60) -> tuple[np.ndarray, list[int]]:
    """Update gates that rise where a segment begins, and the labels of the segments."""
    lengths = random.integers(6, 15, count)
    labels = np.repeat(np.arange(count), lengths)
    since = np.arange(len(labels)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    gate = 0.3 + 0.4 * np.exp(-since / 3)[:, np.newaxis] + random.normal(0, 0.05, (len(labels), 64))
    return np.clip(gate, 0, 1), labels.tolist()


def test_planted_boundaries_are_found() -> None:
    gate, labels = segments(np.random.default_rng(0))
    arrays = SiteArrays(update=gate, lengths=[300, len(gate) - 300], labels={"phone": labels})
    result = gate_activation(arrays, label="phone", tolerance=0)
    assert result.recall == 1
    assert result.precision > 0.95
    assert result.r_value > 0.95
    # As many boundaries elsewhere are not: the score is not one that anything gets.
    elsewhere = np.random.default_rng(1).permutation(result.boundary)
    reference = label_boundaries(arrays, "phone")
    assert score_boundaries(elsewhere, reference, arrays.lengths, 0).r_value < 0.4


def test_a_network_at_rest_has_no_boundaries() -> None:
    layer = nn.GRU(2, 8)
    with grutrace.trace(layer, record=("update",), gates="inline") as trace:
        layer(torch.zeros(400, 2))
    # It settles first, and then only rounding moves it.
    settled = np.asarray(trace["l0"].update)[100:]
    assert np.ptp(settled, axis=0).max() < 1e-5
    assert gate_activation(SiteArrays(update=settled)).boundaries == 0
    constant = np.full((50, 4), 0.3)
    assert gate_activation(SiteArrays(update=constant)).boundaries == 0
    # The control: with rounding as the threshold, it has.
    jitter = settled + np.random.default_rng(0).normal(0, 1e-6, settled.shape)
    assert gate_activation(SiteArrays(update=jitter), threshold=1e-8).boundaries > 0


def test_a_reverse_layer() -> None:
    gate = np.array([0.2, 0.2, 0.8, 0.8, 0.8])[:, np.newaxis]
    forward = gate_activation(SiteArrays(update=gate), threshold=0.1)
    assert np.flatnonzero(forward.boundary).tolist() == [2]
    back = SiteArrays(update=gate, reverse=True)
    # For it the gate falls, between the same two steps.
    assert gate_activation(back, threshold=0.1).boundaries == 0
    fallen = gate_activation(back, direction="fall", threshold=0.1)
    assert np.flatnonzero(fallen.boundary).tolist() == [2]


def test_columns_number_rows_sequences_and_steps() -> None:
    result = gate_activation(SiteArrays(update=np.zeros((3, 3)), lengths=[1, 0, 2]))
    columns = result.columns()
    assert list(columns) == ["row", "sequence", "step", "signal", "difference", "boundary"]
    assert columns["sequence"].tolist() == [0, 2, 2]
    assert columns["step"].tolist() == [0, 0, 1]
    assert result.to_frame().index.tolist() == [0, 1, 2]
    # As many sequences as steps make no column of the lengths.
    assert "lengths" not in gate_activation(SiteArrays(update=np.zeros((1, 1)))).columns()


def test_label_boundaries() -> None:
    labels = ["a", "a", "b", None, None, "b", "b"]
    arrays = SiteArrays(update=np.zeros((7, 1)), lengths=[3, 4], labels={"x": labels})
    assert np.flatnonzero(label_boundaries(arrays, "x")).tolist() == [2, 5]


def test_nan_is_no_boundary() -> None:
    gate = np.array([0.1, np.nan, 0.9, 0.1, 0.8])[:, np.newaxis]
    result = gate_activation(SiteArrays(update=gate), threshold=0.1)
    assert np.isnan(result.signal).tolist() == [False, True, False, False, False]
    assert np.flatnonzero(result.boundary).tolist() == [4]


def test_empty_and_missing_quantities() -> None:
    empty = gate_activation(SiteArrays(update=np.zeros((0, 3)), lengths=[]))
    assert (empty.steps, empty.boundaries, len(empty.signal)) == (0, 0, 0)
    arrays = SiteArrays(update=np.zeros((2, 1)))
    with pytest.raises(OptionError, match="gate: expected one of reset"):
        gate_activation(arrays, "hidden")
    with pytest.raises(OptionError, match="direction: expected one of rise, fall, both"):
        gate_activation(arrays, direction="up")
    with pytest.raises(NotRecordedError, match="no 'reset'"):
        gate_activation(arrays, "reset")
    with pytest.raises(NotRecordedError, match="no label 'x'; there are: none"):
        gate_activation(arrays, label="x")


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    def analyse(site):
        return gate_activation(site, threshold=0.02, label="word")

    check_everywhere(analyse, tmp_path, monkeypatch)
