"""Read a file while it is written, under load. There must be no error and no incomplete row.

All pairs of a writer and a follower run at once, more than there are cores.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import grutrace
from grutrace.records import DEFAULT_RECORD
from grutrace.storage.write.file_sink import FileSink
from tests.storage import coded
from tools.soak.forks import Outcome, outcomes
from tools.soak.victims import run_for_ever

#: The pause of a writer of coded rows between two calls. Seconds.
CODED = {"big": 0.2, "stepwise": 0.002}

#: Kinds of runs with real models. Their gates follow from states and weights.
MODELS = ("inline", "background", "deferred", "stepwise")

#: Earlier rows that are read again at each refresh, and sequences of a model.
AGAIN, SEQUENCES = 3, 6

#: The tolerance of a gate against NumPy in float64.
TOLERANCE = 2e-5


def live(folder: Path, seconds: float, seed: int = 0) -> list[Outcome]:
    """Follow all writers for the given seconds."""
    tries = list(_tries(folder, seconds, seed))
    return outcomes(tries, lanes=len(tries), limit=seconds + 120)


def _tries(folder: Path, seconds: float, seed: int) -> Iterator[Callable[[], Outcome]]:
    for shape in CODED:
        yield partial(follow_process, folder, f"rows that say where they belong, {shape}", seconds,
                      partial(_write_coded, shape), partial(check_coded, shape), seed)  # fmt: skip
        yield partial(follow_thread, folder, shape, seconds, seed)
    for kind in MODELS:
        yield partial(follow_process, folder, f"a model, {kind}", seconds,
                      partial(_write_model, kind), check_model, seed)  # fmt: skip


def follow_process(
    folder: Path,
    what: str,
    seconds: float,
    write: Callable[[Path], None],
    check: Callable[..., int],
    seed: int,
) -> Outcome:
    """Follow what another process writes."""
    path = folder / f"live-{what.replace(' ', '-').replace(',', '')}.h5"
    writer = os.fork()
    if not writer:
        try:
            write(path)
        finally:
            os._exit(1)
    try:
        while not path.exists():
            time.sleep(0.01)
        result = _follow(path, seconds, check, seed)
    finally:
        os.kill(writer, signal.SIGKILL)
        found_dead = os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1])
    return {"kind": f"{what}; another process", "writer": found_dead, **result}


def follow_thread(folder: Path, shape: str, seconds: float, seed: int) -> Outcome:
    """Follow what a thread of this process writes."""
    path = folder / f"live-thread-{shape}.h5"
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    ended = threading.Event()

    def write() -> None:
        for call in itertools.count():
            if ended.wait(CODED[shape]):
                return
            sink.append(coded.block(call, shape))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = _follow(path, seconds, partial(check_coded, shape), seed)
    finally:
        ended.set()
        writer.join()
        sink.close()
    what = f"rows that say where they belong, {shape}; the same process"
    return {"kind": what, "writer": -signal.SIGKILL, **result}


def _write_coded(shape: str, path: Path) -> None:
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    for call in itertools.count():
        sink.append(coded.block(call, shape))
        if call % 50 == 0:
            sink.flush()
        time.sleep(CODED[shape])


def _write_model(kind: str, path: Path) -> None:
    run_for_ever(kind, path, lambda _: None, seed=0)


def _follow(path: Path, seconds: float, check: Callable[..., int], seed: int) -> Outcome:
    rng = random.Random(seed)
    until = time.monotonic() + seconds
    calls = refreshes = changes = checked = 0
    slowest = 0.0
    with grutrace.open(path) as trace:
        while time.monotonic() < until:
            begun = time.monotonic()
            trace.refresh()
            slowest = max(slowest, time.monotonic() - begun)
            now = len(trace.calls)
            assert now >= calls, f"{now} calls, and {calls} before"
            checked += check(trace, calls, rng)
            refreshes, changes, calls = refreshes + 1, changes + (now > calls), now
    return {
        "refreshes": refreshes,
        "changes": changes,
        "calls": calls,
        "checked": checked,
        "slowest": slowest,
        "bytes": path.stat().st_size,
    }


def check_coded(shape: str, trace: Any, seen: int, rng: random.Random) -> int:
    """Check all new rows and a sample of earlier ones; return their number."""
    calls, site = trace.calls, trace["rnn.l0"]
    batch, steps, goes_on = coded.SHAPES[shape]
    ranges = [(seen, len(calls))]
    for _ in range(AGAIN if seen else 0):
        first = rng.randrange(seen)
        ranges.append((first, min(seen, first + 2)))
    per_call, checked = batch * steps, 0
    for first, last in ranges:
        if first == last:
            continue
        expected = np.concatenate([coded.rows(call, per_call) for call in range(first, last)])
        for offset, name in enumerate(DEFAULT_RECORD):
            result = site.rows(name)[first * per_call : last * per_call]
            assert np.array_equal(result, expected + offset), f"{name} of calls {first} to {last}"
        assert calls["time"][first:last].tolist() == list(range(first, last))
        tags = [f"tag {call // 100}" for call in range(first, last)]
        assert calls["tag"][first:last].tolist() == tags
        checked += len(expected) * len(DEFAULT_RECORD)
    pieces = trace.snapshot.tables.pieces[0]["sequence"]
    numbers = np.arange(len(calls) * batch)
    assert np.array_equal(pieces, numbers % batch if goes_on else numbers)
    return checked


def check_model(trace: Any, seen: int, rng: random.Random) -> int:
    """Check the last and other sequences against the equations in NumPy; return the rows."""
    checked = 0
    for name in trace.sites:
        site = trace[name]
        if not len(site):
            continue
        checked_sequences = {rng.randrange(len(site)) for _ in range(SEQUENCES)} | {len(site) - 1}
        own = trace.sequences[trace.sequences["module"] == site.module.path]
        for number in checked_sequences:
            version = int(trace.calls["weights"][own["call"][number]])
            checked += _check_sequence(site.sequence(number), site.weights(version))
    return checked


def _check_sequence(sequence: Any, weights: Any) -> int:
    w = {name: array.astype("f8") for name, array in weights.items()}
    x, h = sequence.input.astype("f8"), sequence.previous.astype("f8")
    i = np.split(x @ w["weight_ih"].T + w["bias_ih"], 3, axis=1)
    g = np.split(h @ w["weight_hh"].T + w["bias_hh"], 3, axis=1)
    r, z = 1 / (1 + np.exp(-i[0] - g[0])), 1 / (1 + np.exp(-i[1] - g[1]))
    n = np.tanh(i[2] + r * g[2])
    results = {"reset": r, "update": z, "candidate": n, "hidden": (1 - z) * n + z * h}
    for name, expected in results.items():
        off = np.abs(getattr(sequence, name) - expected).max(initial=0)
        assert off <= TOLERANCE, f"{name} is off by {off}"
    return len(x)
