"""`record` and `units`: what is recorded is that part of the whole, and only that is computed."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn.functional import linear

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.gru.layout import PaddedLayout
from grutrace.gru.replay import (
    CHECK_UNITS,
    ColumnSelector,
    GateReplay,
    PartialReplay,
    evenly_spaced,
)
from grutrace.records import GATES
from tests import oracles
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import EVERYTHING, rounding, same_result
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases
from tests.test_both_sinks import run as run_model


@st.composite
def parts(draw: st.DrawFn, hidden_size: int) -> tuple[Any, list[int]]:
    """Units as they can be asked for, and their numbers."""
    every = list(range(hidden_size))
    if draw(st.booleans()):
        asked = draw(st.slices(hidden_size).filter(lambda units: every[units]))
        return asked, every[asked]
    numbers = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    signs = draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    asked = [n - hidden_size if sign else n for n, sign in zip(numbers, signs, strict=True)]
    return asked, numbers


subsets = st.lists(st.sampled_from(EVERYTHING), min_size=1, unique=True)


def assert_part(part: Any, whole: Any, units: list[int]) -> None:
    """Compare a trace of some quantities of some units with that of all, site by site."""
    assert part.sites == whole.sites
    assert part.sequences.tolist() == whole.sequences.tolist()
    for name in part.sites:
        one, other = part[name], whole[name]
        allowed = rounding(one, other)
        for quantity in one.site.available_quantities:
            actual, expected = np.asarray(one.rows(quantity)), np.asarray(other.rows(quantity))
            expected = expected if quantity == "input" else expected[:, units]
            assert actual.dtype == expected.dtype
            if quantity in GATES:
                assert actual.shape == expected.shape
                np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
                assert (np.abs(actual.astype(float) - expected) <= allowed).all(), (name, quantity)
            else:
                np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(one.initial, np.asarray(other.initial)[:, units])
        assert one.units == (None if units == list(range(one.module.hidden_size)) else tuple(units))
        assert one.residual <= one.checks["tolerance"].max(initial=0)
        if "hidden" in one.site.quantities:
            for left, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(left.previous, right.previous[:, units])


@settings(max_examples=200, deadline=None)
@given(st.data(), cases(), subsets)
def test_the_lattice(data: st.DataObject, case: Case, record: list[str]) -> None:
    asked, units = data.draw(parts(case.layer.hidden_size))
    expected = case.run(case.untouched())
    with (
        grutrace.trace(case.layer, record=EVERYTHING) as whole,
        grutrace.trace(case.layer, record=record, units=asked, check="raise") as part,
    ):
        assert same_result(expected, case.run())
    assert_part(part, whole, units)
    for result in verify(part):
        assert result.holds, result


@settings(max_examples=60, deadline=None)
@given(st.data(), cases(dtypes=(torch.float16, torch.bfloat16)), subsets)
def test_half_types(data: st.DataObject, case: Case, record: list[str]) -> None:
    asked, units = data.draw(parts(case.layer.hidden_size))
    with (
        grutrace.trace(case.layer, record=EVERYTHING) as whole,
        grutrace.trace(case.layer, record=record, units=asked, check="raise") as part,
    ):
        case.run()
    assert_part(part, whole, units)


@settings(max_examples=100, deadline=None)
@given(st.data(), cases(), st.sampled_from(("float16", "float32")))
def test_with_fewer_digits_too(data: st.DataObject, case: Case, dtype: str) -> None:
    asked, _ = data.draw(parts(case.layer.hidden_size))
    options: Any = {"units": asked, "dtype": dtype, "check": "raise"}
    with grutrace.trace(case.layer, record=EVERYTHING, **options) as trace:
        case.run()
    for result in verify(trace):
        assert result.holds, result


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), cases(), subsets)
def test_a_plain_reader(tmp_path, data: st.DataObject, case: Case, record: list[str]) -> None:
    asked, units = data.draw(parts(case.layer.hidden_size))
    path = tmp_path / "run.h5"
    with (
        grutrace.trace(case.layer, record=record, units=asked) as memory,
        grutrace.trace(case.layer, path, record=record, units=asked, mode="overwrite"),
    ):
        case.run()
    plain = PlainTrace(path).modules[0]
    for name in memory.sites:
        site, own = plain.sites[name], memory[name]
        assert site.units == units
        assert list(site.rows) == list(own.site.quantities)
        for number, sequence in enumerate(own):
            for quantity in own.site.quantities:
                np.testing.assert_array_equal(
                    site.sequence(number, quantity), sequence.rows(quantity)
                )
            if "hidden" in own.site.quantities:
                np.testing.assert_array_equal(site.previous(number), sequence.previous)
    with grutrace.open(path) as file:
        assert [file[name].site for name in file.sites] == [memory[n].site for n in memory.sites]


@settings(max_examples=100, deadline=None)
@given(st.data(), cases())
def test_the_oracle_in_float64(data: st.DataObject, case: Case) -> None:
    """From the weights in the trace, which are whole, and the states of all units."""
    asked, units = data.draw(parts(case.layer.hidden_size))
    with (
        grutrace.trace(case.layer, record=("hidden", "input")) as states,
        grutrace.trace(case.layer, units=asked) as part,
    ):
        case.run()
    for name in part.sites:
        eps = float(np.finfo(part[name].update.dtype).eps)
        for sequence, of in zip(part[name], states[name], strict=True):
            expected = oracles.gates(part[name].weights(), of.input, of.previous, eps)
            for quantity in (*GATES, "hidden"):
                off = np.abs(sequence.rows(quantity) - expected.values[quantity][:, units])
                assert (off <= expected.bounds[quantity][:, units]).all()


def test_a_training_run_to_memory_and_file(tmp_path) -> None:
    """Weights that change, dropout, packed and stepwise, an empty batch."""
    torch.manual_seed(1)
    model, path = EncoderDecoder(layers=2, dropout=0.3), tmp_path / "run.h5"
    options: Any = {"record": ("update", "candidate", "hidden", "input"), "units": [4, -6, 1]}
    with (
        grutrace.trace(model, record=EVERYTHING) as whole,
        grutrace.trace(model, check="raise", **options) as memory,
        grutrace.trace(model, path, **options) as file,
    ):
        run_model(model, whole, memory, file)
    assert max(whole.calls["weights"]) > 0
    assert_part(memory, whole, [4, 0, 1])
    assert_part(file, whole, [4, 0, 1])
    assert [(result.check, result.holds) for result in verify(file)] == [("states", True)] * 3


def test_weights_that_change_behind_the_version_counter() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 20).requires_grad_(False), torch.randn(5, 2, 3)
    with grutrace.trace(layer) as whole, grutrace.trace(layer, units=[3], check="raise") as part:
        layer(x)
        layer.weight_hh_l0.data.mul_(-2)
        layer(x)
        with torch.inference_mode():
            layer.weight_ih_l0.mul_(3)
            layer(x)
    assert_part(part, whole, [3])


def test_inference_tensors_which_have_no_counter() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        layer, x = nn.GRU(3, 20), torch.randn(5, 2, 3)
        with grutrace.trace(layer) as whole, grutrace.trace(layer, units=[7, 3]) as part:
            for _ in range(2):
                layer(x)
                layer.weight_hh_l0[23] += 1
    assert_part(part, whole, [7, 3])


def test_rows_of_the_weights_are_taken_once_a_version(monkeypatch) -> None:
    copies = []
    rows = PartialReplay.rows
    monkeypatch.setattr(PartialReplay, "rows", lambda *args: copies.append(1) or rows(*args))
    layer, x = nn.GRU(3, 4).requires_grad_(False), torch.randn(5, 2, 3)
    with grutrace.trace(layer, units=[1]) as trace:
        layer(x)
        layer(x)
        trace.flush()
        assert len(copies) == 1
        layer.bias_hh_l0 += 1
        layer(x)
        layer(x)
    assert len(copies) == 2


# -- the arithmetic ---------------------------------------------------------------------------


class Counted:
    """The matrix products that replays make: rows of the weight by (steps, columns)."""

    def __init__(self, monkeypatch) -> None:
        self.products: list[tuple[int, int, int]] = []

        def counted(values, weight, bias=None):
            steps = values.numel() // values.shape[-1]
            self.products.append((steps, *weight.shape))
            return linear(values, weight, bias)

        monkeypatch.setattr("grutrace.gru.cell.linear", counted)
        # With the library, the kernel's own gates of one step are kept.
        monkeypatch.setattr("grutrace.capture.recording.module_recorder.load", lambda: None)

    def multiplications(self) -> int:
        return sum(steps * rows * columns for steps, rows, columns in self.products)


T, B, INPUT, H = 10, 3, 24, 40


@pytest.fixture
def counted(monkeypatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 3 * H),
        ({"record": EVERYTHING}, 3 * H),
        ({"record": "update"}, H + 2 * CHECK_UNITS),
        ({"record": "reset"}, H + 2 * CHECK_UNITS),
        ({"record": "candidate"}, 2 * H + CHECK_UNITS),
        ({"record": ("update", "reset", "hidden")}, 2 * H + CHECK_UNITS),
        ({"record": ("update", "candidate")}, 3 * H),
        ({"record": "hidden"}, 3 * CHECK_UNITS),
        ({"record": "input"}, 3 * CHECK_UNITS),
        ({"units": slice(0, 12)}, 3 * 12),
        ({"units": [7]}, 3),
        ({"units": slice(20), "record": "update"}, 20 + 2 * CHECK_UNITS),
        ({"units": [3, 1, 2], "record": ("update", "hidden")}, 3 * 3),
        ({"units": slice(20), "record": "hidden"}, 3 * CHECK_UNITS),
    ],
)
@pytest.mark.parametrize("kind", ["padded", "packed", "reverse", "cell"])
def test_only_the_rows_that_are_needed_are_multiplied(kind, options, rows, counted) -> None:
    layer = nn.GRU(INPUT, H, bidirectional=kind == "reverse")
    x = torch.randn(T, B, INPUT)
    if kind == "cell":
        layer, x = nn.GRUCell(INPUT, H), torch.randn(B * T, INPUT)
    if kind == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, [T, T - 2, 4])
    sites = "l0_reverse" if kind == "reverse" else None
    with grutrace.trace(layer, sites=sites, check="raise", **options):
        layer(x)
    assert {product[1:] for product in counted.products} == {(rows, INPUT), (rows, H)}
    steps = {"packed": 2 * T + 2}.get(kind, T * B)
    # Of the packed kind the products of the initial states come on top.
    extra = B * rows * H if kind == "packed" and counted.products[0][1] < 3 * H else 0
    assert counted.multiplications() == steps * rows * (INPUT + H) + extra


def test_control_the_whole_would_be_counted_as_such(counted) -> None:
    layer = nn.GRU(INPUT, H)
    with grutrace.trace(layer, gates="inline"):
        layer(torch.randn(T, B, INPUT))
    assert counted.multiplications() == 3 * H * (INPUT + H) * T * B


# -- the proof --------------------------------------------------------------------------------


RECORDS = [("update",), ("hidden",), ("candidate",), ("reset", "update"), (*GATES, "hidden")]


@pytest.mark.parametrize("record", RECORDS)
def test_control_what_is_wrong_exceeds_the_tolerance(record) -> None:
    """As in tests/gru/test_replay.py, for a part."""
    torch.manual_seed(0)
    layer, x = nn.GRU(5, 16), torch.randn(T, B, 5)
    initial = torch.randn(1, B, 16)
    hidden, units = layer(x, initial)[0].detach(), list(range(0, 16, 2))
    gates = [name for name in record if name in GATES]
    shadow = PartialReplay(16, gates, units, False, torch.float32)
    good = shadow.rows(GateReplay(layer).weights)
    arguments: dict[str, Any] = {
        "input": x,
        "hidden": hidden,
        "initial": initial[0],
        "steps": PaddedLayout(T, B),
        "rows": good,
    }
    replayed = shadow.replay(**arguments)
    assert replayed.residual <= replayed.tolerance < 1e-5
    wrong: dict[str, dict[str, Any]] = {
        "weights": {"rows": good._replace(weight_hh=good.weight_hh.roll(1, 0))},
        "one bias": {"rows": good._replace(bias_ih=good.bias_ih + 0.01)},
        "input": {"input": x.roll(1, 0)},
        "states": {"hidden": hidden.roll(1, 0)},
        "first states": {"initial": torch.zeros(B, 16)},
        "batch": {"input": x.flip(1)},
    }
    for what, changed in wrong.items():
        replayed = shadow.replay(**(arguments | changed))
        assert replayed.residual > 10 * replayed.tolerance, what
    backward = PartialReplay(16, gates, units, True, torch.float32)
    replayed = backward.replay(**arguments)
    assert replayed.residual > 10 * replayed.tolerance


def test_control_a_changed_state_does_not_verify() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(4, 12)
    with grutrace.trace(layer, units=[5, 2, 9]) as trace:
        layer(torch.randn(6, 3, 4))
    assert verify(trace)[0].holds
    rows = trace._guarded_sink.sink._store._arrays["modules/%/l0/hidden"]
    rows.array()
    rows._array[8, 2] += 1e-4
    (result,) = verify(trace)
    assert not result.holds
    assert (result.worst.sequence, result.worst.step, result.worst.unit) == (1, 2, 9)


def test_few_gates_and_the_input_verify_against_all_units() -> None:
    """The recorded tolerance is of what was computed; other units may have larger products."""
    torch.manual_seed(0)
    layer = nn.GRU(8, 64).requires_grad_(False)
    proven = evenly_spaced(64, CHECK_UNITS)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = getattr(layer, name)
        weight[64:128] *= 0.01
        for gate in (0, 2):
            weight[[64 * gate + unit for unit in proven]] *= 0.01
            weight[64 * gate : 64 * (gate + 1)] *= 30
    with grutrace.trace(layer, record=("update", "hidden", "input"), gates="inline") as trace:
        layer(torch.randn(50, 4, 8))
    (result,) = verify(trace)
    assert (result.check, result.holds) == ("gates", True)
    assert result.worst.tolerance > trace["l0"].checks["tolerance"][0]


def test_which_units_prove() -> None:
    assert evenly_spaced(5, 8) == [0, 1, 2, 3, 4]
    assert evenly_spaced(64, 8) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert len(set(evenly_spaced(15, 8))) == 8
    assert evenly_spaced(15, 8)[-1] > 10


@pytest.mark.parametrize("columns", [[0], [3], [0, 1, 2], [1, 4, 7], [2, 0], [0, 1, 3], [5, 5]])
def test_columns(columns) -> None:
    values = torch.arange(24.0).reshape(3, 8)
    assert torch.equal(ColumnSelector(columns).of(values), values[:, columns])


# -- what can be read -------------------------------------------------------------------------


def test_what_follows_from_all_units_is_refused() -> None:
    layer = nn.GRU(3, 8, 2)
    with grutrace.trace(layer, record=EVERYTHING, units=[1, 2]) as trace:
        layer(torch.randn(4, 3))
    site = trace["l1"]
    assert (site.units, site.update.shape, site.input.shape) == ((1, 2), (4, 2), (4, 8))
    assert site.weights()["weight_hh"].shape == (24, 8)
    assert site.sequence(0).initial.shape == (2,)
    assert site.padded("hidden")[0].shape == (1, 4, 2)
    with pytest.raises(
        grutrace.NotRecordedError, match="2 of 8 units were recorded, and recomputing a gate"
    ):
        site.preactivation("update")
    (result, _) = verify(trace)
    assert (result.check, result.holds) == ("states", True)
    assert "2 of 8 units" in result.reason


def test_the_states_of_some_units_below_are_no_input_above() -> None:
    layer = nn.GRU(3, 8, 2)
    with grutrace.trace(layer, units=slice(4)) as trace:
        layer(torch.randn(4, 3))
    with pytest.raises(grutrace.NotRecordedError, match="the input was not recorded"):
        trace["l1"].gate_inputs.input(np.arange(2))


def test_appending_goes_on_with_the_same_units_only(tmp_path) -> None:
    layer, path, x = nn.GRU(3, 8), tmp_path / "run.h5", torch.randn(4, 3)
    for mode in ("w", "a"):
        with grutrace.trace(layer, path, units=[1, 2], mode=mode) as trace:
            layer(x)
    assert trace["l0"].update.shape == (8, 2)
    with pytest.raises(grutrace.TraceFileError, match=r"units of site 'l0': the file has \(1, 2\)"):
        grutrace.Tracer(layer, path, units=[2, 1], mode="a")


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([0, 9], "numbers of units of a.l0, which has 6: found 9"),
        ([-7], "numbers of units of a.l0, which has 6: found -7"),
        ([4], "numbers of units of b.cell, which has 4: found 4"),
        ([1, 2, 1], "each unit of a.l0 once: found 1 and 1"),
        ([1, -5], "each unit of a.l0 once: found 1 and -5"),
        (slice(8, None), "some of a.l0, which has 6: found none"),
        (slice(4, 6), "some of b.cell, which has 4: found none"),
        (slice(None, None, 0), "a slice with a step, found a step of 0"),
        (slice("a"), "a slice of whole numbers, found 'a'"),
        ([], "a slice, or the numbers of units, found none"),
        (3, "a slice, or the numbers of units, found 3"),
        ("3", "a slice, or the numbers of units, found '3'"),
        ([1.5], r"a slice, or the numbers of units, found 1\.5"),
        ([True], "a slice, or the numbers of units, found True"),
    ],
)
def test_wrong_units_are_one_clear_error(units, message) -> None:
    model = nn.ModuleDict({"a": nn.GRU(2, 6), "b": nn.GRUCell(2, 4)})
    with pytest.raises(grutrace.OptionError, match=f"units: expected {message}"):
        grutrace.Tracer(model, units=units)


def test_deferred_gates_need_all_units() -> None:
    with pytest.raises(grutrace.OptionError, match="the states of all units; found 0:8"):
        grutrace.Tracer(nn.GRU(2, 16), units=slice(0, 8), gates="deferred")


@pytest.mark.parametrize(
    "units", [np.array([1, 3]), torch.tensor([1, 3]), range(1, 5, 2), iter((1, 3)), (1, -3)]
)
def test_numbers_of_any_kind(units) -> None:
    assert grutrace.Tracer(nn.GRU(2, 6), units=units)["l0"].units == (1, 3)


def test_all_units_in_order_are_no_part() -> None:
    for units in (slice(None), range(6), slice(0, 99)):
        assert grutrace.Tracer(nn.GRU(2, 6), units=units)["l0"].units is None
    backward = grutrace.Tracer(nn.GRU(2, 6), units=slice(None, None, -1))
    assert backward["l0"].units == (5, 4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("kind", "units", "batch", "steps"),
    list(
        itertools.product(
            ("gru", "reverse", "cell", "decoder"), ([0, 1], [2], [2, 0]), (1, 2), (1, 4)
        )
    ),
)
def test_what_is_changed_in_place_right_after_the_call(kind, units, batch, steps) -> None:
    """A column of the model's own tensor is a view into it, wherever it begins."""
    torch.manual_seed(0)
    options: Any = {"record": EVERYTHING, "units": units}
    layer = nn.GRUCell(2, 3) if kind == "cell" else nn.GRU(2, 3, bidirectional=kind == "reverse")
    if kind == "decoder":
        layer = StepwiseDecoder(1)
        layer.rnn = nn.GRU(4, 6)
    traces = []
    for spoilt in (False, True):
        torch.manual_seed(1)
        x = torch.randn(batch, 2) if kind == "cell" else torch.randn(steps, batch, 2)
        with torch.no_grad(), grutrace.trace(layer, **options) as trace:
            if kind == "decoder":
                state = torch.randn(1, batch, 6)
                results = [layer(torch.randn(1, batch, 4), state, steps), state]
            else:
                results = [x, layer(x)]
            for value in results if spoilt else []:
                for tensor in value if isinstance(value, tuple) else (value,):
                    tensor.fill_(7)
        traces.append(trace)
    for name in traces[0].sites:
        for quantity in EVERYTHING:
            left, right = (trace[name].rows(quantity) for trace in traces)
            np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(traces[0][name].initial, traces[1][name].initial)
