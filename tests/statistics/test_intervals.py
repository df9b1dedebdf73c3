"""Statistics beside a file, and of the interval since the last `pop`, against the rows."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.statistics.accumulator import Accumulator
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tests.statistics.oracle import assert_figures, assert_same
from tests.test_both_sinks import run


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder(layers=2, dropout=0.3)


def test_statistics_beside_a_file_equal_those_of_its_rows(model, tmp_path: Path) -> None:
    statistics = grutrace.Statistics()
    with (
        grutrace.trace(model, tmp_path / "a.h5", record=EVERYTHING, sink=statistics) as counted,
        grutrace.trace(model, tmp_path / "b.h5", record=EVERYTHING) as plain,
    ):
        run(model, counted, plain)
    with grutrace.open(tmp_path / "a.h5") as trace, grutrace.open(tmp_path / "b.h5") as other:
        assert_same(statistics, grutrace.Statistics.of(trace))
        assert statistics.steps == trace.calls["steps"].sum() > 0
        for name in trace.sites:
            for quantity in EVERYTHING:
                rows = np.asarray(other[name].rows(quantity))
                np.testing.assert_array_equal(trace[name].rows(quantity), rows)


def intervals(layer: nn.GRU, tmp_path: Path | None) -> tuple[list, grutrace.Tracer]:
    """The figures of three intervals of 1, 2 and 3 calls, and the trace of all of them."""
    statistics, popped = grutrace.Statistics(), []
    path = None if tmp_path is None else tmp_path / "run.h5"
    with (
        grutrace.trace(layer, path, sink=statistics),
        grutrace.trace(layer, gates="inline") as full,
    ):
        for calls in (1, 2, 3):
            for _ in range(calls):
                layer(torch.randn(5, 4, 2))
            popped.append(statistics.pop())
    return popped, full


@pytest.mark.parametrize("beside_a_file", [False, True])
def test_pop_returns_the_figures_since_the_last(beside_a_file: bool, tmp_path: Path) -> None:
    popped, full = intervals(nn.GRU(2, 3), tmp_path if beside_a_file else None)
    assert [part.calls for part in popped] == [1, 2, 3]
    for part, rows in zip(popped, (slice(20), slice(20, 60), slice(60, 120)), strict=True):
        for quantity in ("reset", "update", "candidate", "hidden"):
            assert_figures(part["l0"][quantity], np.asarray(full["l0"].rows(quantity))[rows])
    assert_same(popped[0].merge(popped[1]).merge(popped[2]), grutrace.Statistics.of(full))


def test_control_counts_that_are_not_cleared_are_detected(monkeypatch) -> None:
    monkeypatch.setattr(Accumulator, "clear", lambda _: None)
    popped, _ = intervals(nn.GRU(2, 3), None)
    assert [part.calls for part in popped] == [1, 3, 6]


def test_pop_before_anything_was_counted() -> None:
    assert grutrace.Statistics(bins=8).pop().calls == 0


def test_no_call_is_lost_while_another_thread_pops(tmp_path: Path) -> None:
    layer, statistics, popped, done = nn.GRU(2, 3), grutrace.Statistics(), [], threading.Event()

    def pop() -> None:
        while not done.is_set():
            popped.append(statistics.pop())

    with grutrace.trace(layer, tmp_path / "run.h5", sink=statistics):
        thread = threading.Thread(target=pop)
        thread.start()
        for _ in range(200):
            layer(torch.randn(5, 2))
        done.set()
        thread.join()
        popped.append(statistics.pop())
    assert sum(part.calls for part in popped) == 200
    assert sum(part.steps for part in popped) == 1000


def test_statistics_that_cannot_count_leave_no_file(tmp_path: Path, model) -> None:
    own = grutrace.Statistics(tmp_path / "stats.h5")
    with pytest.raises(grutrace.OptionError, match=r"sink: with a path expected.*stats.h5"):
        grutrace.trace(model, tmp_path / "run.h5", sink=own)
    other = grutrace.Statistics()
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer, sink=other):
        layer(torch.randn(5, 2))
    with pytest.raises(grutrace.OptionError, match="statistics do not match"):
        grutrace.trace(model, tmp_path / "run.h5", sink=other)
    assert not list(tmp_path.iterdir())


def test_a_file_with_logged_values_is_counted(tmp_path: Path) -> None:
    layer, statistics = nn.GRU(2, 3), grutrace.Statistics()
    with grutrace.trace(layer, tmp_path / "run.h5", sink=statistics, log=("loss",)) as trace:
        output, _ = layer(torch.randn(5, 4, 2))
        trace.log("loss", output.square().sum(-1))
    assert statistics["l0"].hidden.count.tolist() == [20] * 3
    assert trace["l0"]["loss"].shape == (20, 1)


def test_counting_beside_a_file_that_is_appended_to(tmp_path: Path) -> None:
    layer, path = nn.GRU(2, 3), tmp_path / "run.h5"
    for _ in range(2):
        statistics = grutrace.Statistics()
        with grutrace.trace(layer, path, sink=statistics, mode="a"):
            layer(torch.randn(5, 4, 2))
        assert statistics.calls == 1
    with grutrace.open(path) as trace:
        assert len(trace.calls) == 2
