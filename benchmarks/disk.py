"""The time until all rows are on disk. The model's own delay is only a part of it.

The writer's thread works on after the model's call has returned. Here some runs in a row are timed
together with the `flush` after them, which returns once all rows are committed to the file (that
is, given to the operating system, which may keep them in its cache).
"""

from __future__ import annotations

import time
from pathlib import Path

import grutrace
from benchmarks.pairs import Ratio, ratio
from benchmarks.tracings import Tracing
from benchmarks.workloads import Workload

#: Total time of the untraced runs. Seconds.
LONG = 0.1

#: Pairs of such runs.
PAIRS = 5


def until_on_disk(workload: Workload, tracing: Tracing, folder: Path) -> tuple[Ratio, int]:
    """Return the ratio to as many untraced runs, and how many runs there are.

    The file stays open from pair to pair: a long run makes and closes one only once.
    """
    workload.run()
    began = time.perf_counter()
    workload.run()
    runs = max(1, round(LONG / (time.perf_counter() - began)))

    def untraced() -> None:
        for _ in range(runs):
            workload.run()

    path = folder / "run.h5" if tracing.to_file else None
    options = tracing.options()
    with grutrace.Tracer(workload.model, path, recording=False, **options) as tracer:

        def traced() -> None:
            tracer.start()
            untraced()
            tracer.stop()
            tracer.flush()

        result = ratio(untraced, traced, 0.0, pairs=PAIRS, warm_up=1)
    if path is not None:
        path.unlink()
    return result, runs
