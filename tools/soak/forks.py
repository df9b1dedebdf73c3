"""Run many tries as forks of one process that has loaded torch."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

#: The outcome of a try, as JSON.
Outcome = dict[str, Any]


@dataclass
class _Running:
    process: int
    reader: int
    begun: float
    said: bytes = b""


def outcomes(
    tries: Iterable[Callable[[], Outcome]], lanes: int = 2, limit: float = 60.0
) -> list[Outcome]:
    """Run tries, each in its own process, and return the outcomes in the order in which they end.

    The outcome of a try that raises or does not end in time is "error".
    """
    results: list[Outcome] = []
    running: list[_Running] = []
    for one_try in tries:
        while len(running) >= lanes:
            _wait(running, results, limit)
        running.append(_begin(one_try))
    while running:
        _wait(running, results, limit)
    return results


def _begin(work: Callable[[], Outcome]) -> _Running:
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.close(reader)
        try:
            outcome = work()
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(outcome).encode())
        os._exit(0)
    os.close(writer)
    return _Running(process, reader, time.monotonic())


def _wait(running: list[_Running], outcomes: list[Outcome], limit: float) -> None:
    ready, _, _ = select.select([child.reader for child in running], [], [], 0.1)
    for child in list(running):
        if child.reader in ready:
            message = os.read(child.reader, 1 << 16)
            child.said += message
            if not message:
                _end(child, running, outcomes)
        elif time.monotonic() - child.begun > limit:
            os.kill(child.process, signal.SIGKILL)
            child.said = json.dumps({"error": f"no end within {limit} s"}).encode()
            _end(child, running, outcomes)


def _end(child: _Running, running: list[_Running], outcomes: list[Outcome]) -> None:
    os.close(child.reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child.process, 0)[1])
    try:
        outcomes.append(json.loads(child.said))
    except ValueError:
        outcomes.append({"error": f"ended with {status} and said {child.said!r}"})
    running.remove(child)
