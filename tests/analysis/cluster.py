"""Run analyses in two worker processes and compare the results with those of this process.

python -m tests.analysis.cluster STORED DEFERRED

Rows that are stored give the same bits in every process. Gates that are derived are the same to
rounding: a worker of a cluster computes with as many threads as it is given.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch
from distributed import Client, LocalCluster
from torch import nn

import grutrace
from grutrace.analysis.descriptive.geometry import geometry
from grutrace.analysis.descriptive.saturation import saturation
from grutrace.analysis.engine import map_reduce
from grutrace.analysis.engine.map_reduce import reduce_rows, with_dask
from grutrace.analysis.memory.timescales import timescales
from grutrace.errors import OptionError
from grutrace.records import GATES, Array
from tests.checks import rounding


class Workers:
    """The processes that receive rows."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def add(self, rows: Mapping[str, Array]) -> None:  # noqa: ARG002
        # Long enough that one worker does not come first everywhere.
        time.sleep(0.1)
        self.seen.add(os.getpid())

    def merge(self, later: Workers) -> None:
        self.seen |= later.seen


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and all(equal(one[name], other[name]) for name in one)
    kind = np.asarray(one).dtype.kind
    return bool(np.array_equal(one, other, equal_nan=kind == "f"))  # type: ignore[arg-type]


class Gates:
    """All rows of all gates, in order."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def add(self, rows: Mapping[str, Array]) -> None:
        self.seen.append(np.stack([rows[name] for name in GATES]))

    def merge(self, later: Gates) -> None:
        self.seen += later.seen


def main(stored: str, deferred: str) -> None:
    # Many parts, of a trace that is small.
    map_reduce.PART_BYTES = 1000
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster),
        grutrace.open(stored) as trace,
        grutrace.open(deferred) as later,
    ):
        for name in trace.sites:
            for analyse in (saturation, timescales, geometry):
                one, other = analyse(trace[name]), analyse(with_dask(trace[name]))
                assert equal(dataclasses.asdict(one), dataclasses.asdict(other)), (analyse, name)
            there = np.concatenate(reduce_rows(with_dask(later[name]), GATES, Gates).seen, axis=1)
            here = np.stack([np.asarray(later[name].rows(gate)) for gate in GATES])
            assert (np.abs(there - here) <= rounding(trace[name])).all(), name
        seen = reduce_rows(with_dask(trace[trace.sites[0]]), ("update",), Workers).seen
        assert len(seen) == 2, seen
        assert os.getpid() not in seen
        print("the same")
        layer = nn.GRU(2, 3)
        with grutrace.trace(layer) as memory:
            layer(torch.zeros(4, 2))
        try:
            saturation(with_dask(memory["l0"]))
        except OptionError as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
