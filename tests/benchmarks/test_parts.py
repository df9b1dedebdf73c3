"""Tests of the other parts of the benchmark, with the smallest sizes. No time is asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grutrace
from benchmarks import __main__ as command
from benchmarks import growth, long_traces, measure, memory
from benchmarks.figures import Figure
from benchmarks.pairs import ratio_of, speed
from benchmarks.peers import loops
from benchmarks.peers.peer import Peer, Running, Values, need
from benchmarks.report import Report
from benchmarks.tracings import TRACINGS, Tracing, traced
from benchmarks.workloads import Workload, single_layer
from tests.storage.streams import make_module


@pytest.mark.parametrize("power", [0.5, 1.0, 1.1])
def test_the_slope_of_a_power_is_its_exponent(power: float) -> None:
    steps = [10.0**n for n in range(4, 9)]
    assert growth.slope(steps, [3e-6 * n**power for n in steps]) == pytest.approx(power)


def test_speed_is_the_inverse_ratio() -> None:
    result = speed(ratio_of([(1.0, 2.0), (1.0, 4.0), (1.0, 5.0)]))
    assert (result.median, result.low, result.high) == (0.25, 0.2, 0.5)


def test_long_traces_are_traces(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    long_traces.write(path, make_module("rnn", hidden=4), 3, 2, 5)
    with grutrace.open(path) as trace:
        site = trace["rnn.l0"]
        assert (site.extent.calls, len(site), site.update.shape) == (5, 10, (30, 4))


@pytest.mark.parametrize("tracing", TRACINGS, ids=lambda tracing: tracing.name)
def test_each_tracing_leaves_the_model_as_it_was(tracing: Tracing, tmp_path: Path) -> None:
    workload = single_layer(3, 2, 4, 32)
    with traced(workload, tracing, tmp_path) as run:
        run.call(), run.call()
    assert not workload.model._forward_hooks
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_gives_wrong_gates_is_refused_and_an_absent_one_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(values: loops.Results) -> Values:
        return loops.read(values) | {"update": values[1]}

    right, other = loops.LOOPS[1], loops.LOOPS[2]
    broken = Peer("broken", "all", _with(right, wrong))
    missing = Peer("missing", "all", _needing("no-such-package"))
    monkeypatch.setattr(measure, "PEERS", (right, other, broken, missing))
    results = {peer.name: peer for peer in measure.peers(single_layer(3, 2, 4, 4), 0.0, 1.0)}
    assert results[right.name].value is not None
    assert results["broken"].absent.startswith("refused: update differs by ")
    assert results["missing"].absent.startswith("absent: no-such-package is not installed")


def _with(peer: Peer, read: Callable[[Any], Values]) -> Any:
    @contextmanager
    def prepare(layer: nn.GRU, input: Tensor) -> Iterator[Any]:
        with peer.prepare(layer, input) as running:
            yield Running(running.call, read)

    return prepare


def _needing(package: str) -> Any:
    @contextmanager
    def prepare(layer: nn.GRU, input: Tensor) -> Iterator[Any]:
        yield need(package)

    return prepare


def test_the_peak_of_a_process_is_in_mib() -> None:
    held = torch.ones(64 * memory.MIB // 4)
    assert held.nbytes / memory.MIB <= memory.own_peak() < 64 * 1024


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ([], {"tracing", "disk", "peers", "start"}),
        (["start"], {"start"}),
        (["T5"], {"tracing", "disk", "peers"}),
        (["T5", "peers"], {"peers"}),
        (["elsewhere"], set()),
    ],
)
def test_only_picks_by_section_or_workload(
    only: list[str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = Figure("figure", 1.0)
    monkeypatch.setattr(command, "OTHERS", {"start": lambda: [figure]})
    monkeypatch.setattr(
        command, "all_workloads", lambda: [lambda: Workload("T5 B1", nn.Identity(), int)]
    )
    for section in ("tracing", "peers"):
        monkeypatch.setattr(measure, section, lambda *_, **__: iter([figure]))
    monkeypatch.setattr(measure, "disk", lambda *_: iter([figure]))
    report = Report({})
    command.run(report, only, 0.0, 1.0, lambda: None)
    tables = {"tracing": report.tracing, "disk": report.disk, "peers": report.peers}
    assert {name for name, table in tables.items() if table} | set(report.others) == expected
