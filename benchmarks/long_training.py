"""The cost of a training run of thousands of steps, from its first to its last.

Every step has new weights, which a deferred trace stores beside its rows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import grutrace
from benchmarks.figures import Figure, Target
from benchmarks.workloads import training_encoder_decoder

#: Traced steps of the long run. They store 18 GB.
STEPS = 6_600

#: Steps at the start and at the end of the run that are compared.
COMPARED = 1_000

#: Steps of a block. Untraced and traced blocks alternate.
BLOCK = 50

#: Steps after which the bytes of a step are counted.
COUNTED = 100

#: Options whose bytes are compared.
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {"gates": "inline"},
    "everything, float16": {"gates": "inline", "dtype": "float16"},
    "everything, of 32 units": {"gates": "inline", "units": slice(32)},
    "the update gate": {"gates": "inline", "record": "update"},
    "deferred": {"gates": "deferred"},
    "deferred, float16": {"gates": "deferred", "dtype": "float16"},
    "deferred, every tenth call": {"gates": "deferred", "every": 10},
}


def figures(steps: int = STEPS, counted: int = COUNTED) -> Iterator[Figure]:
    """Yield the bytes of a step with several options, and the ratios of the long run."""
    for name, options in OPTIONS.items():
        yield Figure(f"a step on disk, {name}", step_bytes(options, counted) / 1e6, unit="MB")
    ratios = run_ratios(steps)
    ends = min(COMPARED, steps // 2) // BLOCK
    first, last = (statistics.median(part) for part in (ratios[:ends], ratios[-ends:]))
    yield Figure(f"deferred, to a file, the first {ends * BLOCK} of {steps} steps", first)
    yield Figure(f"deferred, to a file, the last {ends * BLOCK} of {steps} steps", last)
    yield Figure("the last less the first", last - first, target=Target(0.1))


def step_bytes(options: dict[str, Any], steps: int) -> float:
    """Return the growth of the file by one step of the run, in bytes."""
    torch.manual_seed(0)
    workload = training_encoder_decoder()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.h5")
        with grutrace.Tracer(workload.model, path, **options) as tracer:
            sizes = []
            for _ in range(2):
                for _ in range(steps):
                    workload.run()
                tracer.flush()
                sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / steps


def run_ratios(steps: int) -> list[float]:
    """Return the time of each traced block, with its flush, over the untraced block before it."""
    torch.manual_seed(0)
    workload = training_encoder_decoder()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.h5")
        tracer = grutrace.Tracer(workload.model, path, gates="deferred", recording=False)
        with tracer:
            for _ in range(steps // BLOCK):
                seconds = []
                for is_traced in (False, True):
                    began = time.perf_counter()
                    if is_traced:
                        tracer.start()
                    for _ in range(BLOCK):
                        workload.run()
                    if is_traced:
                        tracer.stop()
                        tracer.flush()
                    seconds.append(time.perf_counter() - began)
                ratios.append(seconds[1] / seconds[0])
    return ratios
