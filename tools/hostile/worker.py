"""Judge cases in forked processes, which may crash.

    python -m tools.hostile.worker FOLDER SEED FIRST STOP

It writes a line of JSON for each case, and, before each thing that it does, what that is.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import struct
import sys
import warnings
from pathlib import Path

import torch

import grutrace
from tools.hostile import seeds
from tools.hostile.cases import make
from tools.hostile.judge import judge

#: Memory limit of a case. No intact file needs nearly as much. Bytes.
MEMORY = 384 * 1024 * 1024

#: Commands, and how many cases apart they run. `verify` is slow: it starts a process.
COMMANDS = ((3, ("info",)), (11, ("stats", "info --json")), (31, ("verify", "stats --json")))

#: Cases that one forked process judges, unless it dies before. A fork is slow: it copies pages.
BATCH = 100

#: Time for one case. Seconds.
LIMIT = 10


def main(folder: Path, seed: int, first: int, stop: int) -> None:
    faulthandler.disable()
    # A warning would be an unexpected line of output.
    warnings.simplefilter("error")
    # Damaged states do not follow from the weights, so this warning is expected.
    warnings.simplefilter("ignore", grutrace.ResidualWarning)
    torch.set_num_threads(1)
    for name in (*seeds.TRACES, seeds.STATISTICS, "run", "run.part0002"):
        seeds.content(name)
    seeds.merged()
    _warm_up(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    while first < stop:
        first = _judge_some(folder, seed, first, min(stop, first + BATCH))


def _judge_some(folder: Path, seed: int, first: int, stop: int) -> int:
    """Judge cases up to the first that crashes the process; return the next case."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        for number in range(first, stop):
            os.write(theirs, number.to_bytes(8, "little"))
            _judge_one(folder / str(number), seed, number)
        os._exit(0)
    os.close(theirs)
    _, status = os.waitpid(child, 0)
    begun = [number for (number,) in struct.iter_unpack("<Q", os.read(ours, 8 * BATCH))]
    os.close(ours)
    if not status:
        return stop
    shutil.rmtree(folder / str(begun[-1]), ignore_errors=True)
    if len(begun) > 1 and os.WTERMSIG(status) != signal.SIGALRM:
        # Judge it alone: an earlier case may have corrupted the memory of this process.
        _note(begun[-1], "again")
        return _judge_some(folder, seed, begun[-1], begun[-1] + 1)
    _note(begun[-1], "died", signal=os.WTERMSIG(status))
    return begun[-1] + 1


def _judge_one(folder: Path, seed: int, number: int) -> None:
    folder.mkdir(parents=True)
    _note(number, "making")
    signal.alarm(LIMIT)
    name = make(seed, number, folder)
    _note(number, "judging", name=name)
    commands = [
        command for turn, selected in COMMANDS if number % turn == 0 for command in selected
    ]
    verdict = judge(folder, lambda doing: _note(number, doing), commands)
    signal.alarm(0)
    _note(number, "done", outcome=verdict.outcome, detail=verdict.detail)
    shutil.rmtree(folder)


def _note(number: int, doing: str, **about: str | int) -> None:
    # print() would lose the lines in its buffer when the process dies.
    os.write(1, (json.dumps({"case": number, "doing": doing, **about}) + "\n").encode())


def _warm_up(folder: Path) -> None:
    """Load libraries that are loaded on first use, before the memory is limited."""
    for number, name in enumerate((*seeds.TRACES, seeds.STATISTICS)):
        case_folder = folder / f"sound{number}"
        case_folder.mkdir(parents=True)
        seeds.put(name, case_folder / "run.h5")
        verdict = judge(case_folder, lambda _: None, ["info", "stats"])
        assert verdict.outcome == "read", verdict
        shutil.rmtree(case_folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
