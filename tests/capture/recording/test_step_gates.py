"""The kernel's own gates of calls of one step, kept where the kernel computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.recording import journal, series_buffer, site_recorder
from grutrace.gru import kernel_gates
from grutrace.gru.replay import GateReplay
from grutrace.native.library import load
from grutrace.records import GATES
from tests import oracles

pytestmark = pytest.mark.skipif(load() is None, reason="there is no compiled library")


@pytest.fixture
def patient(monkeypatch) -> None:
    """Calls wait until something asks for them."""
    monkeypatch.setattr(journal, "MAX_SECONDS", 1e9)
    monkeypatch.setattr(journal, "IDLE_SECONDS", 1e9)


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """The replays that take place."""
    found: list[str] = []
    for owner, name in ((GateReplay, "replay"), (site_recorder, "replay_calls")):
        plain = getattr(owner, name)

        def counted(*arguments: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            found.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)
    return found


def decode(form: str, model: nn.Module, inputs: torch.Tensor) -> None:
    """Call a model once per step."""
    state = None
    for x in inputs:
        if form == "unbatched":
            x = x[0]
        if form == "time-major":
            state = model(x[None], state)[1]
        elif form == "batch_first":
            state = model(x[:, None], state)[1]
        else:
            state = model(x, state)


FORMS = ["cell", "unbatched", "time-major", "batch_first"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_they_are_the_gates_of_the_equations(form, grad, dtype, bias, patient, replays) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"bias": bias, "dtype": dtype}
    if form in ("cell", "unbatched"):
        model: nn.GRU | nn.GRUCell = nn.GRUCell(3, 19, **options)
    else:
        model = nn.GRU(3, 19, batch_first=form == "batch_first", **options)
    inputs = torch.randn(40, 5, 3, dtype=dtype)
    with torch.set_grad_enabled(grad), grutrace.trace(model, gates="inline") as trace:
        decode(form, model, inputs)
    assert replays == []
    (name,) = trace.sites
    site, weights = trace[name], oracles.weights_of(model, name)
    for sequence in range(len(site)):
        row = site.sequence(sequence)
        x = inputs[:, sequence].numpy()
        expected = oracles.gates(weights, x, row.previous, torch.finfo(dtype).eps)
        for name in (*GATES, "hidden"):
            off = np.abs(getattr(row, name) - expected.values[name])
            assert (off <= expected.bounds[name]).all(), name
    assert 0 <= site.residual <= 1e-15 if dtype is torch.float64 else 1e-6
    assert set(trace.calls["proof"]) == {"proven"}


def test_they_are_the_bits_of_the_kernel(patient, replays) -> None:
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 19), torch.randn(40, 5, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="inline") as trace:
        decode("cell", cell, inputs)
    # With gradients, autograd keeps the gates that the kernel used.
    state = torch.zeros(5, 19)
    for step, x in enumerate(inputs):
        result = cell(x, state)
        (kept,) = oracles.harvest_layers(result.grad_fn, 19)
        for name in GATES:
            actual = np.asarray(getattr(trace["cell"], name)).reshape(40, 5, 19)[step]
            assert (actual == kept[name].detach().numpy()).all(), (step, name)
        state = result.detach()


@pytest.mark.parametrize("record", ["update", "reset", "candidate", ("hidden", "reset"), "hidden"])
def test_only_what_is_recorded_is_in_the_trace(record, patient, replays) -> None:
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 8), torch.randn(20, 5, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="inline") as everything:
        decode("cell", cell, inputs)
    with torch.no_grad(), grutrace.trace(cell, gates="inline", record=record) as trace:
        decode("cell", cell, inputs)
    names = {record} if isinstance(record, str) else {*record}
    for name in names:
        np.testing.assert_array_equal(
            np.asarray(getattr(trace["cell"], name)), np.asarray(getattr(everything["cell"], name))
        )
    assert trace["cell"].residual == everything["cell"].residual


def test_control_other_memory_is_noticed(monkeypatch, patient) -> None:
    plain = kernel_gates.keep_step_gates

    def wrong(*arguments: Any) -> Any:
        result, gates = plain(*arguments)
        return result, gates._replace(candidate=gates.candidate.clone().mul_(0.9))

    monkeypatch.setattr(kernel_gates, "keep_step_gates", wrong)
    cell = nn.GRUCell(3, 8)
    with (
        torch.no_grad(),
        pytest.warns(grutrace.ResidualWarning, match="replayed states differ"),
        grutrace.trace(cell, gates="inline") as trace,
    ):
        decode("cell", cell, torch.randn(20, 5, 3))
    assert "proven" not in trace.calls["proof"]


def test_where_the_kernel_adds_otherwise_the_gates_are_replayed(
    monkeypatch, patient, replays
) -> None:
    monkeypatch.setattr(kernel_gates, "keep_step_gates", lambda kernel, *_: (kernel(), None))
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 8), torch.randn(20, 5, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="inline", check="raise") as trace:
        decode("cell", cell, inputs)
    assert replays
    assert len(trace.calls) == 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_recorded_as_single_calls_record_them(
    value, monkeypatch, patient
) -> None:
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 8), torch.randn(20, 5, 3)
    inputs[7, 2, 1] = value

    def traced() -> Any:
        with torch.no_grad(), grutrace.trace(cell, gates="inline") as trace:
            decode("cell", cell, inputs)
        return trace

    together = traced()
    monkeypatch.setattr(journal, "can_join_series", lambda _: False)
    single = traced()
    for name in (*GATES, "hidden"):
        np.testing.assert_array_equal(
            np.asarray(getattr(together["cell"], name)), np.asarray(getattr(single["cell"], name))
        )
    np.testing.assert_array_equal(together.calls["proof"], single.calls["proof"])


def test_weights_are_compared_where_that_is_cheap_or_the_calls_are_recorded(
    monkeypatch, patient
) -> None:
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 8, bias=False).requires_grad_(False), torch.randn(20, 5, 3)
    monkeypatch.setattr("grutrace.capture.recording.weight_versions.SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr("grutrace.capture.recording.weight_versions.MAX_COMPARE_FRACTION", 0.0)
    monkeypatch.setattr(
        "grutrace.capture.recording.weight_versions._WeightFingerprint.has_sample_of",
        lambda *_: True,
    )
    with torch.no_grad(), grutrace.trace(cell, gates="inline") as trace:
        decode("cell", cell, inputs)
        cell.weight_ih.data[3] += 2
        decode("cell", cell, inputs)
    # The kernel's own gates tell the version, also from a state of zeros, where the states do not.
    assert trace.calls["weights"].tolist() == [0] * 20 + [1] * 20
    assert set(trace.calls["proof"]) == {"proven"}


def test_nothing_of_the_kernel_is_kept_alive(patient) -> None:
    cell = nn.GRUCell(3, 8)
    with torch.no_grad(), grutrace.trace(cell, gates="inline") as trace:
        decode("cell", cell, torch.randn(20, 5, 3))
        waiting = [
            group.series[0]._template
            for group in trace._journal._entries
            if isinstance(group, series_buffer.SeriesGroup)
        ]
    assert waiting
    assert all(run.step_gates is None and run.gates is None for run in waiting)
