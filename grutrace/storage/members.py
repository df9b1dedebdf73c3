"""What is in the groups of a file that nobody vouches for, found without leaving the file.

h5py's own ways to ask follow a link out of the file, or into a pipe, to see whether something is
there; and the shape of a virtual dataset is asked of the files that it is made of. Here nothing is
asked of an object before it is known to be in the file itself.
"""

from __future__ import annotations

import math
from typing import Any

import h5py
from h5py import h5d, h5l

from grutrace.storage.compression import PLUGINS
from grutrace.storage.faults import require

#: What may be between a dataset and its bytes. HDF5 would look for any other in the folders that
#: the environment names, and run it. Those up to fletcher32 are HDF5's own, lzf is h5py's, and the
#: last three are of the hdf5plugin package.
FILTERS = {
    1: "gzip",
    2: "shuffle",
    3: "fletcher32",
    32000: "lzf",
    **PLUGINS,
}

#: The largest chunk that is read: HDF5 brings all of a packed one into memory. Ours have 1 MiB at
#: most; other programs that copy files make larger ones. Bytes.
LARGEST_CHUNK = 64 * 1024 * 1024

_LINKS = {h5l.TYPE_HARD: "HardLink", h5l.TYPE_SOFT: "SoftLink", h5l.TYPE_EXTERNAL: "ExternalLink"}


def holds(group: h5py.Group, name: str) -> bool:
    """Whether a group has a link of this name, wherever it leads."""
    return _is_one_name(name) and bool(group.id.links.exists(_encoded(name)))


def member(group: h5py.Group, name: str, kind: type) -> Any:
    """The group or dataset of this name, never followed out of the file.

    Of a dataset, ask for nothing but its type before `require_own_data`.

    Raises:
        Fault: It is missing, is of the other kind, or is a link to somewhere else.
    """
    place = f"{group.name.rstrip('/')}/{name}"
    expected = f"a {kind.__name__.lower()}"
    found = _member(group, name, place, expected)
    require(isinstance(found, kind), place, expected, type(found).__name__.lower())
    return found


def is_dataset(group: h5py.Group, name: str) -> bool:
    """Whether what has this name is a dataset. Of a link to elsewhere nobody asks.

    Raises:
        Fault: There is no such name.
    """
    place = f"{group.name.rstrip('/')}/{name}"
    if not _is_one_name(name) or _link(group, name) != h5l.TYPE_HARD:
        return False
    return isinstance(_member(group, name, place, "something"), h5py.Dataset)


def require_own_data(dataset: h5py.Dataset, place: str) -> None:
    """Refuse a dataset whose data are not in the file as they are, or packed as we know.

    Raises:
        Fault: The message says how it is stored.
    """
    made = dataset.id.get_create_plist()
    layout = made.get_layout()
    require(layout != h5d.VIRTUAL, place, "its own data", "a virtual dataset")
    require(not made.get_external_count(), place, "its own data", "data in another file")
    for number in range(made.get_nfilters()):
        code = made.get_filter(number)[0]
        require(code in FILTERS, place, f"no filter but {', '.join(FILTERS.values())}", code)
    if layout == h5d.CHUNKED:
        size = math.prod(made.get_chunk()) * dataset.id.get_type().get_size()
        require(size <= LARGEST_CHUNK, place, f"chunks of {LARGEST_CHUNK} bytes at most", size)


def _member(group: h5py.Group, name: str, place: str, expected: str) -> Any:
    # A name with a slash would be a path, and may lead through a link.
    require(_is_one_name(name), place, "a name", "a path")
    require(group.id.links.exists(_encoded(name)), place, expected, "nothing")
    link = _link(group, name)
    require(link == h5l.TYPE_HARD, place, "no link to elsewhere", _LINKS.get(link, "another link"))
    return group[name]


def _link(group: h5py.Group, name: str) -> int:
    return int(group.id.links.get_info(_encoded(name)).type)


def _is_one_name(name: str) -> bool:
    return name not in ("", ".") and "/" not in name


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
