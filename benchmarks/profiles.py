"""Where the time of a traced call goes: processor time of the model's thread, part by part.

    python -m benchmarks.profiles [TEXT ...]

prints a Markdown table of the workloads whose names contain a TEXT, in microseconds for each call
of a recorded layer, in memory. torch has one thread, so that processor time is all the time of the
model, and other programs change it little. Timers around the parts take some 10 microseconds of a
call, most of them in *records* and *elsewhere*. *Pages* is the number of pages of memory that the
system provides to a traced call, beyond the untraced one. Their time is in the part that first
writes to them: often in that of the products or of the kernel, not of the rows, which take the
memory that products have left.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import grutrace
from benchmarks.workloads import Workload, all_workloads
from grutrace.capture.kernel_calls import observation, registration
from grutrace.capture.model_recorder import ModelRecorder
from grutrace.capture.recording import guarded_sink, journal, module_recorder, site_recorder
from grutrace.capture.sequences import tracker
from grutrace.gru import cell, gate_copies, joint_replay, recompute, replay

#: Runs of a workload that are added up, and those before them.
RUNS, WARM_UP = 12, 3

#: By part, the functions whose own time it is: without that of functions of other parts inside.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "kernel": [(registration.GRUKernel, "__call__")],
    "copies of gates": [
        (gate_copies, "make_copies"),
        (gate_copies.CompiledCopies, "take"),
        (gate_copies.TorchCopies, "take"),
        (site_recorder.SiteRecorder, "_gates_from_kernel"),
    ],
    "weights": [
        (module_recorder.ModuleRecorder, "check_weights"),
        (module_recorder.ModuleRecorder, "recheck"),
        (module_recorder.ModuleRecorder, "append_weights"),
    ],
    "copies of states": [
        (module_recorder.ModuleRecorder, "copy"),
        (module_recorder.ModuleRecorder, "new_series"),
        (journal.SeriesGroup, "add"),
    ],
    "products": [(cell, "product")],
    "gates and check": [
        (replay, "replay_products"),
        (joint_replay, "replay_products"),
        (recompute, "replay_products"),
        (replay, "check_residual"),
    ],
    "sequences": [
        (tracker.SequenceTracker, "assign"),
        (tracker.SequenceTracker, "assign_series"),
        (tracker.SequenceTracker, "commit"),
    ],
    "records": [
        (journal.Journal, "add"),
        (journal.Journal, "drain"),
        (guarded_sink.GuardedSink, "append"),
    ],
    "observation": [(observation, "run_kernel"), (ModelRecorder, "receive")],
}


class Clock:
    """Adds up the own time of parts, and counts the calls that are received."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls = 0
        self._inner: list[float] = []

    def clear(self) -> None:
        """Start again."""
        self.seconds.clear()
        self.calls = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a timer around it."""
        counts = part == "observation" and function.__name__ == "receive"

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls += counts
            began = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took, inner = time.thread_time() - began, self._inner.pop()
                self.seconds[part] += took - inner
                if self._inner:
                    self._inner[-1] += took

        return run


@contextmanager
def timers() -> Iterator[Clock]:
    """Put timers around all parts."""
    clock, before = Clock(), []
    for part, functions in PARTS.items():
        for owner, name in functions:
            before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, clock.timed(part, vars(owner)[name]))
    try:
        yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


class Cost(NamedTuple):
    """Processor time of this thread in seconds, and the pages that the system provided."""

    seconds: float
    pages: int


def cost(run: Callable[[], object]) -> Cost:
    """Return the cost of a function."""
    pages, began = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, time.thread_time()
    run()
    took = time.thread_time() - began
    return Cost(took, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - pages)


def profile(workload: Workload, gates: str) -> dict[str, float]:
    """Return the microseconds of a call: untraced, traced, and of each part; and its pages.

    *elsewhere* is what the parts do not explain, such as PyTorch's way to the kernel. *kernel* is
    the time beyond the untraced call. In training it is a part of *elsewhere*, since the untraced
    time has the backward pass and the optimizer in it.
    """

    def run(count: int = RUNS) -> None:
        for _ in range(count):
            workload.run()

    run(WARM_UP)
    untraced = cost(run)
    with timers() as clock:
        # The second trace is measured: it finds memory as the first one left it.
        for _ in range(2):
            with grutrace.Tracer(workload.model, gates=gates, recording=False) as tracer:

                def record(tracer: grutrace.Tracer = tracer) -> None:
                    tracer.start()
                    run()
                    tracer.stop()

                with tracer.recording():
                    run(WARM_UP)
                clock.clear()
                traced = cost(record)
    extra = traced.seconds - untraced.seconds
    parts = {part: clock.seconds[part] for part in PARTS}
    if "training" in workload.name:
        del parts["kernel"]
    else:
        parts["kernel"] -= untraced.seconds
    figures = {
        "untraced": untraced.seconds,
        "traced": traced.seconds,
        **parts,
        "elsewhere": extra - sum(parts.values()),
    }
    calls = max(1, clock.calls)
    return {name: 1e6 * value / calls for name, value in figures.items()} | {
        "pages": (traced.pages - untraced.pages) / calls
    }


def main(texts: list[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    names = ["untraced", "traced", *PARTS, "elsewhere", "pages"]
    print(f"| workload, gates | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for make in all_workloads():
        for gates in ("inline", "deferred"):
            torch.manual_seed(0)
            workload = make()
            if texts and not any(text in workload.name for text in texts):
                continue
            figures = profile(workload, gates)
            row = " | ".join(f"{figures[name]:.0f}" if name in figures else "" for name in names)
            print(f"| {workload.name}, {gates} | {row} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
