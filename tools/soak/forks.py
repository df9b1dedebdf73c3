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
    for each in tries:
        while len(running) >= lanes:
            _wait(running, results, limit)
        running.append(_begin(each))
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


def _wait(running: list[_Running], found: list[Outcome], limit: float) -> None:
    ready, _, _ = select.select([each.reader for each in running], [], [], 0.1)
    for each in list(running):
        if each.reader in ready:
            message = os.read(each.reader, 1 << 16)
            each.said += message
            if not message:
                _end(each, running, found)
        elif time.monotonic() - each.begun > limit:
            os.kill(each.process, signal.SIGKILL)
            each.said = json.dumps({"error": f"no end within {limit} s"}).encode()
            _end(each, running, found)


def _end(each: _Running, running: list[_Running], found: list[Outcome]) -> None:
    os.close(each.reader)
    status = os.waitstatus_to_exitcode(os.waitpid(each.process, 0)[1])
    try:
        found.append(json.loads(each.said))
    except ValueError:
        found.append({"error": f"ended with {status} and said {each.said!r}"})
    running.remove(each)
