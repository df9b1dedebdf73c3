"""Measure the cost of fsync: a flush after each call of a model, with and without it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from tools.soak.forks import Outcome
from tools.soak.victims import make, tracing

#: Runs of each model.
RUNS = 60


def fsync_cost(folder: Path, asked: argparse.Namespace) -> list[Outcome]:
    """Time flushes and runs with and without fsync, alternately."""
    results = []
    for kind in ("background", "stepwise"):
        for fsync in (False, True) * 2:
            results.append(_time(folder / f"cost-{kind}-{len(results)}.h5", kind, fsync=fsync))
    return results


def _time(path: Path, kind: str, *, fsync: bool) -> Outcome:
    torch.manual_seed(0)
    model, run, _ = make(kind)
    flushes = []
    with tracing(kind, model, path, fsync=fsync) as tracer:
        run()
        tracer.flush()
        begun = time.monotonic()
        for _ in range(RUNS):
            run()
        free = (time.monotonic() - begun) / RUNS
        for _ in range(RUNS):
            run()
            begun = time.monotonic()
            tracer.flush()
            flushes.append(time.monotonic() - begun)
    flushes.sort()
    return {
        "kind": kind,
        "fsync": fsync,
        "run": free,
        "flush": flushes[RUNS // 2],
        "slow": flushes[RUNS * 95 // 100],
    }
