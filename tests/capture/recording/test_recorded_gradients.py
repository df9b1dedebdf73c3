"""Gradients that are recorded in training: exact, whenever and however backward runs."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.capture.recording import journal
from grutrace.errors import GrutraceWarning, NotRecordedError, OptionError
from tests.capture.differentiable.lattice import (
    LATTICE,
    Kind,
    Problem,
    joined_gradients,
    leaf_gradients,
)
from tests.capture.differentiable.test_differentiable_trace import FORMS, InPlace
from tests.capture.differentiable.test_gates_in_the_graph import (
    decoder_loop,
    gradient_of,
    make_decoder,
)

TOLERANCE = 1e-10
QUANTITIES = ("reset", "update", "candidate", "hidden", "input")
GATES = ("reset", "update", "candidate")
RECORD = ("update", "gradient")


def difference(rows: Any, expected: Tensor) -> float:
    found = np.asarray(rows)
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.detach().numpy()).max())


@pytest.mark.parametrize("kind", LATTICE, ids=str)
@pytest.mark.parametrize("uses", ["both", "output", "final"])
def test_gradients_equal_autograds_of_a_python_loop(kind: Kind, uses: str, tmp_path: Path) -> None:
    problem = Problem(kind)
    with grutrace.trace(problem.layer, tmp_path / "run.h5", record=RECORD):
        problem.run(uses=uses)[0].backward()
    loss, *_, loops, _ = problem.loop(uses=uses)
    loss.backward()
    with grutrace.open(tmp_path / "run.h5") as trace:
        for suffix in problem.suffixes:
            site, of_site = trace[suffix], loops[suffix]
            for name in QUANTITIES:
                expected = joined_gradients(of_site, name)
                assert difference(site.gradient(name), expected) < TOLERANCE
            for name in GATES:
                expected = joined_gradients(of_site, f"{name}_preactivation")
                assert difference(site.gradient(name, preactivation=True), expected) < TOLERANCE
            # Some rows, in any order, and some columns.
            rows, expected = [2, 0, 1], joined_gradients(of_site, "hidden")
            if len(expected) > 2:
                found = site.gradient("hidden")[rows, 1:]
                assert difference(found, expected[rows, 1:]) < TOLERANCE
        assert all(check.holds for check in verify(trace))


def test_control_what_arrives_is_not_the_total() -> None:
    problem = Problem(Kind("padded"))
    with grutrace.trace(problem.layer, record=RECORD) as trace:
        problem.run()[0].backward()
    loss, *_, loops, _ = problem.loop()
    loss.backward()
    expected = joined_gradients(loops["l0"], "hidden")
    assert difference(trace["l0"]["gradient"], expected) > 1e-3


@pytest.mark.parametrize("kind", LATTICE, ids=str)
def test_the_models_gradients_are_the_same_bits(kind: Kind) -> None:
    problem = Problem(kind, dtype=torch.float32)
    untouched = copy.deepcopy(problem.layer)
    expected, inputs, initial = problem.run(untouched)
    expected.backward()
    expected_gradients = leaf_gradients(untouched, inputs, initial)
    with grutrace.trace(problem.layer, record=RECORD):
        loss, inputs, initial = problem.run()
        loss.backward()
    found = [gradient.clone() for gradient in leaf_gradients(problem.layer, inputs, initial)]
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, found, expected_gradients))
    # The control: a loss that differs a little is seen.
    problem.layer.zero_grad()
    with grutrace.trace(problem.layer, record=RECORD):
        loss, inputs, initial = problem.run()
        (1.001 * loss).backward()
    found = leaf_gradients(problem.layer, inputs, initial)
    assert not all(map(torch.equal, found, expected_gradients))


@pytest.mark.parametrize("kind", ["cell", "layer"])
@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_a_decoder_step_by_step(kind: str, detach: bool) -> None:
    model, layers, x, h = make_decoder(kind)
    with grutrace.trace(model, record=RECORD) as trace:
        states = model(x, h, 5, detach=detach)
        torch.stack([state.pow(3).sum() for state in states]).sum().backward()
    expected_loss, steps = decoder_loop(model, x, h, 5, layers, detach=detach)
    expected_loss.backward()
    for layer in range(layers):
        site = trace["rnn.cell" if kind == "cell" else f"rnn.l{layer}"]
        for name in QUANTITIES:
            expected = torch.cat([gradient_of(step[layer][name]) for step in steps])
            assert difference(site.gradient(name), expected) < TOLERANCE
        expected = torch.stack([gradient_of(step[layer]["update"])[1] for step in steps])
        assert difference(site.sequence(1).gradient("update"), expected) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_in_place_changes_by_the_model(form: str) -> None:
    torch.manual_seed(0)
    model = InPlace(form).double()
    plain = copy.deepcopy(model)
    plain.in_place = False
    x = torch.randn(5, 5, 3, dtype=torch.float64)
    found = []
    for each in (model, plain):
        with grutrace.trace(each, record=RECORD) as trace:
            each(x).backward()
        found.append([np.asarray(trace[name].gradient("update")) for name in trace.sites])
    for a, b in zip(*found, strict=True):
        assert np.abs(a - b).max() < 1e-12


def total_gradients(layer: nn.GRU, x: Tensor) -> np.ndarray:
    """What a trace of one call and its backward gives."""
    layer = copy.deepcopy(layer)
    with grutrace.trace(layer, record=RECORD) as trace:
        layer(x)[0].square().sum().backward()
    return np.asarray(trace["l0"].gradient("hidden"))


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_backward_in_another_order_and_never(path: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    inputs = [torch.randn(steps, 2, 3) for steps in (3, 4, 5)]
    with grutrace.trace(layer, path and tmp_path / path, record=RECORD) as trace:
        losses = [layer(x)[0].square().sum() for x in inputs]
        with torch.no_grad():
            layer(inputs[0])
        losses[2].backward()
        losses[0].backward()
        rows = np.asarray(trace["l0"].gradient("hidden"))
        parts = np.split(rows, np.cumsum([6, 8, 10]))
        for number in (0, 2):
            np.testing.assert_array_equal(parts[number], total_gradients(layer, inputs[number]))
        assert np.isnan(parts[1]).all()
        assert np.isnan(parts[3]).all()
        assert not np.isnan(np.asarray(trace["l0"].update)).any()


def test_twice_adds_and_partly_is_what_arrived() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2).double()
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    with grutrace.trace(layer, record=RECORD) as trace:
        loss = layer(x)[0].square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    once = grutrace.trace(layer, record=RECORD)
    with once:
        layer(x)[0].square().sum().backward()
    for name in trace.sites:
        twice = np.asarray(trace[name].gradient("update"))
        np.testing.assert_allclose(twice, 2 * np.asarray(once[name].gradient("update")))
    # A loss of the lower layer's final state alone reaches nothing above it.
    with grutrace.trace(layer, record=RECORD) as trace:
        layer(x)[1][0].sum().backward()
    assert not np.asarray(trace["l1"].gradient("hidden")).any()
    assert np.asarray(trace["l0"].gradient("hidden")).all()


def test_backward_after_the_trace_in_memory_was_closed() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4), torch.randn(3, 2, 3)
    with grutrace.trace(layer, record=RECORD) as trace:
        loss = layer(x)[0].square().sum()
    loss.backward()
    rows = np.asarray(trace["l0"].gradient("hidden"))
    np.testing.assert_array_equal(rows, total_gradients(layer, x))


@pytest.mark.parametrize("early", ["read", "flush", "close"])
def test_gradients_after_a_call_was_stored_are_said(early: str, tmp_path: Path) -> None:
    layer = nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, tmp_path / "run.h5", record=RECORD)
    tracer.start()
    loss = layer(torch.randn(3, 2, 3))[0].square().sum()
    if early == "read":
        _ = tracer["l0"].update[:]
    else:
        getattr(tracer, early)()
    loss.backward()
    with pytest.warns(GrutraceWarning, match=r"already stored.*after backward\(\)"):
        rows = tracer["l0"].gradient("hidden")[:]
    assert np.isnan(rows).all()
    tracer.close()


def test_a_training_run_uses_the_weights_of_each_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, batch_first=True).double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    batches = torch.randn(6, 2, 5, 3, dtype=torch.float64)
    expected: dict[str, list[Any]] = {"l0": [], "l1": []}
    for x in batches:
        optimizer.zero_grad()
        with grutrace.trace(layer, differentiable=True) as trace:
            loss = layer(x)[1].square().sum()
            for name, rows in expected.items():
                rows.append(trace[name].gradient("update", of=loss))
        loss.backward()
        optimizer.step()
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, batch_first=True).double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with grutrace.trace(layer, tmp_path / "run.h5", record=("hidden", "gradient")):
        for x in batches:
            optimizer.zero_grad()
            layer(x)[1].square().sum().backward()
            optimizer.step()
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert len(set(trace.calls["weights"])) == 6
        assert all(check.holds for check in verify(trace))
        for name, rows in expected.items():
            assert difference(trace[name].gradient("update"), torch.cat(rows)) < TOLERANCE


def test_a_file_and_memory_hold_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, bidirectional=True)
    with (
        grutrace.trace(layer, record=RECORD) as memory,
        grutrace.trace(layer, tmp_path / "run.h5", record=RECORD) as file,
    ):
        layer(torch.randn(5, 2, 3))[0].square().sum().backward()
        memory.save(tmp_path / "saved.h5")
        with grutrace.open(tmp_path / "saved.h5") as saved:
            for name in memory.sites:
                for trace in (file, saved):
                    for rows in ("gradient", "hidden"):
                        np.testing.assert_array_equal(memory[name][rows], trace[name][rows])
                    np.testing.assert_array_equal(
                        memory[name].gradient("update"), trace[name].gradient("update")
                    )


def test_recorded_gradients_keep_no_graph_alive() -> None:
    layer = nn.GRU(3, 4)
    alive = []
    with grutrace.trace(layer, record=RECORD) as trace:
        for _ in range(5):
            output = layer(torch.randn(5, 2, 3, requires_grad=True))[0]
            node = torch.ones((), requires_grad=True).square()
            (output.square().sum() * node).backward()
            alive.append(weakref.ref(node))
            # A call without a backward pass: its graph goes with its output.
            unused = layer(torch.randn(5, 2, 3))[0]
            del output, node, unused
        gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert len(trace.calls) == 10


def test_calls_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_WAITING_BYTES", 20_000)
    layer = nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, record=RECORD, buffer=1000)
    with tracer:
        for _ in range(100):
            layer(torch.randn(5, 2, 3))
        assert tracer._journal.nbytes < 25_000
    assert len(tracer.calls) == 100


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with grutrace.trace(layer, record=RECORD) as trace:
        output = checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)
        output.square().sum().backward()
        if reentrant:
            with pytest.warns(GrutraceWarning, match="use_reentrant=False"):
                rows = np.asarray(trace["l0"].gradient("hidden"))
            assert np.isnan(rows).all()
        else:
            rows = np.asarray(trace["l0"].gradient("hidden"))
            np.testing.assert_allclose(rows, total_gradients(layer, x.detach()), atol=1e-6)
    assert len(trace.calls) == 1


def test_a_scaled_loss_is_stored_as_it_arrives() -> None:
    """As with a GradScaler, which multiplies the loss."""
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4), torch.randn(3, 2, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with grutrace.trace(layer, record=RECORD) as trace:
        scaler.scale(layer(x)[0].square().sum()).backward()
    rows = np.asarray(trace["l0"].gradient("hidden"))
    np.testing.assert_allclose(rows, 1024 * total_gradients(layer, x), rtol=1e-5)


def test_gradients_under_an_intervention_are_refused_by_name() -> None:
    layer = nn.GRU(3, 4)
    with (
        grutrace.trace(layer, record=RECORD, gates="inline") as trace,
        grutrace.intervene(layer, "l0", update=0.5),
    ):
        layer(torch.randn(3, 2, 3))[0].sum().backward()
        with pytest.warns(GrutraceWarning, match="whose gates an intervention set"):
            rows = np.asarray(trace["l0"].gradient("update"))
    assert np.isnan(rows).all()


def test_gradients_of_layers_that_run_again_are_said() -> None:
    layer = nn.GRU(3, 4, 2)
    with grutrace.trace(layer, stacks="rerun"), grutrace.trace(layer, record=RECORD) as trace:
        layer(torch.randn(3, 2, 3))[0].sum().backward()
        with pytest.warns(GrutraceWarning, match="lower layers of the model"):
            trace.flush()


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"gates": "background"}, "'deferred' or 'inline', .*; found 'background'$"),
        ({"stacks": "rerun"}, "'split' or 'auto', .*; found 'rerun'$"),
        ({"check": "raise"}, "'warn' or 'off', .*; found 'raise'$"),
        ({"max_calls": 3}, "found 3. Record fewer calls"),
        ({"max_bytes": 300_000}, "found 300000. Record fewer calls"),
        ({"units": [0]}, r"site.gradient\('update'\)\[:, units\]"),
        ({"units": [0], "gates": "inline"}, r"site.gradient\('update'\)\[:, units\]"),
        ({"steps": slice(2)}, r"sequence.gradient\('update'\)\[steps\]"),
        ({"sink": grutrace.Statistics()}, r"grutrace.Statistics.of\(trace\)"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_with_an_alternative(
    options: dict[str, Any], instead: str
) -> None:
    with pytest.raises(OptionError, match=f"with record='gradient' expected .*{instead}"):
        grutrace.trace(nn.GRU(3, 4), record=RECORD, **options)


def test_inline_gates_go_with_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4), torch.randn(3, 2, 3)
    with grutrace.trace(layer, tmp_path / "run.h5", record=RECORD, gates="inline") as trace:
        layer(x)[0].square().sum().backward()
        assert trace["l0"].residual < 1e-6
        rows = np.asarray(trace["l0"].gradient("hidden"))
    np.testing.assert_allclose(rows, total_gradients(layer, x), atol=1e-6)


def test_what_was_not_recorded_is_one_clear_error() -> None:
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(3, 2, 3))
    with pytest.raises(NotRecordedError, match="'gradient' was not recorded at 'l0'"):
        trace["l0"].gradient("update")
    with grutrace.trace(layer, record=("gradient",)) as trace:
        layer(torch.randn(3, 2, 3))[0].sum().backward()
    assert trace["l0"].site.quantities == ("hidden", "input", "gradient")
    with pytest.raises(OptionError, match="did you mean 'update'"):
        trace["l0"].gradient("updat")


def test_empty_batches_and_single_steps() -> None:
    layer = nn.GRU(3, 4, batch_first=True)
    with grutrace.trace(layer, record=RECORD) as trace:
        layer(torch.randn(0, 5, 3))[0].sum().backward()
        layer(torch.randn(2, 1, 3))[0].sum().backward()
    assert np.asarray(trace["l0"].gradient("update")).shape == (2, 4)
