"""The journal: calls that wait are worked out in order, with the right weights, and are bounded."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.recording import (
    journal,
    journal_entry,
    module_recorder,
    site_recorder,
    tensor_copy,
    weight_versions,
)
from grutrace.capture.recording.series_buffer import SeriesGroup
from grutrace.capture.recording.tensor_copy import CopyBuffer
from grutrace.cli.info import proofs
from grutrace.storage.memory import MemorySink
from tests import oracles


@pytest.fixture
def dear(monkeypatch) -> None:
    """Weights are compared only where they must be, and no sample finds a change."""
    monkeypatch.setattr(weight_versions, "MAX_COMPARE_FRACTION", -1.0)
    monkeypatch.setattr(weight_versions, "SAMPLE_SECONDS", -1.0)
    monkeypatch.setattr(weight_versions._WeightFingerprint, "has_sample_of", lambda *_: True)


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_frozen_and_a_trained_cell(tokens, gates, to_file, dear, tmp_path) -> None:
    """Calls of the frozen one wait; new weights of the other come all the while."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.GRUCell(3, 8), "trained": nn.GRUCell(3, 8)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["trained"].parameters(), 0.1)
    expected: list[np.ndarray] = []
    with grutrace.trace(model, tmp_path / "a.h5" if to_file else None, gates=gates) as trace:
        for step in range(12):
            state = torch.randn(2, 8)
            for _ in range(tokens):
                state = model["frozen"](torch.randn(2, 3), state)
            weights = oracles.weights_of(model["trained"], "cell")
            previous, x = state.clone(), torch.randn(2, 3)
            model["trained"](x, state).square().sum().backward()
            step_gates = oracles.gates(weights, x.numpy(), previous.numpy(), 2**-20)
            expected.append(step_gates.values["update"])
            optimizer.step()
            optimizer.zero_grad()
            if step == 7:
                assert len(trace.calls) == 8 * (tokens + 1)
        order = (["frozen"] * tokens + ["trained"]) * 12
        assert trace.calls["module"].tolist() == order
        assert trace.calls["weights"][tokens :: tokens + 1].tolist() == list(range(12))
        update = np.concatenate([sequence.update for sequence in trace["trained.cell"]])
    np.testing.assert_allclose(update, np.concatenate(expected), rtol=0, atol=1e-5)
    assert "unproven" not in trace.calls["proof"]


@pytest.mark.parametrize("gates", ["background", "deferred"])
def test_gates_that_states_do_not_tell_are_not_called_proven(gates, dear) -> None:
    """From zeros, without biases, the reset gate has no influence: both weights fit the states."""
    torch.manual_seed(0)
    cell, x = nn.GRUCell(4, 8, bias=False).requires_grad_(False), torch.randn(2, 4)
    with grutrace.trace(cell, gates=gates) as trace:
        for call in range(4):
            cell(x)
            if call == 1:
                cell.weight_ih.data[3] += 2
        with pytest.warns(grutrace.ResidualWarning, match="call 1 are unproven"):
            assert trace["cell"].reset[:].shape == (8, 8)
    # The first call was compared, and so was what the weights are in the end.
    assert trace.calls["proof"].tolist() == ["proven", "unproven", "unproven", "unproven"]
    assert proofs(trace) == {
        "proven": 1, "unchecked": 0, "unproven": 3, "unproven_calls": [1, 2, 3],
    }  # fmt: skip
    # The control: where they are compared, everything is known.
    with grutrace.trace(cell, gates=gates, weights="exact") as exact:
        cell(x)
        cell.weight_ih.data[3] -= 2
        cell(x)
    assert exact.calls["proof"].tolist() == ["proven", "proven"]


def test_inline_gates_are_those_of_the_weights_whatever_the_states_tell(dear) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(4, 8, bias=False).requires_grad_(False), torch.randn(2, 4)
    with grutrace.trace(cell, gates="inline", record=["reset"]) as trace:
        cell(x)
        cell.weight_ih.data[3] += 2
        cell(x)
    expected = torch.sigmoid(x @ cell.weight_ih[:8].T)
    np.testing.assert_allclose(trace["cell"].reset[2:], expected.numpy(), rtol=0, atol=1e-6)
    assert trace.calls["weights"].tolist() == [0, 1]


def test_what_waits_behind_a_call_is_bounded(dear, tmp_path) -> None:
    model = nn.ModuleDict({"cell": nn.GRUCell(3, 8), "layer": nn.GRU(3, 64)})
    x = torch.randn(20, 4, 3)
    options = {"gates": "deferred", "buffer": "64 KiB"}
    with torch.no_grad(), grutrace.trace(model, tmp_path / "a.h5", **options) as trace:
        for call in range(30):
            if call < 3:
                model["cell"](x[0])
            model["layer"](x)
            assert trace._journal.nbytes <= 64 * 1024 + 2 * 20 * 4 * (64 + 3) * 4
    assert len(trace.calls) == 33


@pytest.mark.parametrize("gates", ["inline", "deferred"])
def test_a_decoder_that_does_not_stop_is_bounded(gates, patient) -> None:
    cell, state = nn.GRUCell(3, 8), torch.zeros(4, 8)
    found = set()
    with torch.no_grad(), grutrace.trace(cell, gates=gates, buffer="16 KiB") as trace:
        for _ in range(500):
            state = cell(torch.zeros(4, 3), state)
            found.add(trace._journal.nbytes)
        assert len(trace.calls) == 500
    assert 8 * 1024 < max(found) <= 16 * 1024


@pytest.mark.parametrize("buffer", [-1, "much", None, 2.5])
def test_a_wrong_buffer_is_one_error(buffer) -> None:
    with pytest.raises(grutrace.OptionError, match="buffer: expected a number of bytes, or a text"):
        grutrace.Tracer(nn.GRU(2, 3), buffer=buffer)


def test_nothing_waits_for_long(dear, monkeypatch) -> None:
    monkeypatch.setattr(journal, "MAX_SECONDS", 60)
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        cell(x)
        cell(x)
        assert len(trace._journal) == 2
        monkeypatch.setattr(journal, "MAX_SECONDS", 0.01)
        time.sleep(0.02)
        cell(x)
        assert len(trace._journal) == 0


def test_a_trace_that_was_emptied_knows_no_weights_of_before(dear) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(3, 8).requires_grad_(False), torch.randn(2, 3)
    other = torch.randn(24, 8)
    weight = cell.weight_hh.detach().clone()
    with grutrace.trace(cell, gates="background", check="off") as trace:
        cell(x, torch.ones(2, 8))
        cell.weight_hh.copy_(other)
        cell(x, torch.ones(2, 8))
        assert trace["cell"].update.shape == (4, 8)
        cell.weight_hh.copy_(weight)
        trace.clear()
        cell(x, torch.ones(2, 8))
        cell.weight_hh.data.copy_(other)
        cell(x, torch.ones(2, 8))
        cell.weight_hh.data.copy_(weight)
        cell(x, torch.ones(2, 8))
        assert trace["cell"].update.shape == (6, 8)
    assert trace.calls["weights"].tolist() == [0, 0, 0]
    assert trace.calls["proof"].tolist() == ["proven", "unproven", "proven"]


@pytest.fixture
def patient(monkeypatch) -> None:
    """No call is worked out because it has waited for long: a busy machine is slow."""
    monkeypatch.setattr(journal, "MAX_SECONDS", 600)
    monkeypatch.setattr(journal, "IDLE_SECONDS", 600)


@pytest.fixture(params=["cell", "gru", "packed", "stack", "batch first"])
def call(request):
    """A layer, and a call of it that returns what the user can change, and what it was given."""
    kind = request.param
    if kind == "cell":
        cell, x, h = nn.GRUCell(3, 8), torch.randn(2, 3), torch.randn(2, 8)
        return cell, lambda: (cell(x, h), x, h)
    options = {"stack": {"num_layers": 2}, "batch first": {"batch_first": True}}.get(kind, {})
    layer = nn.GRU(3, 8, **options)
    x, h = torch.randn(4, 2, 3), torch.randn(layer.num_layers, 2, 8)
    if kind == "batch first":
        x = x.transpose(0, 1).contiguous()
    if kind == "packed":

        def run():
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3]))
            output, _ = layer(packed, h)
            return output.data, packed.data, h

        return layer, run
    return layer, lambda: (layer(x, h)[0], x, h)


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_what_the_user_changes_after_a_call_is_not_recorded(call, gates, patient) -> None:
    torch.manual_seed(0)
    layer, run = call
    everything = ["reset", "update", "candidate", "hidden", "input"]
    with torch.no_grad(), grutrace.trace(layer, record=everything, gates="inline") as expected:
        run()
        expected.flush()
    with torch.no_grad(), grutrace.trace(layer, record=everything, gates=gates) as trace:
        changed = run()
        assert len(trace._journal) == 1
        for tensor in changed:
            tensor.fill_(7.0)
    for name in trace.sites:
        for quantity in everything:
            actual, exact = getattr(trace[name], quantity), getattr(expected[name], quantity)
            np.testing.assert_allclose(np.asarray(actual), np.asarray(exact), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(trace[name][0].initial, expected[name][0].initial)
    assert trace.calls["proof"].tolist() == ["proven"]


def test_copies_lie_in_memory_that_is_used_again(patient, monkeypatch) -> None:
    monkeypatch.setattr(tensor_copy, "SEGMENT_BYTES", 256)
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    addresses = []
    with torch.no_grad(), grutrace.trace(cell, gates="deferred") as trace:
        for _ in range(50):
            for _ in range(3):
                cell(x)
            first = trace._journal._entries[0]
            addresses.append(
                first.series[0].initial(0).data_ptr()
                if isinstance(first, SeriesGroup)
                else first[0].run.arguments[1].data_ptr()
            )
            assert len(trace.calls) % 3 == 0
    assert len({*addresses}) < 10


def test_memory_is_used_again_once_nothing_lies_in_it(monkeypatch) -> None:
    monkeypatch.setattr(tensor_copy, "SEGMENT_BYTES", 256)
    buffer, values = CopyBuffer(1024), torch.arange(8.0)
    copies = [buffer.copy(values + n) for n in range(6)]
    views = [copy.numpy()[2:] for copy in copies[:4]]
    addresses = [copy.data_ptr() for copy in copies]
    assert all(address % 64 == 0 for address in addresses)
    assert all(torch.equal(copy, values + n) for n, copy in enumerate(copies))
    # The first four fill a piece. An array still lies there, and the second is not full yet.
    copies.clear()
    later = [buffer.copy(values - n) for n in range(5)]
    assert addresses[0] not in {copy.data_ptr() for copy in later}
    for n, view in enumerate(views):
        np.testing.assert_array_equal(view, np.arange(2.0, 8.0) + n)
    # The control: nothing lies in either now.
    views.clear()
    del view
    later.clear()
    held = [buffer.copy(values) for _ in range(12)]
    assert addresses[0] in {copy.data_ptr() for copy in held}
    # Each lasts as long as it is held, on its own.
    assert buffer.copy_lasting(values).data_ptr() not in addresses
    assert torch.equal(buffer.copy(values.double()), values.double())
    assert torch.equal(buffer.copy(torch.ones(2, 0, 3)), torch.ones(2, 0, 3))
    assert torch.equal(buffer.copy(torch.ones(9, 9).T), torch.ones(9, 9))


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
@pytest.mark.parametrize("form", ["batch_first", "by time", "one step", "cell"])
def test_rows_that_are_the_copies_are_not_written_over(form, gates, patient, monkeypatch) -> None:
    monkeypatch.setattr(tensor_copy, "SEGMENT_BYTES", 4096)
    torch.manual_seed(0)
    steps = {"batch_first": 4, "by time": 4, "one step": 1, "cell": 1}[form]
    model = nn.GRUCell(3, 8) if form == "cell" else nn.GRU(3, 8, batch_first=form == "batch_first")
    inputs, outputs = [], []
    with torch.no_grad(), grutrace.trace(model, gates=gates, record=["hidden", "input"]) as trace:
        for _ in range(50):
            x = torch.randn(2, steps, 3)
            argument = {"batch_first": x, "cell": x[:, 0]}.get(form, x.transpose(0, 1))
            made = model(argument)
            made = made if form == "cell" else made[0]
            rows = made if form in ("cell", "batch_first") else made.transpose(0, 1)
            outputs.append(rows.clone().reshape(-1, 8))
            inputs.append(x.reshape(-1, 3).clone())
            argument.fill_(9)
            made.fill_(9)
            x.fill_(9)
            del argument, made, rows
    site = trace["cell" if form == "cell" else "l0"]
    np.testing.assert_array_equal(site.hidden, torch.cat(outputs))
    np.testing.assert_array_equal(site.input, torch.cat(inputs))


def test_the_precision_of_a_call_is_that_of_its_autocast() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 8), torch.randn(5, 2, 3)
    with torch.no_grad(), grutrace.trace(layer, gates="inline") as trace:
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x)
        # Looked at where another precision is in force.
        with torch.autocast("cpu", torch.bfloat16):
            assert len(trace.calls) == 3
    assert trace["l0"].checks["precision"].tolist() == [2.0**-23, 2.0**-7, 2.0**-23]
    assert trace.calls["proof"].tolist() == ["proven"] * 3


def test_a_model_that_pauses_leaves_nothing_in_memory(monkeypatch, patient, tmp_path) -> None:
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    with torch.no_grad(), grutrace.trace(cell, tmp_path / "a.h5", gates="inline") as trace:
        for _ in range(3):
            cell(x)
        assert len(trace._journal) == 3
        monkeypatch.setattr(journal, "IDLE_SECONDS", 0.4)
        with grutrace.open(tmp_path / "a.h5") as reader:
            end = time.monotonic() + 20
            while len(reader.calls) < 3 and time.monotonic() < end:
                time.sleep(0.05)
                reader.refresh()
            assert len(reader.calls) == 3
        assert len(trace._journal) == 0


def test_what_a_writers_thread_cannot_work_out_is_left_to_the_models(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(journal, "MAX_SECONDS", 600)
    record, tried = module_recorder.ModuleRecorder.record, []

    def failing(self, entry):
        if threading.current_thread().name == "grutrace writer":
            tried.append(entry)
            raise RuntimeError("not here")
        return record(self, entry)

    monkeypatch.setattr(module_recorder.ModuleRecorder, "record", failing)
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    with torch.no_grad(), grutrace.trace(cell, tmp_path / "a.h5") as trace:
        state = cell(x)
        cell(x, state)
        end = time.monotonic() + 20
        while not tried and time.monotonic() < end:
            time.sleep(0.05)
        assert tried
        assert len(trace._journal) == 2
    assert trace["cell"].lengths.tolist() == [2, 2]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["flush", "look", "close", "block"])
@pytest.mark.parametrize("path", [None, "a.h5"])
def test_nothing_is_lost_where_warnings_are_errors(how, path, tmp_path) -> None:
    """The warning comes out once, when the calls are in the trace, and the file is complete."""
    layer, x = nn.GRU(2, 3), torch.full((4, 2, 2), 1e5)
    options = {"record": ["update", "input"], "dtype": "float16", "gates": "inline"}
    trace = grutrace.Tracer(layer, path and tmp_path / path, **options)
    expected = pytest.raises(grutrace.GrutraceWarning, match="float16 holds")
    with torch.no_grad():
        if how == "block":
            with expected, trace.recording(tag="a", tokens=[["a"] * 4, ["b"] * 4]):
                layer(x)
            assert not trace.is_recording
            assert trace["l0"][1].tokens == ["b"] * 4
        else:
            trace.start()
            layer(x)
            with expected:
                len(trace.calls) if how == "look" else getattr(trace, how)()
    assert len(trace.calls) == 1
    trace.close()
    if path is not None:
        with grutrace.open(tmp_path / path) as read:
            assert read.closed
            assert read["l0"].lengths.tolist() == [4, 4]


def test_an_interruption_loses_no_call_that_waits(monkeypatch, patient) -> None:
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    record = module_recorder.ModuleRecorder.record
    counts = iter(range(100))

    def interrupted(self, entry):
        if next(counts) == 1:
            raise KeyboardInterrupt
        return record(self, entry)

    # Calls that wait one by one; those of a series are in test_series.py.
    monkeypatch.setattr(journal, "can_join_series", lambda _: False)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        state = None
        for _ in range(4):
            state = cell(x, state)
        monkeypatch.setattr(module_recorder.ModuleRecorder, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trace.flush()
        assert len(trace._journal) == 3
    assert trace["cell"].lengths.tolist() == [4, 4]


@pytest.mark.parametrize("has_it", [False, True])
def test_an_interruption_in_the_sink_loses_no_call(has_it, monkeypatch, patient) -> None:
    cell, x = nn.GRUCell(3, 8), torch.randn(2, 3)
    append, counts = MemorySink.append, iter(range(100))

    def interrupted(self, record):
        number = next(counts)
        if has_it or number != 3:
            append(self, record)
        if number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "can_join_series", lambda _: False)
    with torch.no_grad(), grutrace.trace(cell) as trace:
        for _ in range(6):
            cell(x)
        # The weights come first, then the calls.
        monkeypatch.setattr(MemorySink, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trace.flush()
        monkeypatch.setattr(MemorySink, "append", append)
        assert len(trace._journal) == (3 if has_it else 4)
        trace.flush()
        assert len(trace.calls) == trace._guarded_sink.calls == 6
    assert len(trace["cell"]) == 12


def test_calls_of_several_threads_are_all_there() -> None:
    cell = nn.GRUCell(3, 8)
    with grutrace.trace(cell) as trace:

        def run() -> None:
            with torch.no_grad():
                state = torch.randn(2, 8)
                for _ in range(200):
                    # Always others, or all threads come to rest in the same state.
                    state = cell(torch.randn(2, 3), state)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            trace.flush()
    assert trace["cell"].lengths.tolist() == [200] * 6
    assert "unproven" not in trace.calls["proof"]


def test_a_call_that_comes_while_the_journal_is_drained(monkeypatch) -> None:
    """Another thread notes it just when the calls that wait are looked through."""
    cell, x, others = nn.GRUCell(3, 8), torch.randn(2, 3), []

    def call() -> None:
        with torch.no_grad():
            cell(x)

    class Entry(journal_entry.JournalEntry):
        @property
        def is_certain(self):
            if trace._journal.lock._is_owned() and len(others) < 3:
                others.append(threading.Thread(target=call))
                others[-1].start()
                others[-1].join()
            return self.certain

        @is_certain.setter
        def is_certain(self, value):
            self.certain = value

    monkeypatch.setattr(module_recorder, "JournalEntry", Entry)
    with grutrace.trace(cell, gates="deferred") as trace:
        call()
        call()
        trace.flush()
    assert len(others) == 3
    assert len(trace.calls) == 5


@pytest.mark.parametrize("form", ["cell", "one step", "batch_first", "two layers", "bidirectional"])
def test_calls_that_wait_are_replayed_together_bit_for_bit(form, patient, monkeypatch) -> None:
    # With the library, the kernel's own gates are kept, except of several layers or directions.
    monkeypatch.setattr(module_recorder, "load", lambda: None)
    torch.manual_seed(0)
    kinds = {
        "cell": lambda: nn.GRUCell(3, 19),
        "batch_first": lambda: nn.GRU(3, 19, batch_first=True),
        "two layers": lambda: nn.GRU(3, 19, 2),
        "bidirectional": lambda: nn.GRU(3, 19, bidirectional=True),
    }
    model = kinds.get(form, lambda: nn.GRU(3, 19))()
    inputs = torch.randn(40, 5, 3)
    together = 0
    replay = site_recorder.replay_calls

    def counted(calls, weights):
        nonlocal together
        together += len(calls)
        return replay(calls, weights)

    monkeypatch.setattr(site_recorder, "replay_calls", counted)

    def traced(**options):
        with torch.no_grad(), grutrace.trace(model, gates="inline", **options) as trace:
            state = None
            for x in inputs:
                x_given = x if form == "cell" else x[:, None] if form == "batch_first" else x[None]
                made = model(x_given, state)
                state = made if form == "cell" else made[1]
        return trace

    actual = traced()
    sites = {"two layers": 2, "bidirectional": 2}.get(form, 1)
    assert together == 40 * sites
    # With a limit each call is worked out on its own: the control is that none is counted.
    expected = traced(max_calls=1000)
    assert together == 40 * sites
    for name in actual.sites:
        for quantity in ("reset", "update", "candidate", "hidden"):
            values = np.asarray(getattr(actual[name], quantity))
            np.testing.assert_array_equal(values, np.asarray(getattr(expected[name], quantity)))
        assert actual[name].residual == expected[name].residual


@pytest.mark.parametrize("gates", ["inline", "deferred"])
@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_calls_without_rows_or_inputs_are_recorded(shape, gates, patient) -> None:
    cell = nn.GRUCell(shape[1], 3)
    with torch.no_grad(), grutrace.trace(cell, gates=gates) as trace:
        for _ in range(3):
            cell(torch.zeros(shape))
    assert trace["cell"].update.shape == (3 * shape[0], 3)
    assert len(trace.calls) == 3


def test_calls_of_several_versions_and_precisions_keep_apart(patient) -> None:
    torch.manual_seed(0)
    cell, inputs = nn.GRUCell(3, 8), torch.randn(12, 2, 3)
    with torch.no_grad(), grutrace.trace(cell, gates="inline") as trace:
        for number, x in enumerate(inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=number % 3 == 1):
                cell(x)
            if number % 4 == 3:
                cell.weight_hh.mul_(1.5)
    assert trace.calls["weights"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "unproven" not in trace.calls["proof"]
    assert trace["cell"].residual < 1e-2
