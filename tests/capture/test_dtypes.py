"""Tests of every floating-point type and of autocast: the kernel's values are recorded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from tests import oracles
from tests.capture.changes import while_the_kernel_runs
from tests.checks import EVERYTHING, same_result
from tests.strategies import Case

STORAGE_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYERS = {
    "one layer": lambda: nn.GRU(5, 16, bidirectional=True),
    "stack": lambda: nn.GRU(5, 16, 3, dropout=0.3, batch_first=True),
    "cell": lambda: nn.GRUCell(5, 16),
}


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()


@pytest.fixture(params=LAYERS)
def case(request) -> Case:
    torch.manual_seed(0)
    layer = LAYERS[request.param]()
    shape = (30, 5) if isinstance(layer, nn.GRUCell) else (6, 30, 5)
    return Case(layer, (torch.randn(shape),))


def to(case: Case, dtype: torch.dtype) -> Case:
    return Case(case.layer.to(dtype), (case.args[0].to(dtype),))


def check(case: Case, cast: torch.dtype | None = None, path: Any = None) -> Any:
    """Trace a call: untouched, and the gates those of the kernel, within the tolerance."""
    untouched = case.untouched()
    with autocast(cast):
        expected = case.run(untouched)
        with grutrace.trace(case.layer, path, record=EVERYTHING, check="raise") as trace:
            assert same_result(expected, case.run())
    output = expected if isinstance(case.layer, nn.GRUCell) else expected[0]
    directions = 2 if getattr(case.layer, "bidirectional", False) else 1
    kernel = oracles.harvest_layers(output.grad_fn, directions * case.layer.hidden_size)
    layout = case.layer if isinstance(case.layer, nn.GRUCell) else nn.GRU(1, 1)
    for index, name in enumerate(trace.sites):
        number, reverse = divmod(index, directions)
        for quantity, used in kernel[number].items():
            width = directions * case.layer.hidden_size
            sequences = oracles.as_sequences(layout, used.detach().double(), width)
            own = [np.split(sequence, directions, axis=1)[reverse] for sequence in sequences]
            recorded = np.asarray(trace[name].rows(quantity), np.float64)
            allowed = trace[name].checks["tolerance"].max()
            assert np.abs(recorded - np.concatenate(own)).max() <= allowed
    assert all(result.holds and result.check == "gates" for result in verify(trace))
    return trace


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_every_type(case, dtype, tmp_path) -> None:
    trace = check(to(case, dtype), path=tmp_path / "run.h5")
    stored = {torch.bfloat16: "float32"}.get(dtype, str(dtype).removeprefix("torch."))
    name = trace.sites[0]
    assert trace[name].update.dtype == np.dtype(stored)
    assert trace[name].weights(0)["weight_hh"].dtype == np.dtype(stored)
    eps = torch.finfo(dtype).eps
    assert 2 * eps <= trace[name].checks["tolerance"].max() <= 40 * eps


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(case, cast) -> None:
    trace = check(case, cast)
    name = trace.sites[0]
    assert trace[name].update.dtype == np.float32
    assert 2 * torch.finfo(cast).eps <= trace[name].checks["tolerance"].max()
    # The control: the kernel did compute in the smaller type, and so did the replay.
    plain = check(case)
    assert plain[name].checks["tolerance"].max() < 1e-5
    assert np.abs(plain[name].update[:] - trace[name].update[:]).max() > 1e-5


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_control_wrong_weights_exceed_the_tolerance_in_every_type(dtype) -> None:
    layer, x = nn.GRU(5, 16).to(dtype), torch.randn(6, 30, 5).to(dtype)

    def disturb() -> None:
        layer.weight_hh_l0[16:32] *= -1
        layer.bias_ih_l0[16:32] += 2

    with (
        grutrace.trace(layer, check="raise"),
        while_the_kernel_runs(disturb),
        pytest.raises(grutrace.ResidualError),
    ):
        layer(x)


def test_half_precision_rows_are_stored_exactly() -> None:
    layer, x = nn.GRU(5, 16).bfloat16(), torch.randn(6, 30, 5).bfloat16()
    with grutrace.trace(layer, record=EVERYTHING) as trace:
        output, _ = layer(x)
    hidden, _ = trace["l0"].padded("hidden")
    assert torch.equal(torch.from_numpy(hidden).bfloat16(), output.detach().transpose(0, 1))
    update = torch.from_numpy(trace["l0"].sequence(3).update)
    assert torch.equal(update.bfloat16().float(), update)


def test_a_module_converted_to_a_smaller_type_while_attached() -> None:
    layer, x = nn.GRU(5, 16), torch.randn(6, 30, 5)
    with grutrace.trace(layer, record=EVERYTHING, check="raise") as trace:
        layer(x)
        layer.bfloat16()
        layer(x.bfloat16())
    assert trace.calls["weights"].tolist() == [0, 1]
    assert all(result.holds for result in verify(trace))


def test_a_module_converted_to_a_larger_type_warns_of_rounding() -> None:
    layer, x = nn.GRU(5, 16), torch.randn(6, 30, 5)
    with grutrace.trace(layer, record=EVERYTHING, check="raise") as trace:
        layer.double()
        with pytest.warns(grutrace.GrutraceWarning, match="the model computes in float64 by now"):
            layer(x.double())
        layer(x.double())
    assert trace["l0"].update.dtype == np.float32
    assert all(result.holds for result in verify(trace))
