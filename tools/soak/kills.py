"""SIGKILL at a random moment. Every acknowledged call must be present and complete."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grutrace
from tools.soak import plain_check
from tools.soak.forks import Outcome, outcomes
from tools.soak.victims import KINDS, run_for_ever

#: A run is killed after up to `ACKNOWLEDGEMENTS`, and at most this much later: about the time from
#: one acknowledgement to the next. Seconds.
LIFE = 0.1
ACKNOWLEDGEMENTS = 5


def kills(folder: Path, tries: int, seed: int = 0, *, fsync: bool = False) -> list[Outcome]:
    """Kill this many runs."""
    return outcomes(_tries(folder, tries, seed, fsync))


def _tries(folder: Path, tries: int, seed: int, fsync: bool) -> Iterator[Callable[[], Outcome]]:
    for number in range(tries):
        kind = KINDS[number % len(KINDS)]
        yield partial(kill_one, folder, kind, seed * 1_000_000 + number, fsync=fsync)


def kill_one(folder: Path, kind: str, seed: int, *, fsync: bool = False) -> Outcome:
    """Kill one run, and check its file."""
    path = folder / f"{kind}-{seed}.h5"
    with (folder / f"{kind}-{seed}.calls").open("w+b", buffering=0) as told:
        os.pwrite(told.fileno(), bytes(8), 0)

        def acknowledge(calls: int) -> None:
            os.pwrite(told.fileno(), calls.to_bytes(8, "little"), 0)

        victim = os.fork()
        if not victim:
            try:
                run_for_ever(kind, path, acknowledge, seed, fsync=fsync)
            finally:
                os._exit(1)
        _wait(random.Random(seed), told.fileno())
        os.kill(victim, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
        acknowledged = int.from_bytes(os.pread(told.fileno(), 8, 0), "little")
    results = {"kind": kind, "seed": seed, "killed": killed, "acknowledged": acknowledged}
    if not path.exists():
        # Killed before the file existed.
        return results | {"calls": 0, "wrong": 0, "opened": None}
    return results | look(kind, path)


def _wait(rng: random.Random, told: int) -> None:
    """Wait until a random moment, measured by the run's progress, not by time."""
    remaining, last = rng.randint(0, ACKNOWLEDGEMENTS), 0
    while remaining:
        time.sleep(0.001)
        calls = int.from_bytes(os.pread(told, 8, 0), "little")
        remaining, last = remaining - (calls != last), calls
    time.sleep(rng.uniform(0, LIFE))


def look(kind: str, path: Path) -> Outcome:
    """Check a killed run's file: its calls, its wrong values, and the time to open it."""
    begun = time.monotonic()
    if kind == "statistics":
        calls = grutrace.Statistics.load(path).calls
        opened = time.monotonic() - begun
        counted, wrong = plain_check.wrong_figures(path)
    else:
        with grutrace.open(path) as trace:
            calls, opened = len(trace.calls), time.monotonic() - begun
        counted, wrong = plain_check.torn_rows(path)
    return {"calls": calls, "same": calls == counted, "wrong": wrong, "opened": opened}
