"""The memory of an analysis does not grow with the file."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grutrace
from benchmarks import long_traces
from grutrace.analysis.dynamics import growth as growth_sums
from grutrace.analysis.engine import map_reduce, segments
from grutrace.analysis.memory import age, autocorrelation
from grutrace.analysis.registry import ANALYSES, get_analysis
from tests.storage.streams import make_module

#: Steps of the shorter file, a KiB of rows each; the longer one has four times as many.
STEPS, UNIT_DTYPE = 4096, 64

#: Takes its time with every step.
SLOW = "lyapunov"

#: By how much peaks of the same analysis differ: what was imported meanwhile, and tables of
#: 64 bytes or so a sequence. Bytes.
SAME = 400_000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    modules = {
        "PART_BYTES": (map_reduce,),
        "BLOCK_BYTES": (map_reduce, segments),
        "BATCH_BYTES": (age, autocorrelation, growth_sums),
    }
    for name, of in modules.items():
        for module in of:
            monkeypatch.setattr(module, name, 128 * 1024)
    monkeypatch.setattr(autocorrelation, "DEFAULT_LAGS", 100)
    # Two at once would be as it happens.
    monkeypatch.setattr(map_reduce, "MAX_THREADS", 1)


def write(path: Path, steps: int, steps_per_call: int) -> None:
    """So many steps, in sequences of each so many."""
    module = make_module("rnn", hidden=UNIT_DTYPE, width=UNIT_DTYPE)
    long_traces.write(path, module, steps_per_call, 1, steps // steps_per_call)


def peak(analyse: Callable[[Any], object], path: Path) -> int:
    with grutrace.open(path) as trace:
        (name,) = trace.sites
        gc.collect()
        tracemalloc.start()
        try:
            analyse(trace[name])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


@pytest.fixture(scope="module", params=["many sequences", "one sequence"])
def files(request, tmp_path_factory) -> dict[int, Path]:
    """By their steps."""
    folder = tmp_path_factory.mktemp("files")
    results = {}
    for steps in (STEPS // 4, STEPS, 4 * STEPS):
        results[steps] = folder / f"{steps}.h5"
        write(results[steps], steps, 64 if request.param == "many sequences" else steps)
    return results


#: Those that need gates and states only, and do not give a number for each step. The gradients of a
#: call are computed all together.
ALONE = [
    name
    for name, of in ANALYSES.items()
    if not of.required and name not in ("gate_activation", "gradients")
]


@pytest.mark.measures
@pytest.mark.parametrize("name", ALONE)
def test_the_same_for_a_file_four_times_as_long(name, files) -> None:
    analyse = get_analysis(name).load()
    steps = STEPS // 4 if name == SLOW else STEPS
    if name != SLOW:
        peak(analyse, files[steps])  # Imports, and what is kept of them.
    short, long = (peak(analyse, files[count]) for count in (steps, 4 * steps))
    assert long - short < SAME


@pytest.mark.measures
def test_control_reading_all_rows_grows(files) -> None:
    short, long = (
        peak(lambda site: np.asarray(site.rows("update")), files[steps])
        for steps in (STEPS, 4 * STEPS)
    )
    assert long - short > 4 * SAME
