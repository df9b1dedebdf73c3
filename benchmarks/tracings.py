"""The kinds of tracing that are measured, each against the untraced workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grutrace
from benchmarks.workloads import Kind, Workload

#: The tracing that others are compared with.
IN_MEMORY = "everything inline, in memory"

#: Size at which a trace in memory is replaced by a new one. Bytes.
HELD = 256 * 1024 * 1024


@dataclass(frozen=True)
class Tracing:
    """A kind of tracing.

    Attributes:
        name: What the table calls it.
        kinds: The kinds of workloads that it is measured on; empty for all.
        options: Makes the options of the tracer, for each trace.
        to_file: Whether it streams to a file.
        lasting: Whether one trace takes all runs, as a file does. In memory a new one takes the
            place of one that holds `HELD`.
        read: Whether each run is a trace of its own, which is made and read whole, too.
        idle: Whether it is attached without recording.
    """

    name: str
    kinds: tuple[Kind, ...] = ()
    options: Callable[[], dict[str, Any]] = dict
    to_file: bool = False
    lasting: bool = False
    read: bool = False
    idle: bool = False


TRACINGS = (
    Tracing("attached, not recording", options=lambda: {"recording": False}, idle=True),
    Tracing("update only, in memory", options=lambda: {"record": "update", "gates": "inline"}),
    Tracing(IN_MEMORY, options=lambda: {"gates": "inline"}),
    Tracing("32 units, in memory", options=lambda: {"units": range(32)}),
    Tracing("the default, in memory"),
    Tracing("the default, in memory, made and read", read=True),
    Tracing("everything inline, to a file", options=lambda: {"gates": "inline"}, to_file=True),
    Tracing("deferred, to a file", options=lambda: {"gates": "deferred"}, to_file=True),
    Tracing(
        "deferred, every tenth call, to a file",
        ("training",),
        options=lambda: {"gates": "deferred", "every": 10},
        to_file=True,
    ),
    Tracing("statistics only", options=lambda: {"sink": grutrace.Statistics()}, lasting=True),
)


class Run(NamedTuple):
    """A workload, traced.

    Attributes:
        call: Runs it once.
        settle: Waits until nothing of that goes on any more.
    """

    call: Callable[[], object]
    settle: Callable[[], object] | None = None


@contextmanager
def traced(workload: Workload, tracing: Tracing, folder: Path) -> Iterator[Run]:
    """Give a function that runs the workload traced.

    Tracing is switched on and off around each run, so that the untraced run in between is
    untraced.
    """
    if tracing.idle:
        with grutrace.Tracer(workload.model, **tracing.options()):
            yield Run(workload.run)
        return
    if tracing.read:

        def alone() -> None:
            with grutrace.Tracer(workload.model, **tracing.options()) as tracer:
                workload.run()
            nbytes_of(tracer)

        yield Run(alone)
        return
    if not (tracing.to_file or tracing.lasting):
        yield Run(_in_memory(workload, tracing))
        return
    path = folder / "run.h5" if tracing.to_file else None
    with grutrace.Tracer(workload.model, path, recording=False, **tracing.options()) as tracer:

        def one_of_many() -> None:
            tracer.start()
            workload.run()
            tracer.stop()

        yield Run(one_of_many, tracer.flush)
    if path is not None:
        path.unlink()


def _in_memory(workload: Workload, tracing: Tracing) -> Callable[[], object]:
    """Give a function that runs the workload traced, in one trace after another."""
    with grutrace.Tracer(workload.model, **tracing.options()) as first:
        workload.run()
    most = max(1, HELD // nbytes_of(first))
    tracer, runs = first, most

    def one_of_some() -> None:
        nonlocal tracer, runs
        if runs == most:
            tracer.close()
            tracer = grutrace.Tracer(workload.model, recording=False, **tracing.options())
            runs = 0
        tracer.start()
        workload.run()
        tracer.stop()
        runs += 1

    return one_of_some


def nbytes_of(trace: grutrace.Trace) -> int:
    """Read everything, and return how much it is."""
    sites = (trace[name] for name in trace.sites)
    return sum(
        site.rows(quantity)[:].nbytes
        for site in sites
        for quantity in site.site.available_quantities
    )
