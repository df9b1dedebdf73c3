"""The lower limit of the cost of a tracing: the bytes that it keeps are copied once."""

from __future__ import annotations

import statistics
import time

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
    options = tracing.options()
    if tracing.idle or (tracing.lasting and not tracing.to_file):
        return 1.0
    if options.get("gates", "auto") == "auto" and "units" not in options:
        # A reader computes the gates from what a deferred trace keeps.
        options["gates"] = "deferred"
    with grutrace.Tracer(workload.model, **options) as tracer:
        workload.run()
    size = _kept_bytes(tracer)
    source = np.ones(max(1, size), np.uint8)
    target = np.empty_like(source)
    held: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
    seconds = []
    for _ in range(COPIES):
        if len(held) * size > HELD:
            held.clear()
        began = time.perf_counter()
        if not tracing.to_file:
            target = np.empty_like(source)
            held.append(target)
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return 1 + statistics.median(seconds) / untraced


def _kept_bytes(trace: grutrace.Trace) -> int:
    """Return the bytes of the rows that are stored."""
    size = 0
    for name in trace.sites:
        site = trace[name]
        module, steps = site.module, int(site.lengths.sum())
        for quantity in site.site.quantities:
            width = site.site.input_size if quantity == "input" else module.unit_count(site.site)
            size += steps * width * np.dtype(module.dtype).itemsize
    return size
