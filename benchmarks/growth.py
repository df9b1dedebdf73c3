"""Time against the number of steps. It must grow linearly."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grutrace
from benchmarks.figures import Figure, Target

#: Numbers of steps, and the repetitions of each.
STEPS = {10_000: 5, 100_000: 5, 1_000_000: 3, 10_000_000: 1}

#: Measured on demand: takes minutes and 13 GB of disk.
LONGEST = 100_000_000

#: A call: steps of each sequence, sequences, input size, units.
SHAPE = (100, 100, 1, 8)

KINDS: dict[str, dict[str, Any]] = {
    "everything inline, to a file": {"gates": "inline"},
    "deferred, to a file": {"gates": "deferred"},
}


def figures(*, longest: bool = False) -> Iterator[Figure]:
    """Yield for each kind the slope of the logarithms, and the times it follows from."""
    counts = STEPS | ({LONGEST: 1} if longest else {})
    for kind, options in KINDS.items():
        seconds = {steps: duration(steps, count, options) for steps, count in counts.items()}
        name = f"slope of log time over log steps, {min(counts):,} to {max(counts):,}: {kind}"
        value = slope(list(seconds), list(seconds.values()))
        yield Figure(name, value, target=Target(1.02), details={"seconds": seconds})


def slope(steps: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms of both, by least squares."""
    return float(np.polyfit(np.log(steps), np.log(seconds), 1)[0])


def duration(steps: int, count: int, options: dict[str, Any]) -> float:
    """Median time until all steps are on disk, in seconds."""
    length, batch, input_size, hidden_size = SHAPE
    torch.manual_seed(0)
    layer, input = torch.nn.GRU(input_size, hidden_size), torch.randn(length, batch, input_size)
    times = []
    for _ in range(count):
        with (
            tempfile.TemporaryDirectory() as folder,
            grutrace.Tracer(layer, Path(folder) / "run.h5", **options) as tracer,
            torch.no_grad(),
        ):
            # The first call initialises caches.
            layer(input)
            tracer.flush()
            began = time.perf_counter()
            for _ in range(steps // (length * batch)):
                layer(input)
            tracer.flush()
            times.append(time.perf_counter() - began)
    return statistics.median(times)
