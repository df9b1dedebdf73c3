"""What is measured: a workload traced in some way, against the same workload untraced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grutrace
from tests.benchmarks.workloads import Workload


@dataclass(frozen=True)
class Tracing:
    """One way to trace.

    Attributes:
        name: What the table calls it.
        target: The ratio to the untraced run that we aim at.
        options: Of the tracer.
        to_file: Whether it streams to a file.
        idle: Whether it is attached without recording.
    """

    name: str
    target: float
    options: dict[str, Any] = field(default_factory=dict)
    to_file: bool = False
    idle: bool = False


TRACINGS = (
    Tracing("attached, not recording", 1.02, {"recording": False}, idle=True),
    Tracing("update only, in memory", 1.35, {"record": "update"}),
    Tracing("everything, in memory", 1.25),
    Tracing("everything, to a file", 1.40, to_file=True),
    Tracing("deferred, to a file", 1.10, {"gates": "deferred"}, to_file=True),
)


@contextmanager
def traced(workload: Workload, tracing: Tracing, folder: Path) -> Iterator[Callable[[], object]]:
    """Give a function that runs the workload traced.

    Tracing is switched on and off around each run, so that the untraced run in between is
    untraced. In memory each run is a trace of its own, as in a notebook; else memory would fill up.
    """
    if tracing.idle:
        with grutrace.Tracer(workload.model, **tracing.options):
            yield workload.run
        return
    if not tracing.to_file:

        def in_memory() -> None:
            with grutrace.Tracer(workload.model, **tracing.options):
                workload.run()

        yield in_memory
        return
    path = folder / "run.h5"
    with grutrace.Tracer(workload.model, path, recording=False, **tracing.options) as tracer:

        def to_file() -> None:
            tracer.start()
            workload.run()
            tracer.stop()

        yield to_file
    path.unlink()
