"""Tests of running statistics, against a full trace of the same run.

The full trace replays its gates with each call, as counting does: so both have the same bits.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture.recording import site_recorder
from grutrace.statistics import sink as feed
from grutrace.statistics.accumulator import QuantityAccumulator
from grutrace.storage.open import open_sink
from grutrace.storage.write import writer_thread
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tests.statistics.oracle import assert_figures, assert_same
from tests.storage import coded
from tests.test_both_sinks import run


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder(layers=2, dropout=0.3)


def recorded(model, path=None, gates="inline", **options):
    """Statistics and a full trace of the same run."""
    statistics = grutrace.Statistics()
    with (
        grutrace.trace(model, record=EVERYTHING, sink=statistics) as counting,
        grutrace.trace(model, path, record=EVERYTHING, gates=gates, **options) as full,
    ):
        run(model, counting, full)
    return statistics, full


def test_running_statistics_equal_those_of_the_full_trace(model) -> None:
    statistics, full = recorded(model)
    assert_same(statistics, grutrace.Statistics.of(full))
    assert statistics.sites == full.sites
    assert statistics.calls == len(full.calls)
    assert statistics.sequences == len(full.sequences)
    assert statistics.steps == full.calls["steps"].sum()
    for name in full.sites:
        for quantity in EVERYTHING:
            assert_figures(statistics[name][quantity], np.asarray(full[name].rows(quantity)))
        assert statistics[name].residual == full[name].residual
        worst = statistics[name].residual_call
        assert full.calls["residual"][worst] >= statistics[name].residual
        assert statistics[name].versions == full[name].extent.versions


def test_statistics_of_a_file_equal_those_of_memory(model, tmp_path) -> None:
    statistics, full = recorded(model, tmp_path / "run.h5")
    with grutrace.open(tmp_path / "run.h5") as opened:
        assert_same(statistics, grutrace.Statistics.of(opened))
    assert_same(grutrace.Statistics.of(full), statistics)


def test_control_statistics_of_another_run_differ(model) -> None:
    statistics, _ = recorded(model)
    _, full = recorded(model)
    with pytest.raises(AssertionError):
        assert_same(statistics, grutrace.Statistics.of(full))


def test_control_missing_rows_are_detected(model, monkeypatch) -> None:
    add = QuantityAccumulator.add
    monkeypatch.setattr(QuantityAccumulator, "add", lambda tally, rows: add(tally, rows[1:]))
    statistics, full = recorded(model)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same(statistics, grutrace.Statistics.of(full))


def test_statistics_of_a_deferred_trace() -> None:
    """Derived gates differ from the kernel's only by rounding, so only the counts are equal."""
    torch.manual_seed(0)
    layer = nn.GRU(3, 5, 2, bidirectional=True)
    with grutrace.trace(layer) as full, grutrace.trace(layer, gates="deferred") as deferred:
        layer(torch.randn(40, 7, 3))
    result, expected = grutrace.Statistics.of(deferred), grutrace.Statistics.of(full)
    for name in full.sites:
        for quantity in ("reset", "update", "candidate", "hidden"):
            assert_figures(result[name][quantity], np.asarray(deferred[name].rows(quantity)))
            np.testing.assert_allclose(
                result[name][quantity].mean, expected[name][quantity].mean, atol=1e-6
            )
        assert np.isnan(result[name].residual)
        assert result[name].residual_call == -1
    assert np.isnan(result.residual)


def test_statistics_can_be_read_while_counting(model) -> None:
    model.eval()
    statistics = grutrace.Statistics()
    assert (statistics.sites, statistics.calls, statistics.nbytes) == ((), 0, 0)
    with grutrace.trace(model, sink=statistics), grutrace.trace(model, gates="inline") as full:
        for _ in range(3):
            model(torch.randn(2, 3, 5))
            values = np.asarray(full["encoder.l1"].update)
            assert_figures(statistics["encoder.l1"].update, values)
            before = statistics["encoder.l1"].update
        model(torch.randn(2, 3, 5))
    assert before.count.tolist() == [len(values)] * 6
    with pytest.raises(ValueError, match="read-only"):
        before.count[0] = 1
    assert "3 sites, 16 calls" in repr(statistics)


def test_a_trace_of_a_statistics_sink_says_that_it_has_no_rows(model) -> None:
    statistics = grutrace.Statistics()
    with grutrace.trace(model, sink=statistics) as trace:
        model(torch.randn(2, 3, 5))
        assert trace.sites == ("encoder.l0", "encoder.l1", "decoder.cell")
        assert trace.header.model.endswith("EncoderDecoder")
        site = trace["encoder.l0"]
        for read in (
            lambda: site.update,
            lambda: site.sequence(0),
            lambda: site.residual,
            lambda: site.weights(),
            lambda: site.padded("update"),
            lambda: site.preactivation("update"),
            lambda: len(site),
            lambda: trace.calls,
            lambda: trace.sequences,
            lambda: grutrace.Statistics.of(trace),
        ):
            with pytest.raises(grutrace.NotRecordedError, match=r"figures only.*statistics\[site"):
                read()
        assert repr(trace).endswith("in statistics: 3 sites>")
        with pytest.raises(grutrace.NotRecordedError, match="'other' was not recorded"):
            _ = trace["other"]


def test_quantities_that_were_not_counted_are_an_error(model) -> None:
    statistics = grutrace.Statistics()
    with pytest.raises(grutrace.NotRecordedError, match="counted sites: none"):
        _ = statistics["encoder.l0"]
    with grutrace.trace(model, record="update", sink=statistics):
        model(torch.randn(2, 3, 5))
    with pytest.raises(grutrace.NotRecordedError, match=r"'other'.*'encoder.l0', 'encoder.l1'"):
        _ = statistics["other"]
    with pytest.raises(grutrace.NotRecordedError, match=r"'reset' was not counted.*only update"):
        _ = statistics["encoder.l0"].reset


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gates": "deferred"}, "gates and sink: expected gates='inline'"),
        ({"gates": "deferred", "path": "run.h5"}, "gates and sink: expected gates='inline'"),
        ({"log": ("loss",)}, "sink: not possible with log"),
        ({"sink": 3}, "sink: expected a grutrace.Statistics, found 3"),
    ],
)
def test_incompatible_options(options, said, model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(grutrace.OptionError, match=said):
        grutrace.Tracer(model, **{"sink": grutrace.Statistics(), **options})
    assert not list(tmp_path.iterdir())


def test_tracing_works_as_with_another_sink(model) -> None:
    """Tags, recording blocks, residual checks."""
    statistics = grutrace.Statistics()
    tracer = grutrace.Tracer(model, sites="encoder.*", sink=statistics, recording=False)
    batch = torch.randn(2, 3, 5)
    with tracer:
        model(batch)
        with tracer.recording("valid", tokens=[list("the"), list("a")]):
            model.encoder(batch)
        model(batch)
        tracer.start()
        model.encoder(batch)
        tracer.stop()
        tracer.flush()
        assert (statistics.calls, statistics.annotations) == (2, 2)
        assert statistics["encoder.l0"].versions == 1
    with pytest.raises(grutrace.StateError, match="closed"):
        tracer.start()


def test_a_large_residual_warns(monkeypatch) -> None:
    layer = nn.GRU(2, 3)
    statistics = grutrace.Statistics()
    replay = site_recorder.GateReplay.replay
    monkeypatch.setattr(
        site_recorder.GateReplay,
        "replay",
        lambda *arguments: dataclasses.replace(replay(*arguments), residual=0.5),
    )
    with grutrace.trace(layer, sink=statistics) as trace:
        layer(torch.randn(4, 2))
        with pytest.warns(grutrace.ResidualWarning, match="l0"):
            trace.flush()
        layer(torch.randn(4, 2))
    assert (statistics.residual, statistics["l0"].residual_call) == (0.5, 0)


def test_a_model_with_nan(model) -> None:
    layer = nn.GRU(2, 3)
    statistics = grutrace.Statistics()
    with (
        grutrace.trace(layer, sink=statistics, check="off"),
        grutrace.trace(layer, check="off", gates="inline") as full,
    ):
        layer(torch.randn(40, 2))
        with torch.no_grad():
            layer.weight_ih_l0[3] = torch.nan
        layer(torch.randn(40, 2))
    update = statistics["l0"].update
    assert update.nan.tolist() == [40, 0, 0] or update.nan.sum() >= 40
    assert_figures(update, np.asarray(full["l0"].update))
    assert np.isfinite(update.mean).all()
    assert_same(statistics, grutrace.Statistics.of(full))


def test_several_tracers_count_into_one(model) -> None:
    model.eval()
    batch = torch.randn(2, 3, 5)
    statistics = grutrace.Statistics()
    for _ in range(2):
        with grutrace.trace(model, sink=statistics):
            model(batch)
    with grutrace.trace(model) as full:
        model(batch)
        model(batch)
    once = grutrace.Statistics.of(full)
    assert statistics["encoder.l0"].update.count.tolist() == [12] * 6
    assert statistics["encoder.l0"].versions == 2, "each tracer tells versions by itself"
    assert_figures(statistics["decoder.cell"].hidden, np.asarray(full["decoder.cell"].hidden))
    assert statistics.steps == once.steps
    with pytest.raises(
        grutrace.OptionError,
        match=r"statistics do not match: sites: expected \['encoder.l0'.*found \['l0'\]",
    ):
        grutrace.Tracer(nn.GRU(2, 3), sink=statistics)
    with pytest.raises(
        grutrace.OptionError, match=r"units of 'encoder.l0': expected \{'reset': 6.*'update': 6\}"
    ):
        grutrace.Tracer(model, record="update", sink=statistics)


def test_merging(model) -> None:
    model.eval()
    halves = [grutrace.Statistics(), grutrace.Statistics()]
    batches = [torch.randn(3, 7, 5), torch.randn(2, 4, 5)]
    with grutrace.trace(model, gates="inline") as full:
        for half, batch in zip(halves, batches, strict=True):
            with grutrace.trace(model, sink=half):
                model(batch)
    before = halves[0].steps
    merged = halves[0].merge(halves[1])
    whole = grutrace.Statistics.of(full)
    for name in whole.sites:
        for quantity in ("reset", "update", "candidate", "hidden"):
            assert_figures(merged[name][quantity], np.asarray(full[name].rows(quantity)))
        assert merged[name].residual == whole[name].residual
        assert merged[name].residual_call == whole[name].residual_call
    assert (merged.calls, merged.steps) == (whole.calls, whole.steps)
    assert (halves[0].steps, halves[1].calls) == (before, 4)
    nothing = grutrace.Statistics()
    assert_same(merged.merge(nothing), merged, exactly=True)
    assert_same(nothing.merge(merged), merged, exactly=True)
    assert nothing.merge(grutrace.Statistics()).sites == ()
    assert_same(pickle.loads(pickle.dumps(merged)), merged, exactly=True)
    with pytest.raises(grutrace.OptionError, match="bins: expected 32, found 8"):
        merged.merge(grutrace.Statistics(bins=8))
    with pytest.raises(grutrace.OptionError, match="bins: expected 32, found 8"):
        merged.merge(grutrace.Statistics.of(full, bins=8))
    with pytest.raises(grutrace.OptionError, match=r"expected a grutrace\.Statistics, found 3"):
        merged.merge(3)


def memory_after(sink, calls):
    """Bytes that are held of so many calls of 16 sequences of 64 steps each. NumPy's count."""
    sink.append(coded.weights())
    gc.collect()
    tracemalloc.start()
    for call in range(calls):
        sink.append(coded.block(call, "big"))
    sink.flush()
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sink.close()
    return held


@pytest.mark.measures
def test_memory_does_not_grow_with_the_run() -> None:
    call = coded.block(0, "big").nbytes
    few, many = grutrace.Statistics(), grutrace.Statistics()
    held = memory_after(few.attach(coded.HEADER), 5)
    assert memory_after(many.attach(coded.HEADER), 50) - held < call / 10
    assert few.nbytes == many.nbytes < 64 * 1024
    assert many["rnn.l0"].steps == 10 * few["rnn.l0"].steps == 50 * 16 * 64
    control = memory_after(open_sink(None, coded.HEADER), 50)
    assert control > 45 * call, "the control: a trace in memory grows"


@pytest.mark.measures
def test_a_long_recording_keeps_no_calls() -> None:
    torch.manual_seed(0)
    layer, batch = nn.GRUCell(8, 32), torch.randn(16, 8)
    held = []
    for calls in (100, 1000):
        statistics = grutrace.Statistics()
        with grutrace.trace(layer, sink=statistics) as tracer, torch.no_grad():
            state = layer(batch)
            gc.collect()
            tracemalloc.start()
            for _ in range(calls):
                state = layer(batch, state)
            tracer.flush()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()
        assert statistics["cell"].sequences == 16
        assert statistics.calls == calls + 1
    assert held[1] - held[0] < 64 * 1024


def test_an_error_in_the_thread_reaches_the_next_call(monkeypatch) -> None:
    layer = nn.GRU(2, 3)
    statistics = grutrace.Statistics()
    with grutrace.trace(layer, sink=statistics) as tracer:
        layer(torch.randn(4, 2))
        tracer.flush()
        monkeypatch.setattr(QuantityAccumulator, "add", lambda *_: 1 / 0)
        layer(torch.randn(4, 2))
        with pytest.raises(grutrace.SinkError, match=r"grutrace\.Statistics: .*division by zero"):
            tracer.flush()
        with pytest.raises(grutrace.SinkError, match="division by zero"):
            layer(torch.randn(4, 2))
    assert statistics["l0"].update.count.tolist() == [4] * 3


def test_an_unreferenced_tracer_ends_its_thread() -> None:
    layer = nn.GRU(2, 3)
    statistics = grutrace.Statistics()
    tracer = grutrace.Tracer(layer, sink=statistics)
    tracer.start()
    layer(torch.randn(4, 2))
    del layer
    with pytest.warns(grutrace.GrutraceWarning, match="a tracer was garbage-collected"):
        del tracer
    gc.collect()
    end = time.monotonic() + 5
    while writer_thread._running and time.monotonic() < end:
        time.sleep(0.01)
    assert not writer_thread._running
    assert statistics["l0"].steps == 4


def test_a_full_queue_makes_the_model_wait(monkeypatch) -> None:
    monkeypatch.setattr(feed, "QUEUE_BYTES", 1)
    monkeypatch.setattr(feed, "BATCH_BYTES", 1)
    add, opened = QuantityAccumulator.add, threading.Event()

    def held(tally, rows):
        assert opened.wait(20)
        add(tally, rows)

    monkeypatch.setattr(QuantityAccumulator, "add", held)
    layer, done = nn.GRU(2, 3), []
    statistics = grutrace.Statistics()

    def work() -> None:
        for _ in range(6):
            layer(torch.randn(4, 2))
            done.append(1)

    with grutrace.trace(layer, sink=statistics, buffer=1):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.3)
        assert len(done) < 6
        opened.set()
        thread.join(20)
    assert statistics.calls == 6


FORGOTTEN = """
import torch, grutrace
layer = torch.nn.GRU(2, 3)
tracer = grutrace.Tracer(layer, sink=grutrace.Statistics("stats.h5"))
tracer.start()
for _ in range(5):
    layer(torch.randn(4, 2))
"""


def test_open_statistics_are_saved_at_exit(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORGOTTEN],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert grutrace.Statistics.load(tmp_path / "stats.h5").steps == 20


def _in_a_child(statistics, layer, answers) -> None:
    import warnings

    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        layer(torch.zeros(4, 2))
    try:
        statistics["l0"]
    except grutrace.StateError as error:
        answers.put((len(messages), str(error)))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
def test_a_forked_child_does_not_change_the_statistics(tmp_path) -> None:
    layer, path = nn.GRU(2, 3), tmp_path / "stats.h5"
    statistics = grutrace.Statistics(path)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with grutrace.trace(layer, sink=statistics):
        layer(torch.randn(4, 2))
        child = context.Process(target=_in_a_child, args=(statistics, layer, answers))
        child.start()
        warned, message = answers.get()
        child.join()
        layer(torch.randn(4, 2))
    assert warned == 1
    assert "forked child" in message
    assert statistics.calls == 2
    assert grutrace.Statistics.load(path).calls == 2


def test_loading_statistics_loads_no_torch(tmp_path: Path) -> None:
    layer, path = nn.GRU(2, 3), tmp_path / "stats.h5"
    with grutrace.trace(layer, sink=grutrace.Statistics(path)):
        layer(torch.randn(4, 2))
    code = (
        "import sys, grutrace; assert not {'h5py', 'torch'} & set(sys.modules); "
        f"grutrace.Statistics.load({str(path)!r})['l0'].update.mean; assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
