"""Tests of saturation, against NumPy over all steps and units with known gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.descriptive.saturation import saturation
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError
from tests.analysis import sites


def test_equals_all_steps_at_once() -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        site, result = trace[name], saturation(trace[name])
        assert (result.site, result.steps) == (name, len(site.update))
        for gate in ("reset", "update", "candidate"):
            sizes = np.abs(site.rows(gate))
            np.testing.assert_array_equal(result.left[gate], (sizes < np.float32(0.1)).mean(0))
            np.testing.assert_array_equal(result.right[gate], (sizes > np.float32(0.9)).mean(0))
        assert 0 < result.right["candidate"].mean() < 1


def known(units: int = 4) -> nn.GRU:
    """No weights, so that the biases alone decide: r = 0.007, z = 0.993, h keeps still."""
    layer = nn.GRU(2, units)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[:units] = -5
        layer.bias_hh_l0[units : 2 * units] = 5
    return layer


def test_known_units() -> None:
    layer = known()
    with torch.no_grad():
        # One unit of the four is alive: its state follows the first feature of the input.
        layer.bias_hh_l0[4] = 0
        layer.weight_ih_l0[8, 0] = 1
    with grutrace.trace(layer) as trace:
        layer(torch.randn(60, 2))
    result = saturation(trace["l0"])
    assert result.stuck["reset"].tolist() == [-1, -1, -1, -1]
    assert result.stuck["update"].tolist() == [0, 1, 1, 1]
    assert result.constant.tolist() == [False, True, True, True]
    assert result.columns()["update_right"].tolist() == [0, 1, 1, 1]
    assert next(iter(result.columns())) == "unit"
    assert result.scalars() == {"steps": 60}


def test_only_some_units_and_gates_recorded() -> None:
    layer = nn.GRU(3, 8)
    with grutrace.trace(layer, record=("update",), units=[5, 2], gates="inline") as trace:
        layer(torch.randn(10, 3) * 4)
    result = saturation(trace["l0"])
    assert result.units.tolist() == [5, 2]
    assert list(result.left) == ["update"]
    assert result.constant is None


def test_nan_values_are_skipped() -> None:
    update = np.array([[0.05], [np.nan], [0.95], [np.inf]])
    result = saturation(SiteArrays(update=update))
    assert (result.left["update"], result.right["update"]) == (0.5, 0.5)


def test_nothing_recorded() -> None:
    result = saturation(SiteArrays(update=np.zeros((0, 3)), hidden=np.zeros((0, 3)), lengths=[]))
    assert np.isnan(result.left["update"]).all()
    assert not result.constant.any()
    with pytest.raises(NotRecordedError, match="has no gates; it has hidden"):
        saturation(SiteArrays(hidden=np.zeros((2, 3))))
