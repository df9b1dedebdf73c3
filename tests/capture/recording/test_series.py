"""Alike calls of one step are recorded as one series: the same as recorded one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.recording import journal, series_buffer, tensor_copy
from grutrace.capture.recording.series_buffer import SeriesBuffer, SeriesGroup
from grutrace.capture.sequences.assignment import (
    Commitment,
    InitialState,
)
from grutrace.capture.sequences.tracker import SequenceTracker
from grutrace.native.library import load
from grutrace.records import CallBatch, Record
from grutrace.storage.memory import MemorySink
from tests.interruptions import AtLine, Interruption


@pytest.fixture
def patient(monkeypatch) -> None:
    """Calls wait until something asks for them."""
    monkeypatch.setattr(journal, "MAX_SECONDS", 1e9)
    monkeypatch.setattr(journal, "IDLE_SECONDS", 1e9)


@pytest.fixture
def batches(monkeypatch) -> list[CallBatch]:
    """The batches of calls that a sink in memory gets."""
    batches: list[CallBatch] = []
    append = MemorySink.append

    def spy(sink: Any, record: Record) -> None:
        if isinstance(record, CallBatch):
            batches.append(record)
        append(sink, record)

    monkeypatch.setattr(MemorySink, "append", spy)
    return batches


class Decoder(nn.Module):
    """Two cells, and everything that people do to the states between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(4, 8), nn.GRUCell(8, 8)

    def program(self, seed: int, steps: int, tracer: Any) -> Iterator[None]:
        """Run some steps, each drawn at random."""
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        state, other, earlier = torch.zeros(3, 8), torch.zeros(3, 8), [torch.zeros(3, 8)]
        for _ in range(steps):
            batch = len(state)
            x = torch.randn(batch, 4)
            kind = rng.choice(
                [
                    *(["continue"] * 30 + ["second"] * 10 + ["zeros"] * 4 + ["permuted"]),
                    *("earlier", "copied", "in place", "smaller", "nan", "negative zero", "tag"),
                    *("weights", "read", "strided", "rest", "one zero", "split", "constant"),
                ]
            )
            if kind == "second":
                other = self.second(state, other if len(other) == batch else torch.zeros(batch, 8))
            elif kind == "zeros":
                state = torch.zeros(batch, 8)
            elif kind == "permuted":
                state = state[torch.randperm(batch)]
            elif kind == "earlier":
                state = earlier[rng.integers(len(earlier))]
            elif kind == "copied":
                state = state[:1].repeat(batch, 1)
            elif kind == "in place":
                state = state.clone().mul_(0.5)
            elif kind == "smaller":
                state = state[: max(1, batch - 1)] if batch > 1 else torch.zeros(3, 8)
            elif kind == "nan":
                state = state.masked_fill(torch.eye(batch, 8, dtype=torch.bool), torch.nan)
            elif kind == "negative zero":
                state = torch.full((batch, 8), -0.0)
            elif kind == "tag":
                tracer.start(str(rng.integers(3)))
            elif kind == "weights":
                self.first.weight_hh.data.mul_(0.9)
            elif kind == "read":
                len(tracer.calls)
            elif kind == "strided":
                x = torch.randn(4, len(x)).t()
                state = state.t().contiguous().t()
            elif kind == "rest":
                x = x * 0
            elif kind == "one zero":
                state = state.clone()
                state[0] = 0
            elif kind == "split":
                state = torch.cat([state[:1], torch.randn(batch - 1, 8)])
            elif kind == "constant":
                state = torch.ones(batch, 8)
            x = x[: len(state)] if len(x) >= len(state) else torch.randn(len(state), 4)
            state = self.first(x, state)
            earlier.append(state.clone())
            yield


def items(trace: Any) -> dict[str, np.ndarray]:
    """Everything in a trace but the times."""
    by_path = dict(trace._source._store.all_items(trace._source.refresh()))
    by_path["calls"] = by_path["calls"].copy()
    by_path["calls"]["time"] = 0
    return by_path


def recorded(seed: int, *, tracer_options: dict[str, Any], steps: int = 150) -> Any:
    """Trace a program in memory."""
    torch.manual_seed(seed)
    model = Decoder()
    with torch.no_grad(), grutrace.trace(model, **tracer_options, weights="exact") as trace:
        for _ in model.program(seed, steps, trace):
            pass
    return trace


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for path, values in first.items():
        assert values.dtype == second[path].dtype, path
        assert values.shape == second[path].shape, path
        assert values.tobytes() == second[path].tobytes(), path


OPTIONS = {
    "deferred": {"gates": "deferred"},
    "inline": {"gates": "inline"},
    "background": {"gates": "background"},
    "background, another type": {"gates": "background", "dtype": "float64"},
    "states only": {"gates": "deferred", "record": ("hidden",)},
    "another type": {"gates": "deferred", "dtype": "float16"},
    "little memory": {"gates": "deferred", "state_memory": 16 * 1024},
    "less memory": {"gates": "deferred", "state_memory": 4 * 1024},
}


@pytest.mark.filterwarnings("ignore::grutrace.GrutraceWarning")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", OPTIONS, ids=list(OPTIONS))
def test_series_give_what_single_calls_give(options, seed, patient, batches, monkeypatch) -> None:
    actual = items(recorded(seed, tracer_options=OPTIONS[options]))
    assert sum(map(len, batches)) > 30
    assert max(map(len, batches)) > 5
    batches.clear()
    monkeypatch.setattr(journal, "can_join_series", lambda _: False)
    expected = items(recorded(seed, tracer_options=OPTIONS[options]))
    assert not batches
    if "memory" in options:
        # Which states are forgotten first depends on how many are dropped at once.
        actual, expected = (
            {path: values for path, values in by_path.items() if path.endswith(("hidden", "input"))}
            for by_path in (actual, expected)
        )
    assert_same(actual, expected)


# The control reads memory that nothing has written, which may hold signalling NaN.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::grutrace.GrutraceWarning")
@pytest.mark.parametrize("compiled", [True, False])
def test_control_states_that_are_taken_for_chained_are_noticed(
    compiled, patient, monkeypatch
) -> None:
    if compiled and load() is None:
        pytest.skip("there is no compiled library")
    expected = items(recorded(0, tracer_options={"gates": "deferred"}))
    if compiled:
        monkeypatch.setattr(series_buffer, "_KINDS", (InitialState.CHAINED,) * 3)
    else:
        monkeypatch.setattr(series_buffer, "load", lambda: None)
    monkeypatch.setattr(series_buffer, "compare_small", lambda *_: 0)
    monkeypatch.setattr(series_buffer, "_are_zero", lambda *_: False)
    actual = items(recorded(0, tracer_options={"gates": "deferred"}))
    with pytest.raises(AssertionError):
        assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore::grutrace.GrutraceWarning")
@pytest.mark.parametrize("gates", ["deferred", "inline"])
def test_a_file_holds_what_memory_holds(gates, patient, tmp_path) -> None:
    expected = recorded(1, tracer_options={"gates": gates})
    actual = recorded(1, tracer_options={"gates": gates, "path": tmp_path / "a.h5"})
    with grutrace.open(tmp_path / "a.h5") as trace:
        for site in expected.sites:
            assert trace[site].lengths.tolist() == expected[site].lengths.tolist()
            for quantity in ("update", "hidden"):
                np.testing.assert_array_equal(
                    np.asarray(getattr(trace[site], quantity)),
                    np.asarray(getattr(expected[site], quantity)),
                )
        assert trace.calls["module"].tolist() == expected.calls["module"].tolist()
    assert len(actual.calls) == len(expected.calls)


def test_calls_of_cells_that_take_turns_keep_their_order(patient, batches) -> None:
    model = Decoder()
    with torch.no_grad(), grutrace.trace(model, gates="deferred") as trace:
        state, other = torch.zeros(2, 8), torch.zeros(2, 8)
        for _ in range(20):
            state = model.first(torch.randn(2, 4), state)
            other = model.second(state, other)
    assert trace.calls["module"].tolist() == ["first", "second"] * 20
    assert trace["second.cell"].lengths.tolist() == [20, 20]
    assert any(len(batch.series) == 2 for batch in batches)


@pytest.mark.parametrize("form", ["cell", "layer", "batch first"])
def test_annotations_reach_the_calls_of_a_series(form, patient, batches) -> None:
    model = {
        "cell": nn.GRUCell(3, 8),
        "layer": nn.GRU(3, 8),
        "batch first": nn.GRU(3, 8, batch_first=True),
    }[form]
    shape = {"cell": (2, 3), "layer": (1, 2, 3), "batch first": (2, 1, 3)}[form]
    with torch.no_grad(), grutrace.trace(model, gates="deferred") as trace:
        for word in ("abcdefgh", "ijklmnop"):
            with trace.recording(tokens=[list(word), list(word.upper())]):
                state = None
                for _ in word:
                    output = model(torch.randn(shape), state)
                    state = output if form == "cell" else output[1]
    site = trace[trace.sites[0]]
    assert ["".join(sequence.tokens) for sequence in site] == [
        "abcdefgh",
        "ABCDEFGH",
        "ijklmnop",
        "IJKLMNOP",
    ]
    assert batches


def test_what_the_user_changes_after_a_call_is_not_recorded(patient, batches) -> None:
    cell, values = nn.GRUCell(3, 8), torch.randn(10, 2, 3)
    x, state, expected = torch.empty(2, 3), torch.zeros(2, 8), []
    with torch.no_grad(), grutrace.trace(cell, gates="deferred", record=("hidden", "input")) as t:
        for value in values:
            x.copy_(value)
            state = cell(x, state)
            expected.append(state.clone())
            x.fill_(7.0)
        state.fill_(9.0)
    np.testing.assert_array_equal(t["cell"][0].hidden, torch.stack(expected)[:, 0])
    np.testing.assert_array_equal(t["cell"][1].input, values[:, 1])
    assert batches


def test_a_tensor_that_is_negated_when_it_is_read(patient, batches) -> None:
    """Its memory holds other values than it has."""
    cell, x = nn.GRUCell(3, 8), torch.randn(6, 2, 3, dtype=torch.complex64)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred", record=("hidden", "input")) as t:
        state = torch.zeros(2, 8)
        for value in x:
            state = cell(value.conj().imag, state)
    assert value.conj().imag.is_neg()
    np.testing.assert_array_equal(t["cell"][0].input, -x.imag[:, 0])
    assert batches


def interrupted(what: type, name: str, after: int, monkeypatch) -> None:
    """Raise KeyboardInterrupt in a call of a method, once."""
    method, remaining = getattr(what, name), [after]

    def stopped(*args: Any, **kwargs: Any) -> Any:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    monkeypatch.setattr(what, name, stopped)


@pytest.mark.parametrize(
    ("what", "name", "after"),
    [
        (MemorySink, "append", 3),
        (SequenceTracker, "_continue_run", 1),
        (SequenceTracker, "assign_series", 1),
        (journal.Journal, "_append_group", 1),
        (journal.Journal, "_prepare", 1),
    ],
)
def test_an_interruption_loses_no_call_of_a_series(
    what, name, after, patient, monkeypatch, batches
) -> None:
    torch.manual_seed(0)
    cell, state, expected = nn.GRUCell(3, 8), torch.zeros(2, 8), []
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        for _ in range(12):
            state = cell(torch.randn(2, 3), state)
            expected.append(state.clone())
        interrupted(what, name, after, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            trace.flush()
        monkeypatch.undo()
        assert len(trace.calls) == 12
    rows = np.asarray(trace["cell"].hidden)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, torch.cat(expected).numpy()))
    if name != "_continue_run":
        assert trace["cell"].lengths.tolist() == [12, 12]


class Turns(nn.Module):
    """Two cells that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(3, 4), nn.GRUCell(3, 4)

    def forward(self, x: torch.Tensor) -> None:
        a, b = torch.zeros(2, 4), torch.zeros(2, 4)
        for step in x:
            a, b = self.first(step, a), self.second(step, b)


@pytest.mark.parametrize("part", range(4))
def test_an_interruption_at_any_line_of_a_series(part, patient, batches) -> None:
    torch.manual_seed(0)
    model, x, another = Turns(), torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    is_interrupted, line, lines = True, part + 1, 0
    while is_interrupted:
        with torch.no_grad(), grutrace.trace(model, gates="deferred") as trace:
            try:
                with AtLine(line, Interruption):
                    model(x)
                is_interrupted = False
            except Interruption:
                pass
            model(another)
            modules = trace.calls["module"].tolist()
            times = trace.calls["time"].tolist()
        # Those before the interruption, in the order in which they ran, and a whole run.
        expected = ["first", "second"] * 8
        assert modules[: len(modules) - 8] == expected[: len(modules) - 8]
        assert modules[-8:] == expected[:8]
        assert times == sorted(times)
        assert trace["first.cell"].lengths.tolist()[-2:] == [4, 4]
        line, lines = line + 28, lines + 1
    assert lines > 10
    assert batches


def test_an_interruption_after_the_sink_has_the_calls(patient, monkeypatch) -> None:
    cell, state = nn.GRUCell(3, 8), torch.zeros(2, 8)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        for _ in range(12):
            state = cell(torch.randn(2, 3), state)
        interrupted(journal.Journal, "_report", 1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            trace.flush()
        monkeypatch.undo()
        for _ in range(3):
            state = cell(torch.randn(2, 3), state)
    assert len(trace.calls) == 15
    assert trace["cell"].lengths.tolist() == [15, 15]


def test_calls_that_the_sink_does_not_take_use_up_no_numbers() -> None:
    states = Chain(6, batch=2)
    tracker, lost, stored = SequenceTracker(1 << 20), Commitment(), Commitment()
    assert tracker.assign_series(states, lost).sequences().tolist() == [[0, 1]] * 6
    again = tracker.assign_series(states, stored)
    assert again.sequences().tolist() == [[0, 1]] * 6
    stored.is_done = True
    # The control: these were appended.
    assert tracker.assign_series(Chain(2, batch=2), Commitment()).sequences().tolist() == (
        [[2, 3]] * 2
    )


class Chain:
    """States of calls that go on from one another, the first from zeros."""

    def __init__(self, calls: int, *, batch: int) -> None:
        self.final = torch.randn(calls, batch, 4)
        self.kinds = [InitialState.ZEROS] + [InitialState.CHAINED] * (calls - 1)

    def initial(self, call: int) -> torch.Tensor:
        return self.final[call - 1] if call else torch.zeros_like(self.final[0])


@pytest.mark.filterwarnings("ignore:the model computes in float64")
@pytest.mark.parametrize("change", ["shape", "dtype", "training", "tag"])
def test_calls_that_differ_are_of_different_series(change, patient, batches) -> None:
    cell = nn.GRUCell(3, 8)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        for number in range(20):
            if number == 10:
                if change == "training":
                    cell.eval()
                elif change == "tag":
                    trace.start("later")
                elif change == "dtype":
                    cell.double()
            batch = 3 if change == "shape" and number >= 10 else 2
            dtype = torch.float64 if change == "dtype" and number >= 10 else torch.float32
            cell(torch.randn(batch, 3, dtype=dtype))
        assert trace.calls["batch"].tolist() == [2] * 10 + [batch] * 10
        if change == "training":
            assert trace.calls["training"].tolist() == [True] * 10 + [False] * 10
        if change == "tag":
            assert trace.calls["tag"].tolist() == [None] * 10 + ["later"] * 10
    assert sum(map(len, batches)) > 8


def test_memory_of_series_is_bounded(monkeypatch, batches) -> None:
    """A decoder whose batch shrinks with each call fills no series."""
    sizes: list[int] = []
    allocate = tensor_copy.SegmentPool.allocate

    def counted(pool: Any, count: int, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(count * dtype.itemsize)
        return allocate(pool, count, dtype)

    monkeypatch.setattr(tensor_copy.SegmentPool, "allocate", counted)
    cell = nn.GRUCell(16, 16)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred"):
        for batch in range(64, 0, -1):
            cell(torch.randn(batch, 16))
    needed = sum(3 * 64 * batch for batch in range(1, 65))
    assert sum(sizes) < 2 * needed


def test_no_user_tensor_is_kept_alive(patient) -> None:
    cell = nn.GRUCell(3, 8)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        x, state = torch.randn(2, 3), torch.zeros(2, 8)
        cell(x.clone(), state.clone())
        tensors = [x, state]
        tensors.append(cell(x, state))
        dead = [weakref.ref(tensor) for tensor in tensors]
        assert isinstance(trace._recorder.journal._entries[-1], SeriesGroup)
        del x, state, tensors
        assert [reference() for reference in dead] == [None] * 3


def test_a_series_has_room_for_as_many_calls_as_were_alike(patient, monkeypatch) -> None:
    capacities: list[int] = []
    make = SeriesBuffer.__init__

    def noted(buffer: SeriesBuffer, *args: Any, **kwargs: Any) -> None:
        make(buffer, *args, **kwargs)
        capacities.append(buffer.capacity)

    monkeypatch.setattr(SeriesBuffer, "__init__", noted)
    cell = nn.GRUCell(3, 8)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred"):
        for _ in range(600):
            cell(torch.randn(2, 3))
    assert capacities == [4, 8, 16, 32, 64, 128, 256, 256]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("steps", [7, 20, 33])
def test_each_sequence_of_a_decoder_is_one_series(steps, trains, patient, monkeypatch) -> None:
    """Once the first sequences have shown how long they are; also if each has new weights."""
    counts: list[int] = []
    end = series_buffer.Streak.end

    def noted(streak: series_buffer.Streak, series: SeriesBuffer) -> None:
        counts.append(series.count)
        end(streak, series)

    monkeypatch.setattr(series_buffer.Streak, "end", noted)
    torch.manual_seed(0)
    encoder, cell = nn.GRU(3, 4), nn.GRUCell(3, 4)
    model = nn.ModuleList([encoder, cell])
    with grutrace.trace(model, gates="deferred"):
        for sequence in range(12):
            state = encoder(torch.randn(5, 2, 3))[1][0]
            if sequence == 6:
                counts.clear()
            if trains:
                with torch.no_grad():
                    cell.weight_hh.mul_(0.99)
            for _ in range(steps):
                state = cell(torch.randn(2, 3), state)
    assert counts == [steps] * 6


def test_new_weights_of_a_series_count_as_bytes_that_wait(patient) -> None:
    cell = nn.GRUCell(3, 40)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        journal_of_trace = trace._recorder.journal
        sizes = []
        for _ in range(3):
            before = journal_of_trace.nbytes
            cell.weight_hh.mul_(0.99)
            for _ in range(4):
                cell(torch.randn(2, 3))
            sizes.append(journal_of_trace.nbytes - before)
        assert isinstance(journal_of_trace._entries[-1], SeriesGroup)
        weights = sum(weight.nbytes for weight in cell.parameters())
        assert all(size >= weights for size in sizes)
        trace.flush()
        assert journal_of_trace.nbytes == 0
