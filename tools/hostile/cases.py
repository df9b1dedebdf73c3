"""The corpus. Each case depends only on its number and a seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import h5py

from tools.hostile import datasets, groups, seeds
from tools.hostile.checksums import put_right, structures
from tools.hostile.spot import Change, Spot

#: Where a file may be cut. Bytes.
PAGE = 4096

#: What h5py raises where it would not make a change, or an earlier one has left nothing to change.
_REFUSED = (
    *(ValueError, TypeError, KeyError, IndexError, OSError, RuntimeError, AttributeError),
    MemoryError,
)

#: Makes a case in a folder, and says what it is. The file is `run.h5` there.
Maker = Callable[[random.Random, Path], str]


def _seed(chance: random.Random) -> str:
    return chance.choice([*seeds.TRACES, seeds.STATISTICS])


def _changed(chance: random.Random, folder: Path) -> str:
    """One to three changes that HDF5 makes."""
    name = _seed(chance)
    path = seeds.put(name, folder / "run.h5")
    if name == "killed":
        # It is marked as being written, which HDF5 would refuse to write to.
        content = bytearray(path.read_bytes())
        _unmark(content)
        path.write_bytes(content)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        count = chance.choice([1, 1, 1, 2, 3])
        done = [_change(file, chance, folder / "pipe") for _ in range(count)]
    return f"{name}, {'; '.join(done)}"


def _change(file: h5py.File, chance: random.Random, pipe: Path) -> str:
    """Change one thing, and say which."""
    of_datasets: list[tuple[str, Change]] = list(datasets.CHANGES.items())
    kind = chance.random()
    if kind < 0.7:
        place = chance.choice(_places(file, h5py.Dataset))
        numbers = ("another number", datasets.another_number)
        name, change = numbers if kind < 0.25 else chance.choice(of_datasets)
    else:
        place = chance.choice(["/", *_places(file, h5py.Group)])
        name, change = chance.choice(list(groups.CHANGES.items()))
    try:
        change(Spot(file, place, chance, pipe))
    except _REFUSED as error:
        return f"{place}: {name} (not done: {type(error).__name__})"
    return f"{place}: {name}"


def _places(file: h5py.File, kind: type) -> list[str]:
    results: list[str] = []
    file.visititems(lambda name, each: results.append(name) if isinstance(each, kind) else None)
    return results or ["/"]


def _unmark(content: bytearray) -> None:
    content[11] &= ~0b101
    put_right(content, 0, 44)


def _cut(chance: random.Random, folder: Path) -> str:
    """Cut off at a page."""
    name = _seed(chance)
    content = seeds.content(name)
    # Most of a file lies in few of its bytes: cut there, and anywhere.
    length = len(content) if chance.random() < 0.5 else min(len(content), 60 * PAGE)
    at = PAGE * chance.randrange(1 + length // PAGE)
    (folder / "run.h5").write_bytes(content[:at])
    return f"{name}, cut at {at}"


def _flipped(chance: random.Random, folder: Path) -> str:
    """A few bytes changed anywhere that is not zero."""
    name = _seed(chance)
    content = bytearray(seeds.content(name))
    used = _used(name)
    places = sorted(chance.choice(used) for _ in range(chance.choice([1, 1, 2, 8, 40])))
    for place in places:
        content[place] = chance.choice([content[place] ^ (1 << chance.randrange(8)), 0, 255])
    (folder / "run.h5").write_bytes(content)
    return f"{name}, bytes {places[:4]}"


def _believed(chance: random.Random, folder: Path) -> str:
    """A few bytes of one of HDF5's own structures changed, and its checksum put right."""
    name = chance.choice(seeds.TRACES)
    content = bytearray(seeds.content(name))
    result = _structures(name)
    changed = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        start, end = chance.choice(result)
        for _ in range(chance.choice([1, 1, 2, 4])):
            place = chance.randrange(start + 4, end)
            content[place] = chance.choice(
                [content[place] ^ (1 << chance.randrange(8)), 0, 255, chance.randrange(256)]
            )
            changed.append(place)
        put_right(content, start, end)
    (folder / "run.h5").write_bytes(content)
    return f"{name}, believed bytes {changed}"


def _no_hdf5(chance: random.Random, folder: Path) -> str:
    """Something else than a file, or another file."""
    path = folder / "run.h5"
    kind = chance.choice(["pipe", "folder", "dangling", "link to a pipe", "zero", "bytes", "block"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "link to a pipe":
        path.symlink_to("pipe")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "bytes":
        heads = [b"", b"PK\x03\x04", b"\x1f\x8b", b"\x89HDF", b"\x89HDF\r\n\x1a\n", b"\0" * 512]
        path.write_bytes(chance.choice(heads) + chance.randbytes(chance.choice([0, 1, 99, 9999])))
    else:
        size = chance.choice([512, 1024, 4096, 100])
        path.write_bytes(b"#!/bin/sh\n".ljust(size, b" ") + seeds.content("decoder"))
    return f"no HDF5: {kind}"


def _parts(chance: random.Random, folder: Path) -> str:
    """A run of parts whose second is not what it should be."""
    first, second = folder / "run.h5", folder / "run.part0002.h5"
    seeds.put("run", first)
    seeds.put("run.part0002", second)
    kind = chance.choice(["pipe", "folder", "link", "loop", "first", "cut", "flip", "change", "3"])
    if kind in ("pipe", "folder", "link", "loop"):
        second.unlink()
    if kind == "pipe":
        os.mkfifo(second)
    elif kind == "folder":
        second.mkdir()
    elif kind == "link":
        (folder / "outside").mkdir()
        seeds.put("run.part0002", folder / "outside" / "run.part0002.h5")
        second.symlink_to("outside/run.part0002.h5")
    elif kind == "loop":
        second.symlink_to("run.part0002.h5")
    elif kind == "first":
        seeds.put("run", second)
    elif kind == "3":
        second.rename(folder / "run.part0003.h5")
    elif kind == "cut":
        content = seeds.content("run.part0002")
        second.write_bytes(content[: PAGE * chance.randrange(len(content) // PAGE)])
    elif kind == "flip":
        content = bytearray(seeds.content("run.part0002"))
        for place in chance.sample(_used("run.part0002"), 2):
            content[place] ^= 1 << chance.randrange(8)
        second.write_bytes(content)
    else:
        with h5py.File(second, "r+", libver=("v110", "v110")) as file:
            kind = _change(file, chance, folder / "pipe")
    return f"part 2: {kind}"


def _merged(chance: random.Random, folder: Path) -> str:
    """A merged file, or a shard that it is of, which is not what it should be."""
    for name, content in seeds.merged().items():
        (folder / name).write_bytes(content)
    shards = [name for name in seeds.merged() if name != "run.h5"]
    path = folder / chance.choice(["run.h5", "run.h5", *shards])
    kind = chance.choice(["change", "change", "change", "virtual", "pipe", "link", "gone", "other"])
    if kind in ("change", "virtual"):
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            if kind == "change":
                return f"merged, {path.name}, {_change(file, chance, folder / 'pipe')}"
            spot = Spot(file, chance.choice(_places(file, h5py.Dataset)), chance, folder / "pipe")
            try:
                datasets.CHANGES["virtual"](spot)
            except _REFUSED:
                return "merged, unchanged"
            return f"merged, {path.name}, {spot.place}: virtual"
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (folder / "outside").write_bytes(content)
        path.symlink_to("outside")
    elif kind == "other":
        seeds.put("decoder", path)
    return f"merged, {path.name}: {kind}"


_known: dict[str, list[int]] = {}
_believable: dict[str, list[tuple[int, int]]] = {}


def _used(name: str) -> list[int]:
    if name not in _known:
        _known[name] = [place for place, byte in enumerate(seeds.content(name)) if byte]
    return _known[name]


def _structures(name: str) -> list[tuple[int, int]]:
    if name not in _believable:
        _believable[name] = list(structures(seeds.content(name)))
    return _believable[name]


#: Kinds of cases, and how many of twenty-one are of each.
KINDS: tuple[tuple[int, Maker], ...] = (
    (7, _changed),
    (3, _cut),
    (3, _flipped),
    (5, _believed),
    (1, _no_hdf5),
    (1, _parts),
    (1, _merged),
)

_BY_TURN = [maker for count, maker in KINDS for _ in range(count)]


def make(seed: int, number: int, folder: Path) -> str:
    """Make a case in an empty folder, and say what it is."""
    os.mkfifo(folder / "pipe")
    chance = random.Random(f"{seed} {number}")
    return _BY_TURN[number % len(_BY_TURN)](chance, folder)
