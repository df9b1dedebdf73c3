"""Changes to a group and its attributes that HDF5 still accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from h5py import ExternalLink, SoftLink

from tools.hostile.spot import EDGES, FLOATS, Change, Spot

#: Texts that no trace has: JSON of every kind, other names, terminal control sequences.
TEXTS = (
    "",
    "1e999",
    "{}",
    "[]",
    "null",
    '{"a": 1e999, "a": NaN}',
    "[" * 50_000,
    '{"a":' * 9_000,
    "9" * 50_000,
    '{"run": {"id": 1, "part": -1}}',
    '{"run": {"id": "x", "part": 1}}',
    '{"every": [[[[[]]]]], "units": {"\\u0000": "\\ud800"}}',
    "grutrace",
    "grutrace statistics",
    "l0",
    "reset,update",
    "../../x",
    "a/b/../..",
    "[/red] [bold]",
    "\x1b[2J\x1b]0;owned\x07",
    "two\nlines\r\ttabs",
    "\u202eright to left",
    "ключ",
)

NAMES = ("..", " ", "é", "\x1b[2J", "a\nb", "%", "%2E", "x" * 5000)

#: Attributes that only some groups have.
OPTIONAL = ("units", "derived", "format_version", "options")

_WHOLE = EDGES[:-2]


def _attribute(make: Callable[[Spot], Any]) -> Change:
    """Set an attribute that the group has or could have."""

    def change(spot: Spot) -> None:
        names = sorted(spot.object.attrs)
        often = names if names and spot.rng.random() < 0.8 else OPTIONAL
        spot.object.attrs[spot.rng.choice(often)] = make(spot)

    return change


def _no_attribute(spot: Spot) -> None:
    del spot.object.attrs[spot.rng.choice(sorted(spot.object.attrs))]


def _no_utf_8(spot: Spot) -> None:
    name = spot.rng.choice(sorted(spot.object.attrs))
    spot.object.attrs.create(name, b"\xff\xfe\x80", dtype=h5py.string_dtype("utf-8"))


def _table(spot: Spot) -> h5py.Dataset:
    return spot.file["calls" if "calls" in spot.file else "modules"]


def _inside(target: Callable[[Spot], Any], *names: str) -> Change:
    """Add an object to the group."""

    def change(spot: Spot) -> None:
        spot.object[spot.rng.choice(names)] = target(spot)

    return change


def _dataset(spot: Spot) -> None:
    spot.remove()
    spot.file[spot.path] = [1, 2]


def _many_groups(spot: Spot) -> None:
    for number in range(300):
        spot.object.create_group(f"g{number}")


CHANGES: dict[str, Change] = {
    "no attribute": _no_attribute,
    "a number": _attribute(lambda spot: spot.rng.choice([*_WHOLE, -1, -(2**63)])),
    "a large number": _attribute(lambda spot: np.uint64(spot.rng.choice(EDGES[-2:]))),
    "a float": _attribute(lambda spot: spot.rng.choice(FLOATS)),
    "a truth": _attribute(lambda spot: spot.rng.random() < 0.5),
    "a text": _attribute(lambda spot: spot.rng.choice(TEXTS)),
    "bytes": _attribute(lambda spot: np.bytes_(bytes([spot.rng.randrange(1, 256)] * 9))),
    "no UTF-8": _no_utf_8,
    "raw bytes": _attribute(lambda _: np.void(b"\0" * 17)),
    "nothing": _attribute(lambda _: h5py.Empty("<f8")),
    "an array": _attribute(lambda spot: np.array([spot.rng.choice(_WHOLE)] * 2)),
    "many numbers": _attribute(lambda spot: np.arange(spot.rng.choice([3, 5000, 10**6]))),
    "texts": _attribute(lambda _: ["a", "b"]),
    "a reference": _attribute(lambda spot: spot.file.ref),
    "a region": _attribute(lambda spot: _table(spot).regionref[:1]),
    "a complex number": _attribute(lambda _: 1 + 2j),
    "two fields": _attribute(lambda _: np.zeros((), [("x", "<f8"), ("y", "<i4")])),
    "replaced by a dataset": _dataset,
    "replaced by an external link": lambda spot: spot.link(ExternalLink(str(spot.pipe), "/")),
    "replaced by a soft link": lambda spot: spot.link(SoftLink("/modules")),
    "has itself inside": _inside(lambda spot: spot.object, "l7", "cell"),
    "has the root inside": _inside(lambda spot: spot.file["/"], "l7", "cell"),
    "has an external link inside": _inside(
        lambda spot: ExternalLink(str(spot.pipe), "/"), "l7", "reset", "input", "zz"
    ),
    "has a soft link inside": _inside(
        lambda spot: SoftLink(spot.rng.choice(["/", ".", "l7", "/modules", "/x/../y"])), "l7"
    ),
    "has many groups inside": _many_groups,
    "has a strange name inside": _inside(lambda spot: spot.object, *NAMES),
}
