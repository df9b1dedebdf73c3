"""Tests of the float16 error of gates and states, against the values before rounding."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.analysis.descriptive.quantization import quantization
from grutrace.analysis.engine.map_reduce import with_dask
from grutrace.analysis.engine.site_data import SiteArrays
from grutrace.errors import NotRecordedError
from grutrace.records import DEFAULT_RECORD


def traces(dtype: str = "float16", scale: float = 1.0, **options):
    """One run in its own type and in another."""
    torch.manual_seed(0)
    layer = nn.GRU(6, 16, bidirectional=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(scale)
    with (
        grutrace.trace(layer, gates="inline") as whole,
        grutrace.trace(layer, dtype=dtype, gates="inline", **options) as part,
    ):
        layer(torch.randn(500, 8, 6))
    return whole, part


@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
def test_errors_stay_within_the_stated_bound(scale) -> None:
    """For gates near 0.5, of all sizes, and saturated."""
    whole, half = traces(scale=scale)
    for name in whole.sites:
        result = quantization(half[name])
        assert (result.site, result.kept, result.steps) == (name, "float16", 4000)
        for quantity in DEFAULT_RECORD:
            exact = np.asarray(whole[name].rows(quantity), np.float64)
            errors = np.abs(np.asarray(half[name].rows(quantity), np.float64) - exact)
            assert (errors.max(axis=0) <= result.largest[quantity]).all()
            # A state that is 1 now may have been a little more, as far as anybody can tell.
            share = 0.45 if quantity == "hidden" else 0.9
            assert (errors.max(axis=0) > share * result.largest[quantity]).any()
            assert (result.largest[quantity] <= 2.0 ** (-11 if quantity == "hidden" else -12)).all()
            # Of all units together: that of one unit is a sample of 4,000. What is saturated lies
            # nearer to 1 than anywhere between two neighbours.
            typical = np.sqrt(np.square(errors).mean())
            told = np.sqrt(np.square(result.typical[quantity]).mean())
            assert typical < 1.05 * told
            assert scale > 1 or typical > 0.95 * told
            assert not result.infinite[quantity].any()


def test_control_a_larger_error_is_detected() -> None:
    whole, half = traces()
    name = whole.sites[0]
    spoilt = np.array(half[name].update)
    spoilt[7, 3] += np.float16(2.0**-10)
    bound = quantization(SiteArrays(update=spoilt)).largest["update"]
    errors = np.abs(spoilt.astype(float) - np.asarray(whole[name].update, float))
    assert (errors.max(axis=0) > bound).tolist() == [unit == 3 for unit in range(16)]


def test_an_exact_type_has_no_error() -> None:
    for dtype in ("float32", "float64"):
        _, part = traces(dtype)
        result = quantization(part[part.sites[0]])
        assert result.kept == dtype
        for quantity in DEFAULT_RECORD:
            assert not result.largest[quantity].any()
            assert not result.typical[quantity].any()


def test_overflowing_values_are_counted() -> None:
    rows = np.array([[1.0, 7e4], [-8e4, 9e4], [0.0, 2.0], [0.25, 3.0]])
    with np.errstate(over="ignore"):
        result = quantization(SiteArrays(hidden=rows.astype(np.float16)))
    assert result.infinite["hidden"].tolist() == [1, 2]
    # Half the spacing at 1, and at 3.
    assert result.largest["hidden"].tolist() == [2.0**-11, 2.0**-10]


def test_derived_gates_are_skipped() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, gates="deferred", dtype="float16") as trace:
        layer(torch.randn(9, 2, 3))
    assert list(quantization(trace["l0"]).largest) == ["hidden"]
    with pytest.raises(NotRecordedError, match="stores no gates and no states"):
        quantization(SiteArrays(input=np.zeros((3, 2))))


def test_every_way_of_computing_gives_the_same(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("grutrace.analysis.engine.map_reduce.PART_BYTES", 1)
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, tmp_path / "run.h5", dtype="float16"):
        layer(torch.randn(300, 2, 3))
    with (
        grutrace.open(tmp_path / "run.h5") as trace,
        ThreadPoolExecutor(2) as pool,
        dask.config.set(pool=pool),
    ):
        here, there = quantization(trace["l0"]), quantization(with_dask(trace["l0"]))
        for quantity in DEFAULT_RECORD:
            assert here.largest[quantity].tolist() == there.largest[quantity].tolist()
            assert here.typical[quantity].tolist() == there.typical[quantity].tolist()
    assert main(["stats", str(tmp_path / "run.h5"), "quantization", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["largest"]["update"] == here.largest["update"].tolist()
    assert main(["info", str(tmp_path / "run.h5")]) == 0
    assert "float16: values up to 1 are off by 0.000244 at most" in capsys.readouterr().out
