"""Tests of trace comparison: planted differences are found, as by a plain reader."""

from __future__ import annotations

import copy
import itertools
import math
import tracemalloc
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.comparison import alignment, compare
from grutrace.storage.open import open_sink
from tests import other_processor
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tests.plain_reader import PlainTrace
from tests.storage.streams import Stream, full_stream, make_header, make_module
from tests.test_both_sinks import run as run_everything

QUANTITIES = ("input", "initial", "reset", "update", "candidate", "hidden")


def written(path: Any, records: Any, header: Any) -> grutrace.Trace:
    sink = open_sink(path, header)
    for record in records:
        sink.append(record)
    sink.close()
    return grutrace.open(path)


def whole_run(path: Any = None, gates: Any = "inline", **options: Any) -> Any:
    """A run whose gates are the same bits in each trace, unless asked otherwise."""
    torch.manual_seed(1)
    model = EncoderDecoder(layers=2, dropout=0.3)
    with grutrace.trace(model, path, record=EVERYTHING, gates=gates, **options) as trace:
        run_everything(model, trace)
    return trace if path is None else grutrace.open(path)


def by_loops(a: Any, b: Any, tolerance: float) -> dict[Any, Any]:
    """By site and quantity, from a plain reading of both files: counts, the largest, the first."""
    results: dict[Any, Any] = {}
    for one, other in zip(PlainTrace(a).modules, PlainTrace(b).modules, strict=True):
        for suffix, site in one.sites.items():
            for quantity in QUANTITIES:
                if quantity in site.rows or quantity == "initial":
                    results[site.name, quantity] = site_by_loops(
                        site, other.sites[suffix], quantity, tolerance
                    )
    return results


def site_by_loops(a: Any, b: Any, quantity: str, tolerance: float) -> Any:
    values = unequal = beyond = 0
    largest: Any = None
    first: Any = None
    for sequence in range(min(a.module.count, b.module.count)):
        if quantity == "initial":
            rows = [(None, a.initial[sequence], b.initial[sequence])]
        else:
            both = a.sequence(sequence, quantity), b.sequence(sequence, quantity)
            rows = [(step, *pair) for step, pair in enumerate(zip(*both, strict=False))]
        for step, left, right in reversed(rows) if a.reverse else rows:
            for unit, (x, y) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
                values += 1
                off = abs(x - y) / max(1, abs(x), abs(y))
                worst = sequence, step, unit, x, y
                unequal += x != y
                beyond += off > tolerance
                first = worst if off > tolerance and first is None else first
                largest = (off, worst) if off > (largest[0] if largest else 0) else largest
    return values, unequal, beyond, largest and largest[0], first


@pytest.mark.parametrize("block", [1, 100, 10**9])
def test_differences_equal_those_of_a_plain_reader(tmp_path, block, monkeypatch) -> None:
    """For a full trace, a trace with every tenth value changed, and one with fewer calls."""
    monkeypatch.setattr(alignment, "BLOCK_BYTES", block)
    stream = full_stream()
    stream.header = make_header(*(m for m in stream.header.modules if m.path != "deferred"))
    records = [record for record in stream.records if record.module < 4]
    written(tmp_path / "a.h5", copy.deepcopy(records), stream.header).close()
    random = np.random.default_rng(0)
    for record in records:
        for site in getattr(record, "sites", {}).values():
            for array in (*getattr(site, "rows", {}).values(), *[getattr(site, "initial", None)]):
                if array is not None:
                    array += random.choice([0, 0, 0, 0, 0, 0, 1e-3, 0.5], array.shape)
    written(tmp_path / "b.h5", records[:-3], stream.header).close()
    with grutrace.open(tmp_path / "a.h5") as a, grutrace.open(tmp_path / "b.h5") as b:
        result = compare(a, b, tolerance=0.1)
    expected = by_loops(tmp_path / "a.h5", tmp_path / "b.h5", 0.1)
    assert {(value.site, value.quantity) for value in result.values} == set(expected)
    assert sum(value.beyond for value in result.values) > 20
    for value in result.values:
        first = value.first
        assert (
            value.values,
            value.unequal,
            value.beyond,
            value.largest and value.largest.difference,
            first and (first.sequence, first.step, first.unit, first.a, first.b),
        ) == expected[value.site, value.quantity]
    assert not result.same
    assert result.largest.largest.difference == max(
        figures[3] or 0 for figures in expected.values()
    )


def test_repeated_runs_are_equal(tmp_path) -> None:
    """In memory, in a file, and in both orders."""
    memory, file = whole_run(), whole_run(tmp_path / "run.h5")
    for a, b in itertools.product((memory, file), repeat=2):
        result = compare(a, b, exact=True)
        assert result.same
        assert str(result) == "the traces are the same within the tolerance"
        assert not any(value.unequal for value in result.values)
        assert len(result.values) == 3 * 6
        assert (result.largest, result.first, result.cause, result.weights) == (None, None, "", ())
    file.close()


def test_derived_gates_are_equal_within_rounding(tmp_path, monkeypatch) -> None:
    """Recomputed products may differ in their last digits."""
    inline, deferred = whole_run(), whole_run(tmp_path / "run.h5", gates="deferred")
    other_processor.install(monkeypatch)
    result = compare(inline, deferred)
    allowed = max(inline[name].checks["tolerance"].max() for name in inline.sites)
    assert result.same
    assert 0 < result.largest.largest.difference <= allowed
    assert [difference.what for difference in result.context] == ["option gates"]
    deferred.close()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("quantity", EVERYTHING)
def test_one_changed_value_is_found(tmp_path, quantity, reverse) -> None:
    torch.manual_seed(0)
    layer, path = nn.GRU(2, 3, bidirectional=True), tmp_path / "run.h5"
    with grutrace.trace(layer, path, record=EVERYTHING), torch.no_grad():
        layer(torch.randn(4, 2, 2))
        layer(torch.randn(5, 3, 2))
    changed, site = tmp_path / "changed.h5", "l0_reverse" if reverse else "l0"
    changed.write_bytes(path.read_bytes())
    with h5py.File(changed, "r+") as file:
        # The second call's second sequence, its first step; of two steps, read first or last.
        rows = file["modules/%"][site][quantity]
        before = float(rows[13, 1])
        rows[13:15, 1] += [0.25, 0.5]
        after = float(rows[13, 1]), float(rows[14, 1])
    with grutrace.open(path) as a, grutrace.open(changed) as b:
        assert compare(a, a).same
        result = compare(a, b)
    # Both directions read the same input, which is stored once.
    assert [(value.site, value.quantity) for value in result.values if value.beyond] == (
        [("l0", "input"), ("l0_reverse", "input")] if quantity == "input" else [(site, quantity)]
    )
    differing = next(value for value in result.values if value.site == site and value.beyond)
    first = differing.first
    assert (first.sequence, first.step, first.unit) == (3, int(reverse), 1)
    assert (differing.values, differing.unequal, differing.beyond) == (
        23 * (2 if quantity == "input" else 3),
        2,
        2,
    )
    if not reverse:
        assert (first.a, first.b) == (before, after[0])
    assert (differing.largest.step, differing.largest.b) == (1, after[1])
    assert not result.same
    assert f"sequence 3, step {int(reverse)}, unit 1" in str(result)


def test_batch_sizes_do_not_matter() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder().eval().requires_grad_(False)
    batch = torch.randn(8, 6, 5)
    with grutrace.trace(model, record=EVERYTHING) as a:
        model(batch)
    with grutrace.trace(model, record=EVERYTHING) as b:
        for part in batch.split([1, 4, 3]):
            model(part)
    result = compare(a, b)
    assert result.same
    assert result.largest is None or result.largest.largest.difference < 1e-6
    about = {difference.what: (difference.a, difference.b) for difference in result.context}
    assert about["encoder: batches"] == ("1 call of 8", "3 calls of 1 to 4")
    with grutrace.trace(model, record=EVERYTHING) as shuffled:
        model(batch.flip(0))
    assert not compare(a, shuffled).same


def trace_of(layer: Any, input: Any, **options: Any) -> Any:
    with torch.no_grad(), grutrace.trace(layer, **{"record": EVERYTHING, **options}) as trace:
        layer(input)
    return trace


@pytest.fixture
def layer() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(2, 3)


@pytest.fixture
def input() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 4, 2)


def test_the_tolerance_follows_the_types(layer, input) -> None:
    def tolerance(a: Any, b: Any, quantity: str = "hidden") -> float:
        result = compare(a, b, record=quantity)
        assert result.same
        return next(value for value in result.values if value.quantity == quantity).tolerance

    single = trace_of(layer, input)
    double = trace_of(copy.deepcopy(layer).double(), input.double())
    half = trace_of(layer, input, dtype="float16")
    deferred = trace_of(layer, input, dtype="float16", gates="deferred")
    brain = trace_of(copy.deepcopy(layer).bfloat16(), input.bfloat16())
    single_eps, double_eps, half_eps = 2.0**-23, 2.0**-52, 2.0**-10
    assert tolerance(double, double) == pytest.approx(257 * double_eps)
    assert tolerance(single, double) == pytest.approx(256.5 * single_eps)
    assert tolerance(single, half) == pytest.approx(256.5 * single_eps + half_eps / 2)
    # Half of the digits at most.
    from_half = math.sqrt(half_eps) + (single_eps + half_eps) / 2
    assert tolerance(single, deferred, "update") == pytest.approx(from_half)
    assert tolerance(brain, brain) == pytest.approx(math.sqrt(2.0**-7), rel=1e-5)
    assert not compare(single, half, exact=True).same
    assert not compare(single, half, tolerance=1e-6).same


def test_large_values_are_compared_relatively(tmp_path) -> None:
    traces = []
    for number, value in enumerate((1e6, 1e6 + 10)):
        stream = Stream(make_header(make_module("rnn", record=("input",))))
        stream.call([2])
        stream.records[-1].sites["l0"].rows["input"][1] = value
        traces.append(written(tmp_path / f"{number}.h5", stream.records, stream.header))
    assert compare(*traces).same
    result = compare(*traces, tolerance=9e-6)
    assert result.first.first.difference == pytest.approx(10 / (1e6 + 10))
    for trace in traces:
        trace.close()


def test_nan_and_infinity(layer, input) -> None:
    traces = {}
    for value in (0.5, np.nan, np.inf, -np.inf):
        changed = input.clone()
        changed[3, 2, 1] = value
        traces[value] = trace_of(layer, changed, check="off", record="input")
    for (x, a), (y, b) in itertools.product(traces.items(), repeat=2):
        result = compare(a, b)
        assert result.same == (x == y or (x != x and y != y))
        if not result.same:
            (largest,) = (value.largest for value in result.values if value.beyond)
            assert (largest.sequence, largest.step, largest.unit) == (2, 3, 1)
            assert largest.difference == np.inf
            assert not compare(a, b, tolerance=1e300).same


def test_content_of_only_one_trace(layer, input) -> None:
    model = nn.ModuleDict({"x": layer, "y": nn.GRU(2, 3)})
    with grutrace.trace(model) as a:
        layer(input)
        model["y"](input)
    with grutrace.trace(model, sites="x.*", record=("update", "hidden")) as b:
        layer(input[:4])
        layer(input[:2])
    result = compare(a, b)
    assert [str(mismatch) for mismatch in result.mismatches] == [
        "y.l0: site: only in a",
        "x: sequences: 4 and 8",
        "x: steps of sequence 0: 6 and 4 (the first of 4)",
        "x.l0: reset: only in a",
        "x.l0: candidate: only in a",
    ]
    assert not result.same
    assert {value.quantity: value.values for value in result.values} == {
        "initial": 12,
        "update": 4 * 4 * 3,
        "hidden": 4 * 4 * 3,
    }
    narrowed = compare(a, b, sites="x.*", record="update")
    assert len(narrowed.mismatches) == 2
    assert [value.quantity for value in narrowed.values] == ["update"]


def test_units_correspond_by_number(layer, input) -> None:
    a = trace_of(layer, input, units=[2, 0], record="update")
    b = trace_of(layer, input, units=slice(1, None), record="update")
    result = compare(a, b, record="update")
    assert [str(mismatch) for mismatch in result.mismatches] == ["l0: units: 2, 0 and 1, 2"]
    (update,) = result.values
    assert (update.values, update.beyond) == (24, 0)
    whole = trace_of(layer, input, record="update")
    (update,) = compare(whole, a, record="update").values
    assert (update.values, update.beyond) == (48, 0)
    with torch.no_grad():
        layer.bias_hh_l0[3 + 2] += 1
    moved = trace_of(layer, input, units=[2, 0], record="update")
    (update,) = compare(whole, moved, record="update").values
    assert (update.first.sequence, update.first.step, update.first.unit) == (0, 0, 2)


def test_different_sizes_are_reported(input) -> None:
    a = trace_of(nn.GRU(2, 3), input)
    result = compare(a, trace_of(nn.GRU(2, 4), input))
    assert [str(mismatch) for mismatch in result.mismatches] == ["l0: hidden size: 3 and 4"]
    assert result.values == ()
    result = compare(a, trace_of(nn.GRU(5, 3), torch.randn(6, 4, 5)))
    assert [str(mismatch) for mismatch in result.mismatches] == ["l0: input size: 2 and 5"]
    assert "input" not in {value.quantity for value in result.values}
    result = compare(a, trace_of(nn.GRU(2, 3, bias=False), input))
    assert [str(mismatch) for mismatch in result.mismatches] == ["bias: True and False"]


def annotated(layer: Any, input: Any, **options: Any) -> Any:
    tracer = grutrace.Tracer(layer, recording=False)
    with tracer, tracer.recording(**options):
        layer(input)
    return tracer


def test_tokens_and_labels(layer, input) -> None:
    words = [list("hello!"), list("abcdef"), list("ABCDEF"), list("world.")]
    numbers = [[1.0, np.nan, 3, 4, 5, 6]] * 4
    a = annotated(layer, input, tokens=words, labels={"pos": numbers})
    assert compare(a, annotated(layer, input, labels={"pos": numbers}, tokens=words)).same
    other = copy.deepcopy(words)
    other[2][4] = other[3][1] = "?"
    b = annotated(
        layer, input, tokens=other, labels={"pos": [[1, 2, 3, 4, 5, 6]] * 4, "new": words}
    )
    result = compare(a, b)
    assert [str(mismatch) for mismatch in result.mismatches] == [
        "label pos of sequence 0, step 1: none and 2.0 (the first of 4)",
        "label new of sequence 0: only in b (the first of 4)",
        "tokens of sequence 2, step 4: 'E' and '?' (the first of 2)",
    ]
    assert result.cause == ""
    assert not result.same
    assert not any(value.unequal for value in result.values)


def test_the_likely_cause(layer, input) -> None:
    a = trace_of(layer, input)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_hh_l0[4, 1] += 0.125
    result = compare(a, trace_of(other, input))
    (weights,) = result.weights
    assert (weights.name, weights.version, weights.versions) == ("weight_hh", 0, 1)
    assert weights.largest == pytest.approx(0.125)
    assert result.cause == "the weights differ: l0: weight_hh of version 0 by 0.12"
    moved = input.clone()
    moved[2, 1] += 1
    result = compare(a, trace_of(layer, moved))
    assert result.first.quantity == "input"
    assert (result.first.first.sequence, result.first.first.step) == (1, 2)
    assert result.cause == "the weights are equal; what l0 read differs"
    with torch.no_grad(), grutrace.trace(layer, record=EVERYTHING) as trace:
        layer(input, torch.ones(1, 4, 3))
    result = compare(a, trace)
    assert result.first.first.step is None
    assert result.cause == "the weights are equal; the states that l0 began from differ"
    unknown = compare(trace_of(layer, input, record="hidden"), trace_of(layer, moved))
    assert unknown.cause == "the weights are equal; what l0 read was not recorded in both"
    torch.manual_seed(0)
    stack = nn.GRU(2, 3, 2, dropout=0.5)
    result = compare(trace_of(stack.eval(), input), trace_of(stack.train(), input))
    assert result.cause.endswith("not: calls in training mode: none and all")


def test_weights_are_compared_on_request(layer, input) -> None:
    """A weight of an input that is always 0 has no effect."""
    input[..., 1] = 0
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_ih_l0[4, 1] += 1
    a, b = trace_of(layer, input), trace_of(other, input)
    result = compare(a, b)
    assert result.same
    assert len(result.weights) == 1
    assert result.largest is None
    exact = compare(a, b, exact=True)
    assert not exact.same
    assert [mismatch.what for mismatch in exact.mismatches] == ["weight_ih of version 0"]


def test_versions_of_the_weights(tmp_path) -> None:
    traces = []
    for number in range(2):
        stream = Stream(make_header(make_module("rnn")))
        for version in range(4):
            stream.weights()
            stream.call([2])
            if number and version in (1, 3):
                stream.records[-2].sites["l0"]["bias_ih"][7] += version
        traces.append(written(tmp_path / f"{number}.h5", stream.records, stream.header))
    (result,) = compare(*traces).weights
    assert (result.version, result.versions, result.name) == (1, 2, "bias_ih")
    assert result.largest == pytest.approx(1)
    assert "and 1 more version" in str(result)
    for trace in traces:
        trace.close()


def test_wrong_options(layer, input) -> None:
    a = trace_of(layer, input, record="update")
    with pytest.raises(grutrace.OptionError, match=r"expected some of reset, .* found 'gates'"):
        compare(a, a, record=["gates"])
    with pytest.raises(grutrace.OptionError, match="from 0 up, found -1"):
        compare(a, a, tolerance=-1)
    with pytest.raises(grutrace.OptionError, match="from 0 up, found nan"):
        compare(a, a, tolerance=np.nan)
    with pytest.raises(grutrace.OptionError, match="one of the two"):
        compare(a, a, tolerance=0.1, exact=True)
    with pytest.raises(grutrace.NotRecordedError, match=r"neither trace has .* 'decoder\.\*'"):
        compare(a, a, sites="decoder.*")
    with pytest.raises(
        grutrace.NotRecordedError, match="'hidden' at these sites; recorded: update"
    ):
        compare(a, a, record="hidden")


@pytest.mark.measures
def test_memory_is_bounded(tmp_path, monkeypatch) -> None:
    """Two files of 8 MB a quantity are compared in a fraction of that."""
    monkeypatch.setattr(alignment, "BLOCK_BYTES", 64 * 1024)
    stream = Stream(make_header(make_module("rnn", hidden=32, record=("hidden",))))
    for _ in range(4):
        stream.call([8192, 8192])
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        written(path, copy.deepcopy(stream.records), stream.header).close()
    with h5py.File(paths[1], "r+") as file:
        file["modules/rnn/l0/hidden"][...] += np.float32(1e-6)
    with grutrace.open(paths[0]) as a, grutrace.open(paths[1]) as b:
        tracemalloc.start()
        result = compare(a, b)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert result.same
    assert result.values[1].unequal > 65536 * 32 / 2
    assert peak < 2e6
