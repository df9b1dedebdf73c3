"""The memory of a traced run, above that of the untraced run. It must not grow with the run.

Each run is a process of its own, which says its own peak.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

from benchmarks.figures import Figure, Target
from grutrace.storage.write.writer_thread import QUEUE_BYTES

MIB = 1024**2

#: Calls of the shorter run. Their rows are more than the queue holds.
RUNS = 500

#: Memory allowed beside the queue. MiB.
ALLOWED = 64 + QUEUE_BYTES // MIB

#: The difference of peaks that counts as none. Untraced runs differ as much, by the allocator. MiB.
SAME = 16

#: The options, by their name in the table. None traces nothing.
KINDS: dict[str, dict[str, Any] | None] = {
    "untraced": None,
    "everything inline, to a file": {"gates": "inline"},
    "deferred, to a file": {"gates": "deferred"},
}

#: Linux gives the peak of this process here. The peak from `resource` may be the parent's.
STATUS = Path("/proc/self/status")


def figures() -> Iterator[Figure]:
    """Yield for each kind the peak above the untraced run, and how much more a longer one's is."""
    runs = (RUNS, 10 * RUNS)
    untraced = [peak("untraced", count) for count in runs]
    for kind in KINDS:
        if kind == "untraced":
            continue
        short, long = (peak(kind, c) - u for c, u in zip(runs, untraced, strict=True))
        name = f"peak above untraced: {kind}, {10 * RUNS} calls"
        yield Figure(name, long, "MiB", Target(ALLOWED), details={"short": short})
        name = f"that, less the peak of {RUNS} calls"
        yield Figure(name, long - short, "MiB", Target(SAME), details={"untraced": untraced})


def peak(kind: str, runs: int) -> float:
    """Run it in its own process, and return the peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, kind, str(runs), folder]
        # One thread: memory hardly depends on them, and two wait for each other on a busy machine.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=PIPE, text=True, env=environment)
    return float(done.stdout)


def own_peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def run(kind: str, runs: int, folder: Path) -> None:
    """Call a layer so many times, traced or not, and print the peak."""
    import torch

    import grutrace

    torch.manual_seed(0)
    layer, input = torch.nn.GRU(64, 64), torch.randn(50, 16, 64)
    options = KINDS[kind]
    with contextlib.ExitStack() as stack:
        if options is not None:
            stack.enter_context(grutrace.Tracer(layer, folder / "run.h5", **options))
        with torch.no_grad():
            for _ in range(runs):
                layer(input)
    print(own_peak())


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
