"""The time and memory of analyses of a file, compared with reading it with h5py alone.

It was written a moment before, so it lies in the operating system's cache: what is compared is
work, not the disk. Memory is the peak of a process of its own, torch included where it is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import PIPE

import h5py
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

#: The quantities that each analysis reads.
READS: dict[str, tuple[str, ...]] = {
    "saturation": DEFAULT_RECORD,
    "stuck_units": DEFAULT_RECORD,
    "quantization": DEFAULT_RECORD,
    "moments": DEFAULT_RECORD,
    "quantiles": DEFAULT_RECORD,
    "timescales": ("update", "hidden"),
    "autocorrelation": ("hidden",),
    "state_age": ("update",),
    "gradients": ("hidden", "input", "gradient"),
    "step_jacobians": DEFAULT_RECORD,
    "lyapunov": DEFAULT_RECORD,
    "fixed_points": ("hidden",),
    "gate_activation": ("update",),
    "selectivity": ("hidden",),
    "probe": ("hidden",),
    "geometry": ("hidden",),
    "update_sparsity": ("hidden",),
    "stages": DEFAULT_RECORD,
    "change": DEFAULT_RECORD,
}

#: Largest time as a multiple of that of reading the same rows: of counting, and of linear algebra.
TIMES = {"saturation": 1.1, "moments": 1.3, "quantiles": 1.5, "geometry": 5.0, "probe": 5.0}

#: The memory limit of an analysis. MiB.
ALLOWED = 512

#: Takes minutes on the large file. On the smaller one it needs the same memory. Its time is
#: measured on a still smaller one.
LONG, SHORT_SIZE = ("lyapunov", "selectivity"), 64 * 1024**2

#: The label that analyses of labels use.
LABEL = "label"


def figures(names: Iterable[str] = tuple(ANALYSES)) -> Iterator[Figure]:
    """Yield the time of each analysis over that of reading, then each one's memory."""
    with tempfile.TemporaryDirectory() as folder:
        for of in names:
            yield times_reading(of, trace_of(of, Path(folder), SHORT_SIZE if of in LONG else SIZE))
    with tempfile.TemporaryDirectory() as folder:
        large = LARGE if shutil.disk_usage(folder).free > 2 * LARGE else LESS
        for of in names:
            yield peak(of, trace_of(of, Path(folder), SIZE if of in LONG else large))


def trace_of(of: str, folder: Path, size: int) -> Path:
    """A trace of about this many bytes, for an analysis and others that read the same."""
    record = READS[of] if of == "gradients" else DEFAULT_RECORD
    path = folder / f"{'_'.join(record)}_{size}.h5"
    if not path.exists():
        long_traces.write_wide(path, size, LABEL, record)
    return path


def run_analysis(of: str, site: SiteTrace) -> object:
    """Analyse a site; where two are compared, with itself."""
    chosen = get_analysis(of)
    needed = {"label": LABEL, "against": site}
    return chosen.load()(site, **{option: needed[option] for option in chosen.required})


def times_reading(of: str, path: Path) -> Figure:
    """The time of an analysis over that of reading the rows that it needs with h5py, in order."""
    step = BLOCK // (long_traces.HIDDEN * np.dtype(np.float32).itemsize)
    # The second trace of a comparison is read, too.
    times = 2 if "against" in get_analysis(of).required else 1
    with grutrace.open(path) as trace:
        (name,) = trace.sites
        site = trace[name]
        group = f"modules/{name.replace('.', '/')}"

        def read() -> None:
            with h5py.File(path, "r") as file:
                for quantity in READS[of] * times:
                    rows = file[group][quantity]
                    for start in range(0, len(rows), step):
                        rows[start : start + step]

        result = ratio(read, lambda: run_analysis(of, site), 0.0, pairs=PAIRS, warm_up=1)
    target = Target(TIMES[of]) if of in TIMES else None
    return measured(f"{of}, over reading with h5py", result, target)


def peak(of: str, path: Path) -> Figure:
    """The peak of a process that analyses a file, in MiB."""
    command = [sys.executable, "-m", __name__, of, str(path)]
    done = subprocess.run(command, check=True, stdout=PIPE, text=True)
    name = f"peak of {of}, of {path.stat().st_size / 1024**3:.1f} GiB"
    return Figure(name, float(done.stdout), "MiB", Target(ALLOWED))


def run(of: str, path: Path) -> None:
    """Analyse every site of a file, and print the peak."""
    with grutrace.open(path) as trace:
        for name in trace.sites:
            run_analysis(of, trace[name])
    print(own_peak())


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
