"""A tracer without a path: saved, pickled and cleared."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.errors import OptionError, StateError
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import EVERYTHING
from tests.runs import check_gates
from tests.test_both_sinks import assert_same, run


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder(layers=2, dropout=0.3)


@pytest.mark.parametrize("gates", ["inline", "background", "deferred"])
def test_a_saved_trace_equals_the_run_and_verifies(gates: Any, model, tmp_path: Path) -> None:
    options: Any = {"gates": gates}
    if gates != "deferred":
        options["record"] = EVERYTHING
    with grutrace.trace(model, **options) as trace:
        run(model, trace)
        trace.save(tmp_path / "early.h5")
        model(torch.randn(2, 3, 5))
    trace.save(tmp_path / "run.h5")
    with grutrace.open(tmp_path / "run.h5") as stored:
        assert stored.closed
        assert (stored.header.options, stored.header.created) == (
            trace.header.options, trace.header.created
        )  # fmt: skip
        assert_same_stored(trace, stored)
        np.testing.assert_array_equal(stored.calls["time"], trace.calls["time"])
        assert all(check.holds for check in verify(stored))
        if gates != "deferred":
            assert_same(trace, stored)
            check_gates(stored)
    with grutrace.open(tmp_path / "early.h5") as early:
        assert len(early.calls) < len(trace.calls)
        assert early.closed


def assert_same_stored(a: Any, b: Any) -> None:
    """What is stored, and not derived anew, is the same bit for bit."""
    assert a.sites == b.sites
    for name in a.sites:
        for quantity in a[name].site.quantities:
            np.testing.assert_array_equal(a[name].rows(quantity), b[name].rows(quantity))
        np.testing.assert_array_equal(a[name].initial, b[name].initial)


def test_control_a_damaged_saved_file_fails_verification(model, tmp_path: Path) -> None:
    import h5py

    with grutrace.trace(model) as trace:
        model(torch.randn(2, 3, 5))
    trace.save(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5", "r+") as file:
        file["modules/encoder/l0/hidden"][0, 0] += 0.5
    with grutrace.open(tmp_path / "run.h5") as stored:
        assert not all(check.holds for check in verify(stored))


def test_a_recording_tracer_is_pickled_without_its_hooks(model) -> None:
    with grutrace.trace(model, record=EVERYTHING) as trace:
        run(model, trace)
        copies = [pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)]
        calls = len(trace.calls)
        model(torch.randn(2, 3, 5))
        assert len(trace.calls) > calls
    for other in copies:
        assert type(other) is grutrace.Trace
        assert not hasattr(other, "start")
        assert len(other.calls) == calls
        check_gates(other)
        with pytest.raises(AssertionError):
            assert_same(trace, other)
    assert_same(trace, pickle.loads(pickle.dumps(trace)))


def test_a_tracer_to_a_file_is_pickled_as_its_path(model, tmp_path: Path) -> None:
    with grutrace.trace(model, tmp_path / "run.h5") as trace:
        model(torch.randn(2, 3, 5))
        data = pickle.dumps(trace)
        with pytest.raises(StateError, match=r"run\.h5"):
            trace.clear()
        with pytest.raises(StateError, match=r"run\.h5"):
            trace.save(tmp_path / "other.h5")
    with pickle.loads(data) as other:
        assert len(other.calls) == 4
    # Its rows could be given to nobody: they are in no trace.
    with grutrace.trace(model, sink=grutrace.Statistics()) as counted:
        model(torch.randn(2, 3, 5))
        for refused in (counted.clear, lambda: counted.save(tmp_path / "other.h5")):
            with pytest.raises(StateError, match="only a trace in memory"):
                refused()
        assert pickle.loads(pickle.dumps(counted)).sites == counted.sites
    assert not (tmp_path / "other.h5").exists()


def test_a_model_that_holds_its_tracer_copies_and_saves(model, tmp_path: Path) -> None:
    with grutrace.trace(model) as trace:
        model.tracer = trace
        model(torch.randn(2, 3, 5))
        other = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        del model.tracer
        for restored in (other, loaded):
            restored(torch.randn(2, 3, 5))
            assert len(restored.tracer.calls) == 4
        assert len(trace.calls) == 4


def test_numbers_restart_after_clearing(model) -> None:
    with grutrace.trace(model, record=EVERYTHING) as cleared:
        model(torch.randn(3, 4, 5))
        site = cleared["encoder.l0"]
        sequence = site[1]
        before = sequence.hidden
        cleared.clear()
        assert (len(cleared.calls), len(site), cleared.nbytes) == (0, 0, 0)
        with grutrace.trace(model, record=EVERYTHING) as fresh:
            run(model, cleared, fresh)
        assert_same(cleared, fresh)
        check_gates(cleared)
    np.testing.assert_array_equal(sequence.hidden, before)
    assert len(site) == len(fresh["encoder.l0"])


def test_a_sequence_restarts_from_its_last_state_after_clearing() -> None:
    torch.manual_seed(0)
    decoder = StepwiseDecoder().eval()
    with grutrace.trace(decoder, record=EVERYTHING) as trace, torch.no_grad():
        token, state = torch.randn(1, 2, 4), torch.randn(2, 2, 6)
        for _ in range(3):
            token, state = decoder.rnn(token, state)
            token = token[..., :4]
        reached = state.clone()
        trace.clear()
        for _ in range(4):
            token, state = decoder.rnn(token, state)
            token = token[..., :4]
    site = trace["rnn.l1"]
    assert len(site) == 2
    assert site.lengths.tolist() == [4, 4]
    np.testing.assert_array_equal(site.initial, reached[1].numpy())
    check_gates(trace)


def test_annotations_after_clearing_go_to_later_calls(model) -> None:
    words = [["a", "b", "c"], ["d", "e", "f"]]
    with grutrace.trace(model) as trace:
        with trace.recording() as outer:
            model(torch.randn(2, 3, 5), steps=2)
            trace.clear()
            model(torch.randn(2, 3, 5), steps=2)
            outer.annotate(tokens=words, module="encoder")
        assert [sequence.tokens for sequence in trace["encoder.l0"]] == words
        trace.clear()
        with pytest.raises(OptionError, match="nothing was recorded"):
            outer.annotate(tokens=words)
        model(torch.randn(2, 3, 5))
        with pytest.raises(OptionError, match="nothing was recorded"):
            outer.annotate(tokens=words)
        assert trace["encoder.l0"][0].tokens is None


def test_limits_restart_after_clearing(model) -> None:
    batch = torch.randn(2, 3, 5)
    with grutrace.trace(model, sites="encoder.*", max_calls=2) as trace:
        for _ in range(3):
            model(batch)
        assert len(trace.calls) == 2
        assert not trace.is_recording
        trace.clear()
        trace.start()
        for _ in range(3):
            model(batch)
        assert len(trace.calls) == 2
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, steps=slice(1, 3)) as trace:
        for _ in range(2):
            layer(torch.randn(5, 2, 3))
            assert trace["l0"].lengths.tolist() == [2, 2]
            trace.clear()


def test_clearing_frees_the_memory() -> None:
    layer = nn.GRU(4, 8)
    with grutrace.trace(layer, gates="inline") as trace:
        layer(torch.randn(50, 4, 4))
        snapshot = weakref.ref(trace.snapshot)
        source = weakref.ref(trace.snapshot.source)
        trace.clear()
        gc.collect()
        assert snapshot() is None
        assert source() is None


def test_clearing_while_another_thread_runs_the_model() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(3, 4)
    batches = [torch.randn(5, 2, 3) for _ in range(200)]
    errors: list[BaseException] = []

    def call() -> None:
        try:
            for batch in batches:
                layer(batch)
        except BaseException as error:
            errors.append(error)

    with grutrace.trace(layer, record=EVERYTHING, gates="inline") as trace:
        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            trace.clear()
            len(trace.calls)
        thread.join()
        layer(batches[0])
        assert not errors
        assert (trace.calls["weights"] == 0).all()
        assert len(trace["l0"]) == 2 * len(trace.calls)
        check_gates(trace)
