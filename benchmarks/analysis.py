"""The time and memory of analyses of a file, compared with reading it.

It was written a moment before, so it lies in the operating system's cache: what is compared is
work, not the disk. Memory is the peak of a process of its own, torch included where it is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np

import grutrace
from benchmarks import long_traces
from benchmarks.figures import Figure, Target, measured
from benchmarks.memory import own_peak
from benchmarks.pairs import ratio
from grutrace.analysis.registry import ANALYSES, get_analysis
from grutrace.records import DEFAULT_RECORD
from grutrace.storage.read.lazy_rows import BLOCK
from grutrace.storage.read.site import SiteTrace

#: Size of the file that is read and analysed alternately. Bytes.
SIZE = 512 * 1024**2

#: Size of the large file, and of the one made instead if the disk is too small. Bytes.
LARGE, LESS = 4 * 1024**3, 1024**3

#: Number of pairs. Each takes a second or more.
PAIRS = 5

#: Analyses that count values, and their time limit as a multiple of reading.
COUNTING, TIMES = ("saturation", "moments", "quantiles"), 3.0

#: The memory limit of an analysis. MiB.
ALLOWED = 512

#: Takes minutes on the large file. On the smaller one it needs the same memory.
LONG = ("lyapunov",)

#: The label that analyses of labels use.
LABEL = "label"


def figures() -> Iterator[Figure]:
    """Yield the time of each counting analysis over that of reading, then each one's memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write_wide(path, SIZE)
        with grutrace.open(path) as trace:
            (name,) = trace.sites
            site = trace[name]
            for of in COUNTING:
                yield times_reading(of, site)
        for of in LONG:
            yield peak(of, path)
    with tempfile.TemporaryDirectory() as folder:
        size = LARGE if shutil.disk_usage(folder).free > 2 * LARGE else LESS
        path = Path(folder) / "run.h5"
        long_traces.write_wide(path, size, LABEL)
        for of in ANALYSES:
            if of not in LONG and not ANALYSES[of].required:
                yield peak(of, path)


def times_reading(of: str, site: SiteTrace) -> Figure:
    """The time of an analysis over that of reading the rows of all gates and states in order."""
    analyse = get_analysis(of).load()
    step = BLOCK // (long_traces.HIDDEN * np.dtype(np.float32).itemsize)

    def read() -> None:
        for quantity in DEFAULT_RECORD:
            rows = site.rows(quantity)
            for start in range(0, len(rows), step):
                rows[start : start + step]

    result = ratio(read, lambda: analyse(site), 0.0, pairs=PAIRS, warm_up=1)
    return measured(f"{of}, over reading", result, Target(TIMES))


def peak(of: str, path: Path) -> Figure:
    """The peak of a process that analyses a file, in MiB."""
    command = [sys.executable, "-m", __name__, of, str(path)]
    done = subprocess.run(command, check=True, stdout=PIPE, text=True)
    size = path.stat().st_size / 1024**3
    name = f"peak of {of}, of {size:.1f} GiB"
    return Figure(name, float(done.stdout), "MiB", Target(ALLOWED))


def run(of: str, path: Path) -> None:
    """Analyse every site of a file, and print the peak; where two are compared, with itself."""
    chosen = get_analysis(of)
    analyse = chosen.load()
    with grutrace.open(path) as trace:
        for name in trace.sites:
            needed = {"label": LABEL, "against": trace[name]}
            analyse(trace[name], **{option: needed[option] for option in chosen.required})
    print(own_peak())


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
