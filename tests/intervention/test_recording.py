"""A trace inside an intervention holds the gates as they were set, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import grutrace
from grutrace.analysis import verify
from grutrace.analysis.verification.materialize import materialize_file
from grutrace.capture.recording.guarded_sink import GuardedSink
from grutrace.intervention.settings import SETTABLE
from grutrace.records import WeightsRecord
from tests import oracles
from tests.intervention.loops import initial_states, run_loop, suffixes
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases

UPDATE = "update[1,4]"
EVERYTHING = ("reset", "update", "candidate", "hidden", "input")
SINKS = [
    *(("inline", False), ("background", False), ("inline", True)),
    *(("deferred", False), ("deferred", True)),
]


def path_of(tmp_path: Path, to_file: bool) -> Path | None:
    return tmp_path / "run.h5" if to_file else None


@pytest.mark.parametrize(("gates", "to_file"), SINKS)
@pytest.mark.parametrize("quantity", SETTABLE)
def test_the_gates_are_recorded_as_they_were_set(
    quantity: str, gates: Any, to_file: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 5, 2, bidirectional=True)
    x = torch.randn(7, 4, 3)
    path = path_of(tmp_path, to_file)
    check = "warn" if gates == "deferred" else "raise"
    with grutrace.trace(layer, path, gates=gates, record=EVERYTHING, check=check) as trace:
        layer(x)
        with grutrace.intervene(
            layer,
            "l0_reverse",
            units=[1, 3],
            steps=slice(2, 5),
            sequences=[0, 2],
            **{quantity: 0.3},
        ):
            output, _ = layer(x)
    seen: dict[tuple[str, str, int, int], np.ndarray] = {}

    def edit(site: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if site == "l0_reverse" and name == quantity and step in range(2, 5) and sequence in (0, 2):
            values = values.copy()
            values[[1, 3]] = 0.3
        seen[site, name, step, sequence] = values
        return values

    run_loop(layer, list(x.transpose(0, 1).numpy()), None, edit)
    assert (trace.calls["proof"] == "proven").all()
    for site in trace.sites:
        for name in ("reset", "update", "candidate", "hidden"):
            for b in range(4):
                rows = trace[site].sequence(4 + b).rows(name)
                expected = [seen[site, name, t, b] for t in range(7)]
                assert np.allclose(rows, expected, rtol=0, atol=1e-5), (site, name, b)
    assert np.array_equal(
        trace["l1"].padded("hidden")[0][4:].transpose(1, 0, 2), output[..., :5].detach().numpy()
    )
    text = f"{quantity}[1,3]"
    expected_label = [None, None, text, text, text, None, None]
    label = "grutrace:set:l0_reverse"
    assert trace["l0"].sequence(4).labels[label] == expected_label
    assert trace["l0_reverse"].sequence(6).labels[label] == expected_label
    assert label not in trace["l0"].sequence(0).labels
    assert label not in trace["l0"].sequence(5).labels
    assert trace.calls["set"].tolist() == [None, f"l0_reverse: {text}"]
    checked = "derived" if gates == "deferred" else "gates"
    assert all(result.holds and result.check == checked for result in verify(trace))


def test_control_verify_finds_a_gate_that_does_not_follow_from_those_set(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5), torch.randn(7, 2, 3)
    path = tmp_path / "run.h5"
    intervention = grutrace.intervene(layer, "l0", reset=0.25, units=2)
    with grutrace.trace(layer, path, record=EVERYTHING), intervention:
        layer(x)
    with grutrace.open(path) as trace:
        (whole,) = verify(trace)
        assert whole.holds
    with h5py.File(path, "r+") as file:
        file["modules/%/l0/candidate"][3, 2] += 0.1
    with grutrace.open(path) as trace:
        (damaged,) = verify(trace)
    assert not damaged.holds
    assert damaged.worst is not None
    assert (damaged.worst.step, damaged.worst.unit) == (3, 2)


@settings(deadline=None)
@given(cases(dtypes=(torch.float64,)), st.data())
def test_the_lattice(case: Case, data: st.DataObject) -> None:
    layer = case.layer
    assume(not getattr(layer, "dropout", 0.0))
    for parameter in layer.parameters():
        parameter.data.clamp_(-0.5, 0.5)
    input = case.args[0] if case.args else case.kwargs["input"]
    inputs = oracles.as_sequences(layer, input, layer.input_size)
    assume(inputs)
    site = data.draw(st.sampled_from([name for name, _, _ in suffixes(layer)]))
    quantity = data.draw(st.sampled_from(SETTABLE))
    unit = data.draw(st.integers(0, layer.hidden_size - 1))
    step = data.draw(st.integers(0, min(map(len, inputs)) - 1))
    gates = data.draw(st.sampled_from(("inline", "background", "deferred")))
    kept = data.draw(st.sampled_from((None, slice(1, 4))))
    seen: dict[tuple[str, str, int, int], np.ndarray] = {}

    def edit(at: str, name: str, time: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if (at, name, time) == (site, quantity, step):
            values = values.copy()
            values[unit] = -0.2
        seen[at, name, time, sequence] = values
        return values

    options: dict[str, Any] = {"gates": gates, "steps": kept, "check": "raise"}
    if gates != "inline":
        options["check"] = "warn"
    intervention = grutrace.intervene(layer, site, units=unit, steps=step, **{quantity: -0.2})
    with grutrace.trace(layer, record=EVERYTHING, **options) as trace, intervention:
        case.run()
    run_loop(layer, inputs, initial_states(layer, case.initial), edit)
    first = 0 if kept is None else kept.start
    for name in trace.sites:
        for b, sequence in enumerate(trace[name]):
            for recorded in ("reset", "update", "candidate", "hidden"):
                for t, row in enumerate(sequence.rows(recorded)):
                    expected = seen[name, recorded, first + t, b]
                    assert np.allclose(row, expected, rtol=0, atol=1e-9)
    assert all(result.holds for result in verify(trace))


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_a_decoder(gates: Any) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(3, 4), torch.randn(30, 2, 3)
    intervention = grutrace.intervene(cell, "cell", update=1.0, units=[0], steps=slice(10, 20))
    with grutrace.trace(cell, gates=gates, record=EVERYTHING) as trace, intervention:
        state = None
        for step in x:
            state = cell(step, state)
    sequence = trace["cell"].sequence(1)
    assert len(trace["cell"]) == 2
    assert (sequence.update[10:20, 0] == 1.0).all()
    assert (sequence.update[:10, 0] < 1.0).all()
    assert (sequence.update[20:, 0] < 1.0).all()
    label = sequence.labels["grutrace:set:cell"]
    assert label == [None] * 10 + ["update[0]"] * 10 + [None] * 10
    of_calls = trace.calls["set"].tolist()
    assert of_calls == [None] * 10 + ["cell: update[0]"] * 10 + [None] * 10
    assert verify(trace)[0].holds


@pytest.mark.parametrize("record", [("update",), ("candidate", "hidden"), ("hidden", "input")])
@pytest.mark.parametrize("quantity", ["reset", "update", "hidden"])
def test_fewer_quantities(record: Any, quantity: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5), torch.randn(7, 2, 3)
    settings = {"l0": {quantity: 0.3}}
    with grutrace.trace(layer, record=EVERYTHING) as whole, grutrace.intervene(layer, settings):
        layer(x)
    with grutrace.trace(layer, record=record) as trace, grutrace.intervene(layer, settings):
        layer(x)
    for name in record:
        assert np.array_equal(trace["l0"][name], whole["l0"][name])
    assert all(result.holds for result in verify(trace))


def test_some_units_of_the_trace() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 8), torch.randn(7, 2, 3)
    tracer = grutrace.trace(layer, units=[4, 2, 7], check="raise")
    with grutrace.intervene(layer, "l0", update=0.5, units=[1, 4]), tracer as trace:
        layer(x)
    assert (trace["l0"].update[:, 0] == 0.5).all()
    assert not (np.asarray(trace["l0"].update[:, 1:]) == 0.5).any()
    assert verify(trace)[0].holds


def test_packed_sequences() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4), torch.randn(5, 3, 3)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
    intervention = grutrace.intervene(layer, "l0", candidate=0.1, sequences=1, steps=[1, 4])
    with grutrace.trace(layer, record=EVERYTHING) as trace, intervention:
        layer(packed)
    assert trace["l0"].sequence(1).labels["grutrace:set:l0"] == [
        *(None, "candidate", None, None, "candidate")
    ]
    assert "grutrace:set:l0" not in trace["l0"].sequence(0).labels
    assert (trace["l0"].sequence(1).candidate[[1, 4]] == np.float32(0.1)).all()
    assert verify(trace)[0].holds


def closing(gate: Tensor, at: Any) -> Tensor:
    """Another value for each sequence, step and unit."""
    return gate * (0.5 + 0.1 * at.step)


@pytest.mark.parametrize("record", [("update",), ("candidate", "hidden"), EVERYTHING])
def test_deferred_gates_are_those_of_an_inline_trace(record: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5, 2, bidirectional=True), torch.randn(7, 4, 3)
    settings = {
        "l0": {"reset": closing, "candidate": 0.1},
        "l1_reverse": {"update_preactivation": closing, "hidden": closing},
    }

    def run() -> None:
        layer(x)
        with grutrace.intervene(layer, settings, units=[0, 2, 3], steps=slice(2, None)):
            layer(x)

    path, derived = tmp_path / "run.h5", tmp_path / "derived.h5"
    with grutrace.trace(layer, record=EVERYTHING) as inline:
        run()
    with grutrace.trace(layer, path, gates="deferred", record=record):
        run()
    plain = PlainTrace(path).modules[0]
    with grutrace.open(path) as trace:
        for site in trace.sites:
            for name in (name for name in record if name != "input"):
                expected = np.asarray(inline[site][name])
                assert np.allclose(trace[site][name], expected, rtol=0, atol=1e-6), (site, name)
                rows = np.concatenate([plain.sites[site].derive(n, name) for n in range(8)])
                assert np.allclose(rows, expected, rtol=0, atol=1e-6)
        assert all(result.holds and result.check == "derived" for result in verify(trace))
        assert trace.calls["set"].tolist() == inline.calls["set"].tolist()
        assert trace["l0"].label_names == inline["l0"].label_names
        before = inline["l0"].preactivation("reset")
        assert np.allclose(trace["l0"].preactivation("reset"), before, rtol=0, atol=1e-5)
        chosen = trace.select(sequences=[5, 6])
        name = record[0]
        assert np.array_equal(
            chosen["l0"].sequence(1).rows(name), trace["l0"].sequence(6).rows(name)
        )
        materialize_file(trace, derived)
    with grutrace.open(derived) as trace:
        assert np.allclose(trace["l0"][record[0]], inline["l0"][record[0]], rtol=0, atol=1e-6)
        assert all(result.holds for result in verify(trace))


def damage(path: Path, name: str) -> None:
    """Change a value of a gate that was set, in the file."""
    with h5py.File(path, "r+") as file:
        ends = file["strings"][()].tolist()
        names = [
            bytes(file["characters"][start:end]).decode()
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        entries, first = file["annotations"][()], 0
        for entry in entries:
            if names[entry["name"] - 1] == name:
                file["values"][first + 3] += 0.1
                return
            first += int(entry["count"])
    raise AssertionError(names)


def test_control_verify_finds_a_wrong_value_of_a_deferred_gate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, path = nn.GRU(3, 5), tmp_path / "run.h5"
    intervention = grutrace.intervene(layer, "l0", reset=0.25, units=[1, 2])
    with grutrace.trace(layer, path, gates="deferred"), intervention:
        layer(torch.randn(7, 2, 3))
    with grutrace.open(path) as trace:
        assert verify(trace)[0].holds
        assert (trace["l0"].reset[:, 1:3] == 0.25).all()
    damage(path, "grutrace:value:l0:reset[1,2]")
    with grutrace.open(path) as trace:
        (damaged,) = verify(trace)
        assert not damaged.holds
        assert damaged.worst is not None
        assert damaged.worst.step == 3
        assert damaged.worst.unit in (1, 2)


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_labels_and_values_are_stored_together_with_the_call(
    gates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no reader, and no killed writer, sees one without the other."""
    layer, seen, append = nn.GRU(3, 5), list[Any](), GuardedSink.append

    def note(sink: GuardedSink, record: Any, *others: Any) -> int | None:
        seen.append(record)
        return append(sink, record, *others)

    monkeypatch.setattr(GuardedSink, "append", note)
    intervention = grutrace.intervene(layer, "l0", update=0.5, units=[1, 4], sequences=1)
    with grutrace.trace(layer, gates=gates), intervention:
        layer(torch.randn(4, 2, 3))
    (call,) = (record for record in seen if not isinstance(record, WeightsRecord))
    names = ["grutrace:set:l0", "grutrace:value:l0:update[1,4]"]
    assert [label.name for label in call.annotations] == names[: 2 if gates == "deferred" else 1]
    assert all(label.sequence == 1 for label in call.annotations)
    assert call.annotations[-1].values == ((0.5,) * 4 if gates == "deferred" else (UPDATE,) * 4)


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_max_bytes_counts_what_an_intervention_adds(gates: Any) -> None:
    layer, x = nn.GRU(3, 5).double(), torch.randn(6, 2, 3, dtype=torch.float64)

    def record(most: int | None, *, is_set: bool, calls: int = 2) -> Any:
        def update(gate: Tensor, _: Any) -> Tensor:
            return gate * 0.5 if is_set else gate

        with grutrace.trace(layer, gates=gates, max_bytes=most) as trace:
            for _ in range(calls):
                with grutrace.intervene(layer, "l0", update=update):
                    layer(x)
        return trace

    def size(*, is_set: bool) -> int:
        """The number of bytes from which one call is recorded."""
        low, high = 0, 1 << 20
        while high - low > 1:
            middle = (low + high) // 2
            found = len(record(middle, is_set=is_set, calls=1).calls)
            low, high = (low, middle) if found else (middle, high)
        return high

    # 33 bytes of an entry for each label of each sequence, and 8 of each of its values.
    sequences, steps, units = 2, 6, 5
    labels = 1 + (units if gates == "deferred" else 0)
    untouched = size(is_set=False)
    assert size(is_set=True) - untouched == labels * sequences * (33 + 8 * steps)
    assert len(record(untouched, is_set=False).calls) == 1
    assert len(record(None, is_set=True).calls) == 2


def test_a_deferred_trace_of_a_call_of_which_nothing_is_set() -> None:
    layer = nn.GRU(3, 5)
    intervention = grutrace.intervene(layer, "l0", update=0.0, steps=slice(8, None))
    with (
        pytest.warns(grutrace.GrutraceWarning, match="was not set"),
        grutrace.trace(layer, gates="deferred") as trace,
        intervention,
    ):
        layer(torch.randn(4, 2, 3))
    assert trace["l0"].label_names == ()
    assert (trace["l0"].update[:] > 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deferred_gates_of_smaller_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 5).to(dtype), torch.randn(7, 2, 3).to(dtype)
    with (
        grutrace.trace(layer, gates="deferred") as trace,
        grutrace.intervene(layer, "l0", update=closing, reset=0.3),
    ):
        layer(x)
    assert np.allclose(trace["l0"].reset[:], 0.3, atol=1e-3)
    assert verify(trace)[0].holds


def test_statistics_count_the_gates_as_set() -> None:
    layer = nn.GRU(3, 5)
    statistics = grutrace.Statistics()
    intervention = grutrace.intervene(layer, "l0", update=0.5)
    with grutrace.trace(layer, sink=statistics), intervention:
        layer(torch.randn(4, 2, 3))
    assert (statistics["l0"]["update"].mean == 0.5).all()


@pytest.mark.parametrize("steps", [None, slice(1, None)])
def test_a_function_that_changes_nothing_leaves_no_label(steps: Any) -> None:
    layer = nn.GRU(3, 5)

    def same(gate: Tensor, _: Any) -> Tensor:
        return gate

    intervention = grutrace.intervene(layer, "l0", update=same, steps=steps)
    with grutrace.trace(layer) as trace, intervention:
        layer(torch.randn(4, 2, 3))
    assert not trace["l0"].label_names
    assert all(result.holds for result in verify(trace))
