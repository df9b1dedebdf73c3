"""`dtype`: rows and initial states are kept in another type than the model's."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture.recording import module_recorder
from tests.checks import EVERYTHING
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases

KEPT = ("float16", "float32", "float64")


def assert_rounded(part: Any, whole: Any, dtype: str) -> None:
    """Every value of a trace is that of another, in its own type."""
    for name in whole.sites:
        for quantity in EVERYTHING:
            expected = np.asarray(whole[name].rows(quantity)).astype(dtype)
            actual = np.asarray(part[name].rows(quantity))
            assert actual.dtype == dtype
            np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(part[name].initial, np.asarray(whole[name].initial, dtype))
        for key, weight in part[name].weights().items():
            np.testing.assert_array_equal(weight, whole[name].weights()[key])
            assert weight.dtype == whole[name].weights()[key].dtype


# Everything is replayed, as it is for rows of another type. So residuals are the same bits.
@patch.object(module_recorder, "load", lambda: None)
@settings(max_examples=100, deadline=None)
@given(cases(dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16)))
def test_the_lattice_is_rounded_and_holds_together(case: Case) -> None:
    with grutrace.trace(case.layer, record=EVERYTHING, gates="inline") as whole:
        case.run()
    for dtype in KEPT:
        with (
            grutrace.trace(case.layer, record=EVERYTHING, dtype=dtype, check="raise") as inline,
            grutrace.trace(case.layer, record=EVERYTHING, dtype=dtype, gates="deferred") as later,
        ):
            case.run()
        assert_rounded(inline, whole, dtype)
        np.testing.assert_array_equal(
            [inline[name].residual for name in inline.sites],
            [whole[name].residual for name in whole.sites],
        )
        for result in (*verify(inline), *verify(later)):
            assert (result.check is not None, result.holds) == (True, True), (dtype, result)


@pytest.mark.parametrize("gates", ["inline", "background"])
@pytest.mark.parametrize("size", [32, 512])
def test_many_values_are_rounded_once(gates, size) -> None:
    """Both of a replay and of a harvest; about one value in ten thousand lies where it matters."""
    torch.manual_seed(0)
    layer, input = nn.GRU(3, size).double(), torch.randn(40, 64, 3, dtype=torch.float64)
    with torch.no_grad():
        with grutrace.trace(layer, record=EVERYTHING, gates=gates) as whole:
            layer(input)
        with grutrace.trace(layer, record=EVERYTHING, gates=gates, dtype="float16") as part:
            layer(input)
    assert_rounded(part, whole, "float16")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases())
def test_the_lattice_in_a_file(tmp_path, case: Case) -> None:
    path = tmp_path / "run.h5"
    with (
        grutrace.trace(case.layer, record=EVERYTHING, gates="inline") as whole,
        grutrace.trace(case.layer, path, record=EVERYTHING, dtype="float16", mode="overwrite"),
    ):
        case.run()
    plain = PlainTrace(path)
    with grutrace.open(path) as file:
        assert_rounded(file, whole, "float16")
    for name, site in plain.modules[0].sites.items():
        for quantity, rows in site.rows.items():
            expected = np.asarray(whole[name].rows(quantity)).astype("float16")
            np.testing.assert_array_equal(rows, expected)
            assert rows.dtype == "float16"
        assert site.weights["weight_hh"].dtype == whole[name].weights()["weight_hh"].dtype


def test_control_a_value_off_by_more_than_the_type_rounds_does_not_hold(tmp_path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(16, 32), torch.randn(20, 4, 16)
    with grutrace.trace(layer, record=EVERYTHING, dtype="float16") as trace:
        layer(x)
    (before,) = verify(trace)
    assert before.holds
    arrays = trace._guarded_sink.sink._store._arrays
    rows = arrays["modules/%/l0/update"]
    rows.array()
    rows._array[40, 3] += np.float16(0.05)
    (after,) = verify(trace)
    assert not after.holds
    assert (after.worst.quantity, after.worst.sequence, after.worst.unit) == ("update", 2, 3)


def test_deferred_gates_are_computed_as_the_kernel_did_not_as_rows_are_kept() -> None:
    """In float16 they would be off by what float16 sums lose, beside what its rows have lost."""
    torch.manual_seed(0)
    layer = nn.GRU(64, 64)
    with grutrace.trace(layer, dtype="float16", gates="deferred") as trace:
        layer(torch.randn(10, 2, 64))
    site = trace["l0"]
    assert site.checks["precision"].tolist() == [2.0**-23]
    weights, rows = site.weights(), np.arange(20)
    x, h = site.input[:].astype("f4"), site.gate_inputs.previous(rows).astype("f4")
    pre = x @ weights["weight_ih"].T + weights["bias_ih"]
    pre += h @ weights["weight_hh"].T + weights["bias_hh"]
    expected = 1 / (1 + np.exp(-pre[:, 64:128]))
    assert np.abs(site.update[:] - expected).max() <= 2.0**-11


def test_a_value_that_does_not_fit_is_said_once() -> None:
    layer = nn.GRU(2, 3)
    x = torch.full((4, 2), 1e5)
    with grutrace.trace(layer, record=EVERYTHING, dtype="float16") as trace:
        layer(x)
        with pytest.warns(grutrace.GrutraceWarning, match=r"up to 1e\+05, and float16 holds"):
            trace.flush()
        layer(x)
    assert np.isinf(trace["l0"].input).all()
    assert np.isfinite(trace["l0"].update).all()


def test_infinities_and_no_numbers_of_the_models_own_are_no_overflow() -> None:
    layer, x = nn.GRU(2, 3), torch.tensor([[1.0, torch.inf], [torch.nan, -torch.inf]])
    with grutrace.trace(layer, record=EVERYTHING, dtype="float16") as trace:
        layer(x)
    np.testing.assert_array_equal(trace["l0"].input, x.numpy().astype("f2"))


@pytest.mark.parametrize("dtype", ["float16", torch.float16, np.float16, np.dtype("f2")])
def test_types_of_torch_and_numpy(dtype) -> None:
    trace = grutrace.Tracer(nn.GRU(2, 3), dtype=dtype)
    assert trace.modules[0].dtype == trace.header.options["dtype"] == "float16"
    assert trace.modules[0].weights_dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "half", int, 16, np.dtype("i4")])
def test_another_type_is_one_clear_error(dtype) -> None:
    with pytest.raises(grutrace.OptionError, match="dtype: expected one of float16, float32, flo"):
        grutrace.Tracer(nn.GRU(2, 3), dtype=dtype)


def test_half_the_bytes() -> None:
    layer = nn.GRU(8, 16)
    sizes = []
    for dtype in (None, "float16"):
        with grutrace.trace(layer, dtype=dtype) as trace:
            layer(torch.randn(10, 2, 8))
        sizes.append(trace["l0"].update.nbytes)
    assert sizes[1] * 2 == sizes[0]
