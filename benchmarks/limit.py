"""The lower limit of the cost of a tracing: the bytes that it keeps are copied or written once."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import grutrace
from benchmarks.tracings import HELD, Tracing
from benchmarks.workloads import Workload

#: Number of copies, of which the median counts.
COPIES = 15


def limit(workload: Workload, tracing: Tracing, untraced: float) -> float:
    """Return the ratio of an untraced run, in which the kept bytes are copied once, to the run.

    For a trace in memory they are copied to fresh memory, and kept. For a file, which uses memory
    again, they are copied to the same memory.

    Args:
        workload: What is traced.
        tracing: How.
        untraced: Seconds of an untraced run.
    """
    source = _kept_bytes(workload, tracing)
    if not source.size:
        return 1.0
    target = np.empty_like(source)
    held: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    def copy() -> None:
        nonlocal target
        if not tracing.to_file:
            target = np.empty_like(source)
            held.append(target)
        np.copyto(target, source)
        if len(held) * source.size > HELD:
            held.clear()

    return 1 + _seconds(copy) / untraced


def limit_on_disk(workload: Workload, tracing: Tracing, untraced: float, folder: Path) -> float:
    """Return the ratio of an untraced run, in which the kept bytes are written once, to the run.

    They are written to the end of one file, by one call of the operating system for each run.

    Args:
        workload: What is traced.
        tracing: How.
        untraced: Seconds of an untraced run.
        folder: Where the file is, until it has been measured.
    """
    source = _kept_bytes(workload, tracing) if tracing.to_file else np.zeros(0, np.uint8)
    if not source.size:
        return 1.0
    path = folder / "kept"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        seconds = _seconds(lambda: os.write(file, source))
    finally:
        os.close(file)
        path.unlink()
    return 1 + seconds / untraced


def _seconds(run: Callable[[], object]) -> float:
    """Return the median time of `COPIES` runs."""
    seconds = []
    for _ in range(COPIES):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _kept_bytes(workload: Workload, tracing: Tracing) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return as many bytes as a run keeps: none if nothing is recorded, or only counted."""
    options = tracing.options()
    if tracing.idle or (tracing.lasting and not tracing.to_file):
        return np.zeros(0, np.uint8)
    if options.get("gates", "auto") == "auto" and "units" not in options:
        # A reader computes the gates from what a deferred trace keeps.
        options["gates"] = "deferred"
    with grutrace.Tracer(workload.model, **options) as tracer:
        workload.run()
    return np.ones(max(1, _row_bytes(tracer)), np.uint8)


def _row_bytes(trace: grutrace.Trace) -> int:
    """Return the bytes of the rows that are stored."""
    size = 0
    for name in trace.sites:
        site = trace[name]
        module, steps = site.module, int(site.lengths.sum())
        for quantity in site.site.quantities:
            width = site.site.input_size if quantity == "input" else module.unit_count(site.site)
            size += steps * width * np.dtype(module.dtype).itemsize
    return size
