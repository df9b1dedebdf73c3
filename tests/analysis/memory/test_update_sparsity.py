"""Tests of update sparsity, against NumPy and gates with a known share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.analysis.memory.update_sparsity import update_sparsity
from grutrace.errors import NotRecordedError, OptionError
from tests.analysis import sites
from tests.analysis.everywhere import check_everywhere


def test_equals_numpy_sequence_by_sequence() -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        result = update_sparsity(trace[name], 0.1)
        updates = [np.abs(sequence.hidden - sequence.previous) for sequence in trace[name]]
        sizes = np.concatenate(updates)
        np.testing.assert_allclose(result.share, (sizes < 0.1).mean(0))
        np.testing.assert_allclose(result.size, sizes.mean(0), rtol=1e-5)
        assert result.near_zero == pytest.approx((sizes < 0.1).mean())
        assert 0 < result.near_zero < 1


def test_a_closed_gate_has_no_updates() -> None:
    layer = nn.GRU(2, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        # The first unit keeps (z = 1), the second takes what its input says (z = 0).
        layer.bias_ih_l0[3:5] = torch.tensor([50.0, -50.0])
        layer.weight_ih_l0[6:, 0] = 1.0
    with grutrace.trace(layer) as trace:
        layer(torch.tensor([[5.0, 0.0], [-5.0, 0.0]]).repeat(20, 1))
    result = update_sparsity(trace["l0"])
    assert result.share[:2].tolist() == [1, 0]
    # From 0 to tanh(5), then back and forth between that and its opposite.
    assert result.size[1] == pytest.approx(np.tanh(5) * (1 + 2 * 39) / 40)
    assert result.size[0] == 0


def test_a_large_threshold_counts_all() -> None:
    states = np.random.default_rng(0).uniform(-1, 1, (30, 4))
    assert update_sparsity(SiteArrays(hidden=states), 3).near_zero == 1
    assert update_sparsity(SiteArrays(hidden=states), 1e-9).near_zero == 0


def test_values_that_are_not_finite_are_skipped() -> None:
    states = np.array([[0.0], [0.5], [np.nan], [0.5], [0.505]])
    result = update_sparsity(SiteArrays(hidden=states))
    # From the nan and to it no size is known.
    assert result.not_finite.tolist() == [2]
    np.testing.assert_allclose([result.share[0], result.size[0]], [2 / 3, 0.505 / 3])


def test_empty_and_missing_quantities() -> None:
    empty = update_sparsity(SiteArrays(hidden=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(empty.near_zero)
    assert np.isnan(empty.share).all()
    with pytest.raises(NotRecordedError, match="no 'hidden'"):
        update_sparsity(SiteArrays(update=np.zeros((3, 2))))
    with pytest.raises(OptionError, match="threshold: expected a number above 0, found 0"):
        update_sparsity(SiteArrays(hidden=np.zeros((3, 2))), 0)


def test_every_kind_of_site_gives_the_same(tmp_path, monkeypatch) -> None:
    check_everywhere(update_sparsity, tmp_path, monkeypatch)
