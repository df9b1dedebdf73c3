"""Start-up time: imports, and the first output of a command."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import long_traces
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import PAIRS, Ratio, ratio_of
from benchmarks.storage import wall_time

#: A process that says how long a statement took, and how many modules of torch are there then.
TIMED = """
import sys, time
began = time.perf_counter()
{}
print(time.perf_counter() - began, sum(name.partition(".")[0] == "torch" for name in sys.modules))
"""

OPENING = "import grutrace; grutrace.open"


def figures() -> Iterator[Figure]:
    """Yield all figures."""
    importing = over_h5py("import grutrace")
    yield measured("import grutrace, over import h5py", importing, Target(1.3))
    # The time of the first use of a trace. The target is for the import alone.
    yield measured("import grutrace and grutrace.open, over import h5py", over_h5py(OPENING))
    name = "modules of torch that import grutrace and grutrace.open import"
    yield Figure(name, float(timed(OPENING)[1]), target=Target(0.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write_wide(path, long_traces.call_bytes())
        command = long_traces.command("info", str(path))
        yield measured("grutrace info, of one call", wall_time(command), Target(0.5), unit="s")


def over_h5py(statement: str) -> Ratio:
    """The time of a statement relative to importing h5py, each in its own process, alternately."""
    pairs = [(timed("import h5py")[0], timed(statement)[0]) for _ in range(1 + PAIRS)]
    return ratio_of(pairs[1:])


def timed(statement: str) -> tuple[float, int]:
    """Seconds that a statement takes in a new process, and modules of torch afterwards."""
    command = [sys.executable, "-c", TIMED.format(statement)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)
