"""The cost of the file, compared with plain h5py: writing, reading, one sequence, statistics.

The files were written a moment before they are read, so they lie in the operating system's cache:
what is compared is work, not the disk.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

import grutrace
from benchmarks import long_traces
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import Spread, ratio, speed, spread
from grutrace.analysis.descriptive.saturation import summarize_site
from grutrace.records import GATES, CallRecord
from grutrace.storage.format.schema import LIBVER, dataset_specs, quantity_path
from grutrace.storage.read.lazy_rows import BLOCK
from grutrace.storage.read.site import SiteTrace
from tests.storage.streams import make_module

#: Size of the file that is read alternately. Bytes.
SIZE = 512 * 1024**2

#: Size that is written alternately. Creating a file takes 18 ms, a small part of it. Bytes.
WRITTEN = 1024**3

#: Size of the large file, and of the one made instead if the disk is too small. Bytes.
LARGE, LESS = 4 * 1024**3, 1024**3

#: Pairs of so many bytes, each of which takes a second.
PAIRS = 5

#: Sequences that are read from the large file.
READINGS = 200

#: Calls of the file for `info`.
CALLS = 1_000_000


def figures() -> Iterator[Figure]:
    """Yield all figures, and remove the files."""
    with tempfile.TemporaryDirectory() as folder:
        yield measured(
            "bytes a second of the writer, over bare write_direct_chunk",
            writing(Path(folder)),
            Target(0.8, at_least=True),
            size=WRITTEN,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write_wide(path, SIZE)
        reading, summarizing = reading_and_summarizing(path)
        target = Target(0.8, at_least=True)
        yield measured("bytes a second of reading in order, over bare h5py", reading, target)
        name = "statistics of all gates, over reading them with bare h5py"
        yield measured(name, summarizing, Target(3.0))
    with tempfile.TemporaryDirectory() as folder:
        size = LARGE if shutil.disk_usage(folder).free > 2 * LARGE else LESS
        path = Path(folder) / "run.h5"
        long_traces.write_wide(path, size)
        name = f"one sequence at random of {size // 1024**3} GiB (128 steps of 256 units)"
        yield measured(name, random_sequences(path), Target(1.0), unit="ms")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write(path, make_module("rnn", hidden=4, record=("hidden",)), 1, 1, CALLS)
        name = f"grutrace info, of {CALLS} calls"
        yield measured(
            name, wall_time(long_traces.command("info", str(path))), Target(1.0), unit="s"
        )


def writing(folder: Path) -> Spread:
    """The writer's speed relative to a loop that writes the same bytes with h5py by chunks."""
    module, calls = long_traces.wide_module(), WRITTEN // long_traces.call_bytes()
    (site,) = module.sites
    columns = dataset_specs([module])
    paths = [quantity_path(module, site, name) for name in site.quantities]
    length = calls * long_traces.STEPS * long_traces.BATCH
    chunk = columns[paths[0]].chunks
    *_, call = long_traces.records(module, long_traces.STEPS, long_traces.BATCH, 1)
    assert isinstance(call, CallRecord)
    arrays = list(call.sites[site.suffix].rows.values())

    def bare() -> None:
        path = folder / "bare.h5"
        with h5py.File(path, "w", libver=LIBVER) as file:
            shape = (length, long_traces.HIDDEN)
            datasets = [
                file.create_dataset(
                    path_in_file, shape, np.float32, chunks=chunk, fill_time="never"
                ).id
                for path_in_file in paths
            ]
            for start in range(0, length, chunk[0]):
                inside = start % len(arrays[0])
                for dataset, array in zip(datasets, arrays, strict=True):
                    dataset.write_direct_chunk((start, 0), array[inside : inside + chunk[0]])
        path.unlink()

    def ours() -> None:
        path = folder / "run.h5"
        long_traces.write_wide(path, WRITTEN)
        path.unlink()

    return speed(ratio(bare, ours, 0.0, pairs=PAIRS, warm_up=1))


def reading_and_summarizing(path: Path) -> tuple[Spread, Spread]:
    """The speed of reading all gates relative to plain h5py, and the time to summarize them."""
    with grutrace.open(path) as trace:
        (name,) = trace.sites
        site = trace[name]
        paths = [quantity_path(site.module, site.site, gate) for gate in GATES]
        step = BLOCK // (long_traces.HIDDEN * np.dtype(np.float32).itemsize)

        def bare() -> None:
            with h5py.File(path, "r") as file:
                for path_in_file in paths:
                    dataset = file[path_in_file]
                    for start in range(0, len(dataset), step):
                        dataset[start : start + step]

        def read() -> None:
            _read(site, step)

        reading = ratio(bare, read, 0.0, pairs=PAIRS, warm_up=1)
        summarizing = ratio(bare, lambda: summarize_site(site), 0.0, pairs=PAIRS, warm_up=1)
    return speed(reading), summarizing


def _read(site: SiteTrace, step: int) -> None:
    for gate in GATES:
        rows = site.rows(gate)
        for start in range(0, len(rows), step):
            rows[start : start + step]


def random_sequences(path: Path) -> Spread:
    """The time to read a gate of one sequence, in milliseconds."""
    with grutrace.open(path) as trace:
        site = trace[trace.sites[-1]]
        numbers = np.random.default_rng(0).integers(len(site), size=1 + READINGS)
        # The first read builds the index of all sequences.
        np.asarray(site.sequence(int(numbers[0])).update)
        times = []
        for number in numbers[1:]:
            began = time.perf_counter()
            np.asarray(site.sequence(int(number)).update)
            times.append(1e3 * (time.perf_counter() - began))
    return spread(times)


def wall_time(command: list[str], runs: int = PAIRS) -> Spread:
    """The wall time of a command in seconds, after a first run."""
    times = []
    for _ in range(1 + runs):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return spread(times[1:])
