"""The corpus. Each case depends only on its number and a seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from tools.hostile import datasets, groups, seeds
from tools.hostile.checksums import put_right, structures
from tools.hostile.spot import Change, Spot

#: Files are truncated at multiples of this size. Bytes.
PAGE = 4096

#: Errors of h5py if it refuses a change, or if an earlier change removed the object.
_REFUSED = (
    *(ValueError, TypeError, KeyError, IndexError, OSError, RuntimeError, AttributeError),
    MemoryError,
)

#: Makes a case in a folder, as the file `run.h5`, and returns its description.
Maker = Callable[[random.Random, Path], str]


def _seed(rng: random.Random) -> str:
    return rng.choice([*seeds.TRACES, seeds.STATISTICS])


def _changed(rng: random.Random, folder: Path) -> str:
    """Make one to three changes with HDF5."""
    name = _seed(rng)
    path = seeds.put(name, folder / "run.h5")
    if name == "killed":
        # HDF5 does not write to a file that is marked as being written.
        content = bytearray(path.read_bytes())
        _unmark(content)
        path.write_bytes(content)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        count = rng.choice([1, 1, 1, 2, 3])
        done = [_change(file, rng, folder / "pipe") for _ in range(count)]
    return f"{name}, {'; '.join(done)}"


def _change(file: h5py.File, rng: random.Random, pipe: Path) -> str:
    """Make one change, and return its description."""
    of_datasets: list[tuple[str, Change]] = list(datasets.CHANGES.items())
    kind = rng.random()
    if kind < 0.7:
        path = rng.choice(_paths(file, h5py.Dataset))
        numbers = ("another number", datasets.another_number)
        name, change = numbers if kind < 0.25 else rng.choice(of_datasets)
    else:
        path = rng.choice(["/", *_paths(file, h5py.Group)])
        name, change = rng.choice(list(groups.CHANGES.items()))
    try:
        change(Spot(file, path, rng, pipe))
    except _REFUSED as error:
        return f"{path}: {name} (not done: {type(error).__name__})"
    return f"{path}: {name}"


def _paths(file: h5py.File, kind: type) -> list[str]:
    results: list[str] = []
    file.visititems(lambda name, member: results.append(name) if isinstance(member, kind) else None)
    return results or ["/"]


def _unmark(content: bytearray) -> None:
    content[11] &= ~0b101
    put_right(content, 0, 44)


def _cut(rng: random.Random, folder: Path) -> str:
    """Truncate a file at a page."""
    name = _seed(rng)
    content = seeds.content(name)
    # HDF5's structures are in the first pages: truncate there in half of the cases.
    length = len(content) if rng.random() < 0.5 else min(len(content), 60 * PAGE)
    at = PAGE * rng.randrange(1 + length // PAGE)
    (folder / "run.h5").write_bytes(content[:at])
    return f"{name}, cut at {at}"


def _flipped(rng: random.Random, folder: Path) -> str:
    """Change a few nonzero bytes."""
    name = _seed(rng)
    content = bytearray(seeds.content(name))
    used = _used(name)
    offsets = sorted(rng.choice(used) for _ in range(rng.choice([1, 1, 2, 8, 40])))
    for offset in offsets:
        content[offset] = rng.choice([content[offset] ^ (1 << rng.randrange(8)), 0, 255])
    (folder / "run.h5").write_bytes(content)
    return f"{name}, bytes {offsets[:4]}"


def _believed(rng: random.Random, folder: Path) -> str:
    """Change a few bytes of an HDF5 structure, and correct its checksum."""
    name = rng.choice(seeds.TRACES)
    content = bytearray(seeds.content(name))
    result = _structures(name)
    changed = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        start, end = rng.choice(result)
        for _ in range(rng.choice([1, 1, 2, 4])):
            offset = rng.randrange(start + 4, end)
            content[offset] = rng.choice(
                [content[offset] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)]
            )
            changed.append(offset)
        put_right(content, start, end)
    (folder / "run.h5").write_bytes(content)
    return f"{name}, believed bytes {changed}"


def _no_hdf5(rng: random.Random, folder: Path) -> str:
    """A pipe, folder or link instead of a file, or a file that is not HDF5."""
    path = folder / "run.h5"
    kind = rng.choice(["pipe", "folder", "dangling", "link to a pipe", "zero", "bytes", "block"])
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
        path.write_bytes(rng.choice(heads) + rng.randbytes(rng.choice([0, 1, 99, 9999])))
    else:
        size = rng.choice([512, 1024, 4096, 100])
        path.write_bytes(b"#!/bin/sh\n".ljust(size, b" ") + seeds.content("decoder"))
    return f"no HDF5: {kind}"


def _parts(rng: random.Random, folder: Path) -> str:
    """A run whose second file is damaged or another kind of object."""
    first, second = folder / "run.h5", folder / "run.part0002.h5"
    seeds.put("run", first)
    seeds.put("run.part0002", second)
    kind = rng.choice(["pipe", "folder", "link", "loop", "first", "cut", "flip", "change", "3"])
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
        second.write_bytes(content[: PAGE * rng.randrange(len(content) // PAGE)])
    elif kind == "flip":
        content = bytearray(seeds.content("run.part0002"))
        for offset in rng.sample(_used("run.part0002"), 2):
            content[offset] ^= 1 << rng.randrange(8)
        second.write_bytes(content)
    else:
        with h5py.File(second, "r+", libver=("v110", "v110")) as file:
            kind = _change(file, rng, folder / "pipe")
    return f"part 2: {kind}"


def _merged(rng: random.Random, folder: Path) -> str:
    """A merged file with a change in it or in one of its shards."""
    for name, content in seeds.merged().items():
        (folder / name).write_bytes(content)
    shards = [name for name in seeds.merged() if name != "run.h5"]
    path = folder / rng.choice(["run.h5", "run.h5", *shards])
    kind = rng.choice(["change", "change", "change", "virtual", "pipe", "link", "gone", "other"])
    if kind in ("change", "virtual"):
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            if kind == "change":
                return f"merged, {path.name}, {_change(file, rng, folder / 'pipe')}"
            spot = Spot(file, rng.choice(_paths(file, h5py.Dataset)), rng, folder / "pipe")
            try:
                datasets.CHANGES["virtual"](spot)
            except _REFUSED:
                return "merged, unchanged"
            return f"merged, {path.name}, {spot.path}: virtual"
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
        _known[name] = np.flatnonzero(np.frombuffer(seeds.content(name), np.uint8)).tolist()
    return _known[name]


def _structures(name: str) -> list[tuple[int, int]]:
    if name not in _believable:
        _believable[name] = list(structures(seeds.content(name)))
    return _believable[name]


#: Kinds of cases, and their number among twenty-one cases.
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
    """Make a case in an empty folder, and return its description."""
    os.mkfifo(folder / "pipe")
    rng = random.Random(f"{seed} {number}")
    return _BY_TURN[number % len(_BY_TURN)](rng, folder)
