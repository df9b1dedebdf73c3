"""Files with a million calls, a million sequences or a thousand sites.

The files were written a moment before, as in `storage`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import grutrace
from benchmarks import long_traces
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import Spread, spread
from benchmarks.storage import random_sequences, wall_time
from grutrace.records import GATES, CallRecord, ModuleInfo, SiteRows, WeightsRecord
from grutrace.storage.format.schema import weight_shapes
from grutrace.storage.write.writer import Writer
from tests.storage.streams import make_header, make_module

#: Calls, or sequences.
MILLION = 1_000_000

#: Modules of two sites each.
MODULES = 500

#: Repetitions, of which the median is taken.
RUNS = 5


def figures() -> Iterator[Figure]:
    """Yield all figures, and remove the files."""
    narrow = make_module("rnn", hidden=4, record=("update", "hidden"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write(path, narrow, 1, 1, MILLION)
        yield from of_file(path, "a million calls", info=Target(1.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        long_traces.write(path, narrow, 3, 1000, MILLION // 1000)
        yield from of_file(path, "a million sequences", info=Target(1.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        began = time.perf_counter()
        write_many_sites(path, MODULES)
        name = f"{2 * MODULES} sites: creating, recording a call of each, closing"
        yield Figure(name, time.perf_counter() - began, "s")
        yield from of_file(path, f"{2 * MODULES} sites")


def of_file(path: Path, what: str, info: Target | None = None) -> Iterator[Figure]:
    """The time to read parts of a file."""
    yield measured(f"{what}: grutrace.open", _seconds(lambda: _open(path)), unit="s")
    yield measured(f"{what}: the first sequence, opening included", _first(path), unit="s")
    yield measured(
        f"{what}: one sequence at random", random_sequences(path), Target(1.0), unit="ms"
    )
    for command, target in (("info", info), ("stats", None)):
        took = wall_time(long_traces.command(command, str(path)))
        yield measured(f"{what}: grutrace {command}", took, target, unit="s")


def _open(path: Path) -> None:
    grutrace.open(path).close()


def _first(path: Path) -> Spread:
    def read() -> None:
        with grutrace.open(path) as trace:
            site = trace[trace.sites[len(trace.sites) // 2]]
            np.asarray(site.sequence(len(site) // 2).update)

    return _seconds(read)


def _seconds(do: Callable[[], None]) -> Spread:
    times = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return spread(times[1:])


def write_many_sites(path: Path, modules: int) -> None:
    """Write a trace of this many modules of two directions, with a call of each."""
    header = make_header(
        *(
            make_module(
                f"rnn{number}",
                hidden=16,
                width=16,
                directions=(False, True),
                record=(*GATES, "hidden"),
            )
            for number in range(modules)
        )
    )
    writer = Writer(path, header, "overwrite")
    for number, module in enumerate(header.modules):
        writer.write(_weights(number, module))
        writer.write(_call(number, module))
    writer.close()


def _weights(number: int, module: ModuleInfo) -> WeightsRecord:
    return WeightsRecord(
        number,
        0,
        {
            site.suffix: {
                name: np.zeros(shape, np.float32)
                for name, shape in weight_shapes(module, site).items()
            }
            for site in module.sites
        },
    )


def _call(number: int, module: ModuleInfo) -> CallRecord:
    states = np.zeros((2, module.hidden_size), np.float32)
    rows = np.full((20, module.hidden_size), 0.5, np.float32)
    sites = {
        site.suffix: SiteRows(dict.fromkeys(site.quantities, rows), states, 1e-7, 1e-6, 2.0**-23)
        for site in module.sites
    }
    steps, sequences = np.array([10, 10], np.uint32), np.array([0, 1], np.uint64)
    return CallRecord(number, 1.6e9, None, False, 0, steps, sequences, sites)
