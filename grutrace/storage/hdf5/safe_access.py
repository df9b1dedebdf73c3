"""What is in the groups of a file that nobody vouches for, found without leaving the file.

h5py's own ways to ask follow a link out of the file, or into a pipe, to see whether something is
there; and the shape of a virtual dataset is asked of the files that it is made of. Here nothing is
asked of an object before it is known to be in the file itself.
"""

from __future__ import annotations

import math
from typing import Any

import h5py
from h5py import h5d, h5g, h5l, h5o, h5t

from grutrace.storage.hdf5.errors import FormatError, require
from grutrace.storage.hdf5.filters import PLUGINS

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
MAX_CHUNK_BYTES = 64 * 1024 * 1024

_KINDS = {h5g.GroupID: h5py.Group, h5d.DatasetID: h5py.Dataset, h5t.TypeID: h5py.Datatype}

_KIND_NAMES = {h5py.Group: "a group", h5py.Dataset: "a dataset"}

_LINK_NAMES = {
    h5l.TYPE_HARD: "HardLink",
    h5l.TYPE_SOFT: "SoftLink",
    h5l.TYPE_EXTERNAL: "ExternalLink",
}


def has_member(group: h5py.Group, name: str) -> bool:
    """Whether a group has a link of this name, wherever it leads."""
    return _is_single_name(name) and bool(group.id.links.exists(_encode(name)))


def get_member(group: h5py.Group, name: str, kind: type) -> Any:
    """The group or dataset of this name, never followed out of the file.

    Of a dataset, ask for nothing but its type before `require_own_data`.

    Raises:
        FormatError: It is missing, is of the other kind, or is a link to somewhere else.
    """
    found = _open_member(group, name, _KIND_NAMES[kind])
    if not isinstance(found, kind):
        raise FormatError(
            _member_path(group, name), _KIND_NAMES[kind], type(found).__name__.lower()
        )
    return found


def get_dataset(file: h5py.File, place: str) -> h5py.Dataset:
    """The dataset in this place, whose data are in the file itself.

    Raises:
        FormatError: It is missing, or somewhere else.
    """
    *groups, name = place.split("/")
    group = file
    for part in groups:
        group = get_member(group, part, h5py.Group)
    dataset = get_member(group, name, h5py.Dataset)
    require_local_data(dataset, place)
    return dataset


def is_dataset(group: h5py.Group, name: str) -> bool:
    """Whether what has this name is a dataset. Of a link to elsewhere nobody asks.

    Raises:
        FormatError: There is no such name.
    """
    if not _is_single_name(name) or _link(group, name) != h5l.TYPE_HARD:
        return False
    return isinstance(_open_member(group, name, "something"), h5py.Dataset)


def require_local_data(dataset: h5py.Dataset, place: str) -> bool:
    """Refuse a dataset whose data are not in the file as they are, or packed as we know.

    Returns:
        Whether they are packed.

    Raises:
        FormatError: The message says how it is stored.
    """
    made = dataset.id.get_create_plist()
    layout = made.get_layout()
    require(layout != h5d.VIRTUAL, place, "its own data", "a virtual dataset")
    require(not made.get_external_count(), place, "its own data", "data in another file")
    filters = made.get_nfilters()
    for number in range(filters):
        code = made.get_filter(number)[0]
        require(code in FILTERS, place, f"no filter but {', '.join(FILTERS.values())}", code)
    if layout == h5d.CHUNKED:
        size = math.prod(made.get_chunk()) * dataset.id.get_type().get_size()
        require(size <= MAX_CHUNK_BYTES, place, f"chunks of {MAX_CHUNK_BYTES} bytes at most", size)
    return bool(filters)


def _open_member(group: h5py.Group, name: str, expected: str) -> Any:
    # Each of a thousand sites has a dozen datasets: what is said of one is worked out if it is.
    if not _is_single_name(name):
        # One with a slash would be a path, and may lead through a link.
        raise FormatError(_member_path(group, name), "a name", "a path")
    if not group.id.links.exists(_encode(name)):
        raise FormatError(_member_path(group, name), expected, "nothing")
    link = _link(group, name)
    if link != h5l.TYPE_HARD:
        raise FormatError(
            _member_path(group, name), "no link to elsewhere", _LINK_NAMES.get(link, "another link")
        )
    found = h5o.open(group.id, _encode(name))
    made = _KINDS.get(type(found))
    return made(found) if made else found


def _member_path(group: h5py.Group, name: str) -> str:
    return f"{group.name.rstrip('/')}/{name}"


def _link(group: h5py.Group, name: str) -> int:
    return int(group.id.links.get_info(_encode(name)).type)


def _is_single_name(name: str) -> bool:
    return name not in ("", ".") and "/" not in name


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
