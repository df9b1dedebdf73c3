"""Tests of deferred gates: recomputed values equal the values that inline gates store."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.overrides import TorchFunctionMode

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.gru.replay import GateReplay
from grutrace.records import GATES
from grutrace.storage.read.recomputed import SiteGateInputs
from tests import oracles
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import EVERYTHING, check_untouched_and_exact, rounding
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases
from tests.test_both_sinks import run


def assert_equal_to_rounding(inline: Any, deferred: Any, quantities=EVERYTHING) -> None:
    """Compare two traces of the same run; the gates within each call's tolerance."""
    assert inline.sites == deferred.sites
    assert inline.sequences.tolist() == deferred.sequences.tolist()
    for name in inline.sites:
        one, other = inline[name], deferred[name]
        allowed = rounding(one, other)
        for quantity in quantities:
            stored, derived = np.asarray(one.rows(quantity)), np.asarray(other.rows(quantity))
            assert stored.dtype == derived.dtype == other.rows(quantity).dtype
            assert stored.shape == derived.shape == other.rows(quantity).shape
            if quantity in GATES:
                assert (np.abs(stored.astype(float) - derived) <= allowed).all(), (name, quantity)
                continue
            np.testing.assert_array_equal(stored, derived)
        np.testing.assert_array_equal(one.initial, other.initial)


def test_the_forward_computes_no_gates(monkeypatch) -> None:
    monkeypatch.setattr(GateReplay, "replay", None)
    layer = nn.GRU(2, 3, 2)
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(torch.randn(4, 2))
    assert trace["l1"].update.shape == (4, 3)
    with pytest.raises(TypeError), grutrace.trace(layer, gates="inline"):
        layer(torch.randn(4, 2))


# -- the lattice ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_lattice_in_memory(case: Case) -> None:
    check_untouched_and_exact(case, gates="deferred")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases())
def test_the_lattice_in_a_file(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "run.h5"
    check_untouched_and_exact(case, gates="deferred", path=path, mode="overwrite")
    with grutrace.open(path) as trace:
        for item in verify(trace):
            assert (item.check, item.holds) == ("derived", True), item


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_lattice_inline_and_deferred(case: Case) -> None:
    with (
        grutrace.trace(case.layer, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(case.layer, record=EVERYTHING, gates="deferred") as deferred,
    ):
        case.run()
    assert_equal_to_rounding(inline, deferred)
    for item in verify(deferred):
        assert (item.check, item.holds) == ("derived", True), item


# -- chaos ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_chaotic_network(tmp_path, bidirectional) -> None:
    """Recomputed gates are right. Control: a free run from the first state diverges."""
    torch.manual_seed(0)
    layer = nn.GRU(8, 64, 2, bidirectional=bidirectional).requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if "weight_hh" in name:
            parameter.normal_(0, 3)
    x, path = torch.randn(500, 2, 8), tmp_path / "run.h5"
    with grutrace.trace(layer, path, gates="deferred"):
        layer(x)
    with grutrace.open(path) as trace:
        assert all(result.holds for result in verify(trace))
        for name in trace.sites:
            site = trace[name]
            sequence, weights = site.sequence(1), site.weights()
            read = site.gate_inputs.input(np.arange(500, 1000))
            expected = oracles.gates(weights, read, sequence.previous, 2.0**-23)
            for gate in GATES:
                off = np.abs(sequence.rows(gate) - expected.values[gate])
                assert (off <= expected.bounds[gate]).all()
                assert off.max() < 1e-4
            for dtype in ("f4", "f8"):
                free = free_run(weights, read, sequence.initial, site.site.reverse, dtype)
                assert np.abs(free["update"] - sequence.update).max() > 0.5


def free_run(weights, x, initial, reverse, dtype) -> dict[str, np.ndarray]:
    """The gates of one sequence by running the recurrence again."""
    state, steps = initial[np.newaxis].astype(dtype), []
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    for row in x[::-1] if reverse else x:
        steps.append(numpy_step(weights, row[np.newaxis].astype(dtype), state))
        state = steps[-1]["hidden"]
    steps = steps[::-1] if reverse else steps
    return {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}


def numpy_step(weights, x, previous) -> dict[str, np.ndarray]:
    read = np.split(x @ weights["weight_ih"].T + weights["bias_ih"], 3, axis=1)
    recurrent = np.split(previous @ weights["weight_hh"].T + weights["bias_hh"], 3, axis=1)
    reset, update = (oracles.sigmoid(a + b) for a, b in zip(read[:2], recurrent[:2], strict=True))
    candidate = np.tanh(read[2] + reset * recurrent[2])
    hidden = (1 - update) * candidate + update * previous
    return {"reset": reset, "update": update, "candidate": candidate, "hidden": hidden}


# -- what is stored ---------------------------------------------------------------------------


def test_what_is_stored_and_what_is_derived() -> None:
    def sites(layer, **options):
        trace = grutrace.Tracer(layer, gates="deferred", **options)
        return {name: (trace[name].site.quantities, trace[name].site.derived) for name in trace}

    assert sites(nn.GRU(2, 3, 2)) == {
        "l0": (("hidden", "input"), GATES),
        "l1": (("hidden",), GATES),
    }
    assert sites(nn.GRU(2, 3, 2), record="update")["l1"] == (("hidden",), ("update",))
    assert sites(nn.GRU(2, 3, 2), record=EVERYTHING)["l1"] == (("hidden",), (*GATES, "input"))
    assert sites(nn.GRU(2, 3, 2, dropout=0.1))["l1"] == (("hidden", "input"), GATES)
    assert sites(nn.GRU(2, 3, 2), sites="l1")["l1"] == (("hidden", "input"), GATES)
    both = nn.GRU(2, 3, 2, bidirectional=True)
    assert sites(both)["l1_reverse"] == (("hidden",), GATES)
    assert sites(both, sites=["l0", "l1"])["l1"] == (("hidden", "input"), GATES)
    assert sites(nn.GRUCell(2, 3))["cell"] == (("hidden", "input"), GATES)
    assert sites(nn.GRU(2, 3), record="hidden")["l0"] == (("hidden",), ())
    with pytest.raises(
        grutrace.OptionError, match="gates: expected one of auto, inline, background, deferred"
    ):
        grutrace.Tracer(both, gates="later")


@pytest.mark.parametrize("globs", ["*1", ["l0", "l1*"], "l2_reverse"])
def test_part_of_the_sites(globs) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 3, bidirectional=True)
    with (
        grutrace.trace(layer, record=EVERYTHING, sites=globs) as inline,
        grutrace.trace(layer, record=EVERYTHING, sites=globs, gates="deferred") as deferred,
    ):
        layer(torch.randn(6, 2, 3))
    assert_equal_to_rounding(inline, deferred)


def test_unrecorded_quantities_are_an_error() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer, gates="deferred", record="update") as trace:
        layer(torch.randn(4, 2))
    assert trace["l0"].update.shape == (4, 3)
    with pytest.raises(grutrace.NotRecordedError, match="recorded: update, hidden, input"):
        _ = trace["l0"].reset
    assert "4 steps of update, hidden, input" in repr(trace["l0"])


# -- whole runs -------------------------------------------------------------------------------


def test_a_training_run_inline_and_deferred(tmp_path) -> None:
    """Dropout, weights that change within the run, packed and stepwise, an empty batch."""
    torch.manual_seed(1)
    model, path = EncoderDecoder(layers=2, dropout=0.3), tmp_path / "run.h5"
    options = {"record": EVERYTHING, "gates": "deferred"}
    with (
        grutrace.trace(model, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(model, **options) as memory,
        grutrace.trace(model, path, **options) as file,
    ):
        run(model, inline, memory, file)
        assert_equal_to_rounding(inline, memory)
        assert_equal_to_rounding(inline, file)
    with grutrace.open(path) as opened:
        assert max(opened.calls["weights"]) > 0
        assert_equal_to_rounding(inline, opened)
        for name in opened.sites:
            for number, sequence in enumerate(opened[name]):
                other = inline[name].sequence(number)
                np.testing.assert_allclose(sequence.update, other.update, atol=1e-6)
                np.testing.assert_array_equal(sequence.previous, other.previous)
            padded, lengths = opened[name].padded("candidate")
            expected, same = inline[name].padded("candidate")
            np.testing.assert_allclose(padded, expected, atol=1e-6)
            np.testing.assert_array_equal(lengths, same)
        assert all(result.check == "derived" and result.holds for result in verify(opened))


def test_control_the_input_after_dropout_must_be_recorded(monkeypatch) -> None:
    monkeypatch.setattr("grutrace.capture.selection._input_is_recorded", lambda *_: True)
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, dropout=0.5)
    with (
        pytest.warns(grutrace.GrutraceWarning, match="what it reads is not kept"),
        grutrace.trace(layer, gates="deferred"),
    ):
        layer(torch.randn(6, 2, 3))


def test_dropout_enabled_after_attaching_is_reported() -> None:
    layer = nn.GRU(3, 4, 2)
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(torch.randn(6, 2, 3))
        layer.dropout = 0.5
        layer(torch.randn(6, 2, 3))
        with pytest.warns(grutrace.GrutraceWarning, match=r"not recorded: l1 had no dropout"):
            trace.flush()
        layer.eval()(torch.randn(6, 2, 3))
    assert len(trace.calls) == 2
    assert all(result.holds for result in verify(trace))


def test_stepwise_decoding_with_a_shrinking_batch(tmp_path) -> None:
    torch.manual_seed(0)
    model, cell = StepwiseDecoder(2), nn.GRUCell(4, 6)
    both = nn.ModuleDict({"decoder": model, "cell": cell})
    with (
        torch.no_grad(),
        grutrace.trace(both, record=EVERYTHING) as inline,
        grutrace.trace(both, tmp_path / "a.h5", record=EVERYTHING, gates="deferred") as deferred,
    ):
        model(torch.randn(1, 3, 4), torch.randn(2, 3, 6), 5)
        state = torch.randn(4, 6)
        for rows in ([0, 1, 2, 3], [2, 0, 3], [1, 1, 0], [0, 1]):
            state = cell(torch.randn(len(rows), 4), state[rows])
    assert inline.sequences["pieces"].max() > 2
    assert_equal_to_rounding(inline, deferred)
    for name in deferred.sites:
        for number, sequence in enumerate(deferred[name]):
            np.testing.assert_allclose(
                sequence.candidate, inline[name].sequence(number).candidate, atol=1e-6
            )
    assert all(result.holds for result in verify(deferred))


def test_appending(tmp_path) -> None:
    torch.manual_seed(0)
    layer, path = nn.GRU(3, 4, 2), tmp_path / "run.h5"
    with grutrace.trace(layer, record=EVERYTHING) as inline:
        for mode in ("w", "a"):
            with grutrace.trace(
                layer, path, mode=mode, record=EVERYTHING, gates="deferred"
            ) as file:
                layer(torch.randn(5, 2, 3))
            with torch.no_grad():
                layer.weight_hh_l0 += 1
    assert_equal_to_rounding(inline, file)
    assert all(result.holds for result in verify(file))
    with pytest.raises(grutrace.TraceFileError, match=r"quantities of site 'l0'"):
        grutrace.Tracer(layer, path, mode="a", record=EVERYTHING)


def test_reading_while_it_grows() -> None:
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(torch.randn(5, 2, 3))
        site, before = trace["l0"], trace["l0"].update
        first = before[:]
        layer(torch.randn(5, 2, 3))
        assert (len(before), len(site.update)) == (10, 20)
        np.testing.assert_array_equal(site.update[:10], first)


# -- types ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        *((dtype, None) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        *((torch.float32, cast) for cast in (torch.bfloat16, torch.float16)),
        (torch.float64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", ["stack", "cell"])
def test_every_type_and_autocast(kind, dtype, cast, tmp_path) -> None:
    """Gates are derived in the kernel's type, whatever type stores the rows."""
    torch.manual_seed(0)
    layer = nn.GRUCell(5, 16) if kind == "cell" else nn.GRU(5, 16, 3, bidirectional=True)
    x = torch.randn(6, 5) if kind == "cell" else torch.randn(6, 4, 5)
    layer, x = layer.to(dtype), x.to(dtype)
    with (
        grutrace.trace(layer, record=EVERYTHING, check="raise") as inline,
        grutrace.trace(layer, tmp_path / "run.h5", gates="deferred", record=EVERYTHING) as deferred,
        torch.autocast("cpu", dtype=cast) if cast else nullcontext(),
    ):
        layer(x)
        # Reading in the middle of a model's run is not what the model does.
        during = {name: deferred[name].update[:] for name in deferred.sites}
    assert_equal_to_rounding(inline, deferred)
    for name in deferred.sites:
        np.testing.assert_array_equal(during[name], deferred[name].update)
        precision = inline[name].checks["precision"]
        np.testing.assert_array_equal(deferred[name].checks["precision"], precision)
        if precision[0] > 1e-4:
            # What was computed in a half type is a number of that type.
            update = torch.from_numpy(np.asarray(deferred[name].update))
            assert torch.equal(update, update.to(cast or dtype).to(update.dtype))
    assert all(result.holds for result in verify(deferred))


def test_a_module_that_changes_its_type_while_attached() -> None:
    layer, x = nn.GRU(5, 16), torch.randn(6, 3, 5)
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(x)
        layer.bfloat16()
        layer(x.bfloat16())
        layer.double()
        layer(x.double())
        with pytest.warns(grutrace.GrutraceWarning, match="rounded to float32"):
            trace.flush()
    assert trace["l0"].checks["precision"].tolist() == [2.0**-23, 2.0**-7, 2.0**-52]
    half = torch.from_numpy(trace["l0"].update[18:36])
    assert torch.equal(half.bfloat16().float(), half)
    assert all(result.holds for result in verify(trace))


class Refusing(TorchFunctionMode):
    """A mode of the user that nothing of ours should meet."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(function)


def test_torch_modes_around_the_reader_change_nothing() -> None:
    layer = nn.GRU(5, 16)
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(torch.randn(6, 3, 5))
    values = trace["l0"].update[:]
    for context in (
        torch.device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu"),
        Refusing(),
    ):
        with context:
            np.testing.assert_array_equal(trace["l0"].update, values)
            assert trace["l0"].preactivation("reset").shape == (18, 16)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(trace["l0"].update, values)
    finally:
        torch.set_default_dtype(torch.float32)


# -- pre-activations --------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_preactivations(gates, tmp_path) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4, 2, bidirectional=True)
    with grutrace.trace(layer, tmp_path / "run.h5", record=EVERYTHING, gates=gates) as trace:
        layer(torch.randn(5, 2, 3))
    for name in trace.sites:
        site = trace[name]
        for gate, function in zip(GATES, (oracles.sigmoid, oracles.sigmoid, np.tanh), strict=True):
            values = site.preactivation(gate)
            np.testing.assert_allclose(function(values[:]), site.rows(gate), atol=1e-6)
            np.testing.assert_array_equal(values[5:], site.sequence(1).preactivation(gate))
    with pytest.raises(grutrace.OptionError, match="expected one of reset, update, candidate"):
        site.preactivation("hidden")


def test_a_saturated_gate_still_has_its_preactivation() -> None:
    layer = nn.GRU(3, 4).requires_grad_(False)
    layer.bias_ih_l0 += 200
    with grutrace.trace(layer, gates="deferred") as trace:
        layer(torch.randn(5, 2, 3))
    assert (trace["l0"].update[:] == 1).all()
    assert len(np.unique(trace["l0"].preactivation("update")[:])) > 10


def test_preactivations_need_input_and_states() -> None:
    layer = nn.GRU(3, 4, 2)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2, 3))
    assert trace["l1"].preactivation("reset").shape == (10, 4)
    with pytest.raises(grutrace.NotRecordedError, match="'l0' has no pre-activations: the input"):
        trace["l0"].preactivation("reset")


# -- reading lazily ---------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many rows were derived, time by time."""
    counts: list[int] = []
    plain = SiteGateInputs.iter_blocks

    def of(self, rows):
        counts.append(len(rows))
        return plain(self, rows)

    monkeypatch.setattr(SiteGateInputs, "iter_blocks", of)
    return counts


@pytest.fixture
def padded(tmp_path) -> Path:
    torch.manual_seed(0)
    layer, path = nn.GRU(3, 4, 2), tmp_path / "run.h5"
    with grutrace.trace(layer, path, record=EVERYTHING, gates="deferred"):
        layer(torch.randn(7, 9, 3))
        layer(torch.randn(5, 2, 3))
    return path


def test_only_requested_gates_are_derived(padded, counted) -> None:
    with grutrace.open(padded) as trace:
        site = trace["l1"]
        assert (site.update.shape, site.update.ndim, len(site.reset)) == ((73, 4), 2, 73)
        assert site.hidden[:].shape == site.input[:].shape == (73, 4)
        assert counted == []
        assert site.sequence(3).update.shape == (7, 4)
        assert site.update[10:12].shape == (2, 4)
        assert site.update[[5, 1, 70]].shape == (3, 4)
        assert counted == [7, 2, 3]
        np.testing.assert_array_equal(site.update, trace["l1"].update[:])


def test_every_kind_of_index(padded) -> None:
    with grutrace.open(padded) as trace:
        for rows in (trace["l1"].candidate, trace["l1"].preactivation("reset"), trace["l1"].input):
            whole = np.asarray(rows)
            mask = np.arange(73) % 5 == 0
            for key in (
                *(3, -1, slice(None), slice(70, 2, -3), slice(0, 0), [4, 4, 0], [], mask, ...),
                *((2, 1), (slice(1, 9), 2), (slice(None), slice(1, 3)), ([5, 2], slice(0, 4, 2))),
                *((slice(3, 9), [3, 0]), ([1, 2], [3, 0]), np.array([72, -73])),
            ):
                np.testing.assert_allclose(rows[key], whole[key], atol=1e-6)
            assert sum(1 for _ in rows) == 73
            for key in (73, "a", (0, 0, 0), [80]):
                with pytest.raises((IndexError, TypeError)):
                    rows[key]


@pytest.mark.parametrize("block", [1, 5000])
def test_block_sizes_do_not_matter(padded, block, monkeypatch) -> None:
    with grutrace.open(padded) as trace:
        whole = {name: trace[name].reset[:] for name in trace.sites}
        monkeypatch.setattr("grutrace.storage.read.recomputed.BLOCK", block)
        for name, values in whole.items():
            np.testing.assert_allclose(trace[name].reset[:], values, atol=1e-6)


def test_the_weights_are_read_once(padded, monkeypatch) -> None:
    with grutrace.open(padded) as trace:
        versions = []
        weights = trace._source.weights
        monkeypatch.setattr(
            trace._source, "weights", lambda *a: versions.append(a[2]) or weights(*a)
        )
        for sequence in trace["l0"]:
            assert sequence.update.shape[1] == 4
        assert versions == [0]


def test_torch_is_imported_only_for_derived_gates(padded) -> None:
    code = (
        f"import sys, grutrace; site = grutrace.open({str(padded)!r})['l1'];"
        "site.hidden[:], site.input[:], site.sequence(2).previous, site.update, site.residual;"
        "stored = 'torch' in sys.modules; site.update[3]; sys.exit(stored or 2 * ('torch' not in "
        "sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the specification ------------------------------------------------------------------------


def test_a_plain_reader_derives_the_same_gates(padded) -> None:
    plain = PlainTrace(padded)
    with grutrace.open(padded) as trace:
        for suffix, site in plain.modules[0].sites.items():
            assert site.derived == (("reset", "update", "candidate") + ("input",) * site.layer)
            for number in range(plain.modules[0].count):
                for quantity in EVERYTHING:
                    np.testing.assert_allclose(
                        site.derive(number, quantity),
                        trace[suffix].sequence(number).rows(quantity),
                        atol=1e-6,
                    )
