"""Judge all cases in processes that may crash, and collect the outcomes."""

from __future__ import annotations

import itertools
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.storage.recovery.preflight import check_in_subprocess
from tools.hostile.cases import make

#: Time limit of the preflight check of a case. Seconds.
PATIENCE = 20


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        number: Of the case.
        name: What it is.
        outcome: ``refused``, ``read`` or ``fault``; ``crash`` or ``hang`` where the process that
            judged it by itself did not survive; ``unmade`` where HDF5 did not survive making it.
            ``late`` is no outcome: the process that judged this case and others before it died.
        detail: The error; or what was done when the process died.
    """

    number: int
    name: str
    outcome: str
    detail: str


def all_outcomes(seed: int, first: int, stop: int, jobs: int) -> Iterator[Outcome]:
    """Judge cases in several processes at once, and yield their outcomes, in any order."""
    result: queue.Queue[Outcome | BaseException | None] = queue.Queue()

    def work(part: range) -> None:
        try:
            for outcome in outcomes(seed, part.start, part.stop):
                result.put(outcome)
        except BaseException as error:
            result.put(error)
        result.put(None)

    bounds = [first + (stop - first) * job // jobs for job in range(jobs + 1)]
    threads = [
        threading.Thread(target=work, args=[range(*pair)]) for pair in itertools.pairwise(bounds)
    ]
    for thread in threads:
        thread.start()
    working = len(threads)
    while working:
        item = result.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            working -= 1
        else:
            yield item
    for thread in threads:
        thread.join()


def outcomes(seed: int, first: int, stop: int) -> Iterator[Outcome]:
    """Judge cases, and yield their outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tools.hostile.worker", folder]
        numbers = map(str, (seed, first, stop))
        with subprocess.Popen([*command, *numbers], stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            name, doing = "", ""
            for line in worker.stdout:
                message = json.loads(line)
                name, before, doing = message.get("name", name), doing, message["doing"]
                if doing == "again":
                    yield Outcome(
                        message["case"], name, "late", f"{before}; it is judged by itself"
                    )
                if doing == "done":
                    yield Outcome(message["case"], name, message["outcome"], message["detail"])
                elif doing == "died":
                    yield _death(message["case"], name, before, message["signal"])
        if worker.returncode:
            raise RuntimeError(f"the worker ended with {worker.returncode}")


def _death(number: int, name: str, doing: str, signal_number: int) -> Outcome:
    if not signal_number:
        raise RuntimeError(f"case {number}: the process that judged it failed")
    if doing == "making":
        return Outcome(number, "", "unmade", "HDF5 does not survive making it")
    if signal_number == signal.SIGALRM:
        return Outcome(number, name, "hang", doing)
    return Outcome(number, name, "crash", f"{doing}, {signal.Signals(signal_number).name}")


def said_from_outside(seed: int, number: int) -> str:
    """The message of the preflight check of a case; empty if the file passes."""
    with tempfile.TemporaryDirectory() as folder:
        make(seed, number, Path(folder))
        try:
            check_in_subprocess(Path(folder) / "run.h5", PATIENCE)
        except TraceFileError as error:
            return str(error)
    return ""


def counts(outcomes: list[Outcome]) -> Counter[str]:
    """The number of cases of each outcome."""
    return Counter(outcome.outcome for outcome in outcomes)
