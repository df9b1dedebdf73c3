"""Simulate a power loss: fsynced pages are kept, and other pages may be lost.

Between two fsyncs the system writes the pages of a file to the disk when and in which order it
likes. So a run's writes are logged, with its fsyncs and what it acknowledged; the log is cut at a
random place; everything before the last fsync is taken as it is, and of each page that was written
since, one of the states that it went through, at random. This models a loss of power; it is none.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.storage.recovery.recover import recover_file
from tools.soak import disk
from tools.soak.forks import Outcome, outcomes
from tools.soak.kills import look
from tools.soak.victims import run_for_ever

#: The unit that a disk writes atomically. Bytes.
PAGES = {"pages of 4096 bytes": 4096, "sectors of 512 bytes": 512}

#: The kinds of runs that write a trace.
KINDS = ("inline", "background", "deferred", "stepwise")

#: Simulated power losses per run.
CUTS = 5

_FSYNC, _ACKNOWLEDGED = -1, -2


def power(folder: Path, tries: int, seed: int = 0) -> list[Outcome]:
    """Simulate this many power losses."""
    result = outcomes(_tries(folder, tries, seed))
    return [cut for outcome in result for cut in outcome.get("cuts", [outcome])]


def _tries(folder: Path, tries: int, seed: int) -> Iterator[Callable[[], Outcome]]:
    for number in range(-(-tries // CUTS)):
        kind = KINDS[(number + number // len(KINDS)) % len(KINDS)]
        page = list(PAGES)[number % 2]
        # Control: without fsync, rows are lost.
        fsync = number % 4 != 3
        yield partial(cut_some, folder, kind, page, fsync, seed * 1_000_000 + number)


def cut_some(folder: Path, kind: str, page: str, fsync: bool, seed: int) -> Outcome:
    """Log the writes of a run, and simulate power losses at several moments."""
    folder_of_seed = folder / f"power-{seed}"
    folder_of_seed.mkdir()
    log = folder_of_seed / "log"
    with log.open("ab", buffering=0) as journal:
        # By another name until it is renamed: so by the folder.
        disk.log(folder_of_seed / "run", journal.fileno())

        def acknowledge(calls: int) -> None:
            journal.write(struct.pack("<qqq", calls, _ACKNOWLEDGED, 0))

        run_for_ever(kind, folder_of_seed / "run.h5", acknowledge, seed, fsync=fsync, runs=12)
        disk.log(Path("/nowhere"), -1)
    events = list(_events(log.read_bytes()))
    log.unlink()
    rng = random.Random(seed)
    cuts = []
    for number in range(CUTS):
        about = {"kind": kind, "page": page, "fsync": fsync, "seed": seed, "cut": number}
        remains = _left(events, rng.randrange(len(events)), PAGES[page], rng, fsync=fsync)
        cuts.append(about | _look(folder_of_seed / f"cut-{number}.h5", remains))
    return {"cuts": cuts}


#: Offset, length, inode, bytes.
_Event = tuple[int, int, int, bytes]


def _events(log: bytes) -> Iterator[_Event]:
    index = 0
    while index < len(log):
        offset, length, inode = struct.unpack_from("<qqq", log, index)
        index += 24
        yield offset, length, inode, log[index : index + max(0, length)]
        index += max(0, length)


@dataclass
class _Left:
    """The files after a power loss.

    Attributes:
        content: Of the file.
        acknowledged: Calls that a flush had returned for.
    """

    content: bytearray = field(default_factory=bytearray)
    acknowledged: int = 0


def _left(events: list[_Event], cut: int, page: int, rng: random.Random, *, fsync: bool) -> _Left:
    """What is there of the file and, where a smaller copy is about to take its place, of either."""
    before = events[:cut]
    acknowledged = [offset for offset, length, _, _ in before if length == _ACKNOWLEDGED]
    # Of a folder there are only fsyncs.
    inodes = list(dict.fromkeys(inode for _, length, inode, _ in before if length >= 0))
    # A copy takes the place once the disk has it; and the disk may not know of that yet.
    synced = {inode for _, length, inode, _ in before if length == _FSYNC}
    there = [inode for inode in inodes[1:] if inode in synced or not fsync]
    chosen = rng.choice([*inodes[:1], *there]) if inodes else 0
    own = [event for event in before if event[2] == chosen]
    return _Left(_content(own, page, rng), max(acknowledged, default=0))


def _content(events: list[_Event], page: int, rng: random.Random) -> bytearray:
    """The content of one file after a power loss."""
    last = max((n for n, event in enumerate(events) if event[1] == _FSYNC), default=-1)
    content, now = bytearray(), bytearray()
    states: dict[int, list[bytes]] = {}
    for number, (offset, length, _, written) in enumerate(events):
        if length >= 0:
            now.extend(bytes(max(0, offset + length - len(now))))
            now[offset : offset + length] = written
            if number > last:
                for first in range(offset // page * page, offset + length, page):
                    states.setdefault(first, []).append(bytes(now[first : first + page]))
        if number == last:
            content = bytearray(now)
    for first, those in states.items():
        before = bytes(content[first : first + page])
        page_left = rng.choice([before, *those])
        if page_left:
            content.extend(bytes(max(0, first + len(page_left) - len(content))))
            content[first : first + len(page_left)] = page_left
    return content


def _look(path: Path, remains: _Left) -> Outcome:
    path.write_bytes(remains.content)
    results = {"acknowledged": remains.acknowledged, "calls": 0, "wrong": 0, "opened": None}
    # As it is, where HDF5 may wait for ever for a writer that is not there.
    as_it_is = outcomes([partial(look, "", path)], lanes=1, limit=2.0)[0]
    results["as_it_is"] = "error" not in as_it_is and as_it_is["calls"] >= remains.acknowledged
    recovered = path.with_suffix(".recovered.h5")
    try:
        recover_file(path, recovered, timeout=5.0)
    except TraceFileError as error:
        # Without fsync HDF5 may be given anything; it is stopped where it does not come to an end.
        return results | {"refused": str(error)}
    return results | look("", recovered)
