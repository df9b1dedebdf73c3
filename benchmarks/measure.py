"""Measure a workload with each kind of tracing and with each peer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks import targets
from benchmarks.disk import until_on_disk
from benchmarks.figures import Figure, measured, not_measured
from benchmarks.limit import limit, limit_on_disk
from benchmarks.pairs import PAIRS, WARM_UP, ratio
from benchmarks.peers import PEERS
from benchmarks.peers.peer import Absent, Peer, Values, disagreement, traced_values
from benchmarks.tracings import HELD, TRACINGS, Tracing, traced
from benchmarks.workloads import SMALL, Workload

#: Number of pairs for peers that take hundreds of times the layer's time.
FEW = 3


def tracing(workload: Workload, budget: float, seconds: float) -> Iterator[Figure]:
    """Yield for each tracing its ratio to the untraced run."""
    for tracing in _tracings_of(workload):
        with (
            tempfile.TemporaryDirectory() as folder,
            traced(workload, tracing, Path(folder)) as run,
        ):
            result = ratio(workload.run, run.call, budget, limit=seconds, settle=run.settle)
        least = limit(workload, tracing, result.base)
        aim = targets.target(targets.TRACING, tracing.name, workload.name)
        yield measured(tracing.name, result, aim, limit=least)


def disk(workload: Workload) -> Iterator[Figure]:
    """Yield for each tracing with a thread its ratio to the untraced run, until `flush` returns."""
    for tracing in _tracings_of(workload):
        if tracing.to_file or tracing.lasting:
            with tempfile.TemporaryDirectory() as folder:
                result, runs = until_on_disk(workload, tracing, Path(folder))
                once = replace(result, base=result.base / runs)
                least = limit_on_disk(workload, tracing, once.base, Path(folder))
            aim = targets.target(targets.DISK, tracing.name, workload.name)
            yield measured(tracing.name, once, aim, limit=least, runs=runs)


def _tracings_of(workload: Workload) -> list[Tracing]:
    return [each for each in TRACINGS if not each.kinds or workload.kind in each.kinds]


def peers(workload: Workload, budget: float, seconds: float) -> Iterator[Figure]:
    """Yield for each peer its ratio to the untraced layer, or why there is none."""
    if workload.input is None:
        return
    with torch.no_grad():
        expected = traced_values(cast(nn.GRU, workload.model), workload.input)
        for peer in PEERS:
            try:
                yield _peer(workload, peer, expected, budget, seconds)
            except Absent as absent:
                yield not_measured(peer.name, str(absent))


def _peer(
    workload: Workload, peer: Peer, expected: Values, budget: float, seconds: float
) -> Figure:
    layer, input = cast(nn.GRU, workload.model), workload.input
    assert input is not None
    if peer.only_small and (*input.shape, layer.hidden_size) not in SMALL:
        raise Absent("left out: only on small shapes")
    if peer.most_steps is not None and len(input) > peer.most_steps:
        raise Absent(f"left out: over {peer.most_steps} steps")
    with peer.prepare(layer, input) as running:
        # The second call is compared, so that a peer with stale values is detected.
        running.call()
        wrong = disagreement(peer, running.read(running.call()), expected)
        if wrong:
            raise Absent(f"refused: {wrong}")
        most = HELD // sum(tensor.nbytes for tensor in expected.values())
        results_held: list[Any] = []
        few = peer.only_small
        calls = 1 if few else workload.calls

        def untraced() -> None:
            for _ in range(calls):
                layer(input)

        def run() -> None:
            for _ in range(calls):
                made = running.call()
                # Kept, as a trace keeps it: reused memory costs less than new memory.
                if peer.gates:
                    if len(results_held) >= most:
                        results_held.clear()
                    results_held.append(made)

        result = ratio(
            untraced,
            run,
            0.0 if few else budget,
            limit=seconds,
            pairs=FEW if few else PAIRS,
            warm_up=1 if few else WARM_UP,
        )
    return measured(peer.name, result, gives=peer.gives)
