"""Look up groups and datasets of an untrusted file without leaving the file.

h5py follows a link out of the file, or into a pipe, just to see whether an object exists. It also
opens the source files of a virtual dataset to find its shape. The functions here first make sure
that an object is in the file itself.
"""

from __future__ import annotations

import math
from typing import Any

import h5py
from h5py import h5d, h5g, h5l, h5o, h5t

from grutrace.storage.hdf5.errors import FormatError, require
from grutrace.storage.hdf5.filters import PLUGINS

#: The allowed filters. HDF5 would search the plugin folders of the environment for any other filter
#: and run it. Filters up to fletcher32 are built into HDF5, lzf comes with h5py, and the others
#: come with hdf5plugin.
FILTERS = {
    1: "gzip",
    2: "shuffle",
    3: "fletcher32",
    32000: "lzf",
    **PLUGINS,
}

#: The largest chunk that is read, in bytes: HDF5 reads a compressed chunk into memory as a whole.
#: grutrace writes chunks of up to 1 MiB; programs that copy files may write larger ones.
MAX_CHUNK_BYTES = 64 * 1024 * 1024

_KINDS = {h5g.GroupID: h5py.Group, h5d.DatasetID: h5py.Dataset, h5t.TypeID: h5py.Datatype}

_KIND_NAMES = {h5py.Group: "a group", h5py.Dataset: "a dataset"}

_LINK_NAMES = {
    h5l.TYPE_HARD: "HardLink",
    h5l.TYPE_SOFT: "SoftLink",
    h5l.TYPE_EXTERNAL: "ExternalLink",
}


def has_member(group: h5py.Group, name: str) -> bool:
    """Return whether a group has a link of this name, of any kind."""
    return _is_single_name(name) and bool(group.id.links.exists(_encode(name)))


def get_member(group: h5py.Group, name: str, kind: type) -> Any:
    """Return the group or dataset of this name. Never follow a link.

    Before `require_local_data`, read nothing of a dataset but its type.

    Args:
        group: The parent group.
        name: Name of the member, without slashes.
        kind: `h5py.Group` or `h5py.Dataset`.

    Raises:
        FormatError: The member is missing, has another kind, or is a soft or external link.
    """
    member = _open_member(group, name, _KIND_NAMES[kind])
    if not isinstance(member, kind):
        raise FormatError(
            _member_path(group, name), _KIND_NAMES[kind], type(member).__name__.lower()
        )
    return member


def get_dataset(file: h5py.File, path: str) -> h5py.Dataset:
    """Return the dataset at a path inside the file. Its data are in the file itself.

    Raises:
        FormatError: The dataset is missing, or its data are in another file.
    """
    *groups, name = path.split("/")
    group = file
    for group_name in groups:
        group = get_member(group, group_name, h5py.Group)
    dataset = get_member(group, name, h5py.Dataset)
    require_local_data(dataset, path)
    return dataset


def is_dataset(group: h5py.Group, name: str) -> bool:
    """Return whether a member is a dataset. False for a soft or external link.

    Raises:
        FormatError: The group has no such member.
    """
    if not _is_single_name(name) or _link(group, name) != h5l.TYPE_HARD:
        return False
    return isinstance(_open_member(group, name, "something"), h5py.Dataset)


def require_local_data(dataset: h5py.Dataset, path: str) -> bool:
    """Refuse a dataset whose data are in another file or use an unknown filter.

    Returns:
        Whether the dataset has filters.

    Raises:
        FormatError: The data are virtual, external, in too large chunks, or behind another filter.
    """
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    require(layout != h5d.VIRTUAL, path, "its own data", "a virtual dataset")
    require(not properties.get_external_count(), path, "its own data", "data in another file")
    filters = properties.get_nfilters()
    for number in range(filters):
        code = properties.get_filter(number)[0]
        require(code in FILTERS, path, f"one of the filters {', '.join(FILTERS.values())}", code)
    if layout == h5d.CHUNKED:
        size = math.prod(properties.get_chunk()) * dataset.id.get_type().get_size()
        require(size <= MAX_CHUNK_BYTES, path, f"chunks of {MAX_CHUNK_BYTES} bytes at most", size)
    return bool(filters)


def _open_member(group: h5py.Group, name: str, expected: str) -> Any:
    # A thousand sites have a dozen datasets each, so messages are built only for errors.
    if not _is_single_name(name):
        # A name with a slash is a path, which may pass through a link.
        raise FormatError(_member_path(group, name), "a name without slashes", "a path")
    if not group.id.links.exists(_encode(name)):
        raise FormatError(_member_path(group, name), expected, "nothing")
    link = _link(group, name)
    if link != h5l.TYPE_HARD:
        raise FormatError(
            _member_path(group, name),
            "no soft or external link",
            _LINK_NAMES.get(link, "another link"),
        )
    member = h5o.open(group.id, _encode(name))
    wrapper = _KINDS.get(type(member))
    return wrapper(member) if wrapper else member


def _member_path(group: h5py.Group, name: str) -> str:
    return f"{group.name.rstrip('/')}/{name}"


def _link(group: h5py.Group, name: str) -> int:
    return int(group.id.links.get_info(_encode(name)).type)


def _is_single_name(name: str) -> bool:
    return name not in ("", ".") and "/" not in name


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
