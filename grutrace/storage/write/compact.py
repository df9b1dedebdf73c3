"""Rewrite a small trace with smaller chunks when it is closed, and with large ones to append.

HDF5 allocates whole chunks, and the chunks of a trace are made for long runs: one call of a small
layer would take 1.3 MB. So a small file is rewritten with fitting chunks when it is closed, and
with the usual chunks before it is appended to. Each time a new file replaces the old one; a reader
that has the old file open keeps reading it.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.records import TraceHeader
from grutrace.storage.format.dimension_scales import extend_scales
from grutrace.storage.format.schema import DatasetSpec, dataset_specs
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.create import Items, trace_image

#: Bytes of data above which a trace is not rewritten, since it could save little in proportion.
MAX_DATA_BYTES = 16 * 1024 * 1024

#: Number of sites above which a trace is not rewritten: HDF5 takes 10 ms for each.
MAX_SITES = 100

#: The smallest saving for which a trace is rewritten: in bytes, and as a share of the data.
MIN_SAVING_BYTES, MIN_SAVING_SHARE = 16 * 1024, 1 / 4

_VERSION = "format_version"

#: The attributes in which HDF5 stores dimension scales.
_SCALE_ATTRIBUTES = {"CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST"}


def should_compact(header: TraceHeader, items: Items) -> bool:
    """Return whether rewriting a file with fitting chunks saves enough space.

    Args:
        header: Header of the trace.
        items: Number of items of each dataset, by path.
    """
    specs = dataset_specs(header.modules)
    waste = sum(_wasted_bytes(spec, items[path]) for path, spec in specs.items())
    return _is_small(header, items) and waste > max(
        MIN_SAVING_BYTES, MIN_SAVING_SHARE * _data_bytes(header, items)
    )


def has_small_chunks(file: h5py.File, header: TraceHeader, items: Items) -> bool:
    """Return whether this is a small file with chunks that are smaller than usual.

    Args:
        file: The file.
        header: Header of the trace.
        items: Number of committed items of each dataset, by path.
    """
    return _is_small(header, items) and any(
        file[path].chunks is not None and file[path].chunks[0] < spec.chunks[0]
        for path, spec in dataset_specs(header.modules).items()
    )


def copy_image(
    file: h5py.File, header: TraceHeader, items: Items, committed: Any, *, compact: bool
) -> bytes:
    """Return the bytes of a file with the same content.

    Args:
        file: The file to copy.
        header: Header of the trace.
        items: Number of committed items of each dataset, by path.
        committed: The committed counts of the copy.
        compact: Whether the chunks fit the data, or have the usual size.
    """

    def fill(copy: h5py.File) -> None:
        for path, count in items.items():
            appender = DatasetAppender(copy[path], 0)
            if count:
                appender.append(np.asarray(file[path][:count]))
                appender.write()
        extend_scales(copy, header.modules, items)
        copy["committed"][()] = committed

    return trace_image(header, items if compact else None, fill)


def has_extra_content(file: h5py.File, image: bytes) -> bool:
    """Return whether a file has content that the copy lacks, as added by another program."""
    with h5py.File(io.BytesIO(image), "r") as copy:
        # A file of an older format version keeps its version.
        same_version = tuple(file.attrs[_VERSION]) == tuple(copy.attrs[_VERSION])
        return not same_version or any(_differences(file, copy))


def copy_permissions(path: Path, new: Path) -> bool:
    """Copy the permissions of a file to the new file that is to replace it.

    Returns:
        False if the new file cannot replace it: the old file has several hard links, another
        owner, or extended attributes.

    Raises:
        OSError: The permissions cannot be set.
    """
    old, made = path.stat(), new.stat()
    if old.st_nlink > 1 or (old.st_uid, old.st_gid) != (made.st_uid, made.st_gid):
        return False
    if _has_extended_attributes(path):
        return False
    shutil.copymode(path, new)
    return True


def _has_extended_attributes(path: Path) -> bool:
    """Return whether a file has extended attributes or access lists, which a copy would lose."""
    try:
        names = os.listxattr(path)
    except (OSError, AttributeError):
        return False
    return any(name.startswith(("user.", "system.posix_acl")) for name in names)


def _is_small(header: TraceHeader, items: Items) -> bool:
    sites = sum(len(module.sites) for module in header.modules)
    return sites <= MAX_SITES and _data_bytes(header, items) <= MAX_DATA_BYTES


def _data_bytes(header: TraceHeader, items: Items) -> int:
    """Return the bytes of all items."""
    specs = dataset_specs(header.modules)
    return sum(items[path] * _item_bytes(spec) for path, spec in specs.items())


def _item_bytes(spec: DatasetSpec) -> int:
    return math.prod(spec.item_shape) * spec.dtype.itemsize


def _wasted_bytes(spec: DatasetSpec, count: int) -> int:
    """Return the unused bytes of the only chunk of a dataset."""
    missing = spec.chunks[0] - count if 0 < count < spec.chunks[0] else 0
    return missing * _item_bytes(spec)


def _differences(group: h5py.Group, copy: h5py.Group) -> Iterator[bool]:
    yield bool(set(group.attrs) - set(copy.attrs) - _SCALE_ATTRIBUTES)
    links: Mapping[str, Any] = group
    for name in links:
        if name not in copy or group.get(name, getlink=True).__class__ is not h5py.HardLink:
            yield True
            continue
        found, copied = group[name], copy[name]
        if type(found) is not type(copied):
            yield True
        elif isinstance(found, h5py.Group):
            yield from _differences(found, copied)
        else:
            yield bool(set(found.attrs) - set(copied.attrs) - _SCALE_ATTRIBUTES)
            yield _filters(found) != _filters(copied)


def _filters(dataset: h5py.Dataset) -> list[int]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
