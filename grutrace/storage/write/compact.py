"""A small trace with chunks of its own size, and with those of a long one to append to it.

HDF5 gives a dataset room by whole chunks, and those of a trace are for long runs: a call of a small
layer would take 1.3 MB. So a small file is written anew when it is closed, with chunks as large as
what they hold, and once more before it is appended to. Each time a new file takes the place of the
old one, which a reader that has it open reads on.
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

#: No trace with more data is written anew: what it could save is little beside that. Bytes.
MAX_DATA_BYTES = 16 * 1024 * 1024

#: Nor one with more sites, for each of which HDF5 takes 10 ms.
MAX_SITES = 100

#: What is saved at least, and as a share of the data. Bytes.
MIN_SAVING_BYTES, MIN_SAVING_SHARE = 16 * 1024, 1 / 4

_VERSION = "format_version"

#: The attributes by which HDF5 relates datasets and scales.
_SCALE_ATTRIBUTES = {"CLASS", "NAME", "DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST"}


def should_compact(header: TraceHeader, items: Items) -> bool:
    """Whether a file whose chunks are those of a long trace is worth being written anew.

    Args:
        header: Of the trace.
        items: By place, how many items each dataset holds.
    """
    columns = dataset_specs(header.modules)
    waste = sum(_wasted_bytes(column, items[place]) for place, column in columns.items())
    return _is_small(header, items) and waste > max(
        MIN_SAVING_BYTES, MIN_SAVING_SHARE * _data_bytes(header, items)
    )


def has_small_chunks(file: h5py.File, header: TraceHeader, items: Items) -> bool:
    """Whether this is a small file whose chunks are smaller than those of a long trace.

    Args:
        file: Holds the trace.
        header: Of it.
        items: By place, how many items of each dataset count.
    """
    return _is_small(header, items) and any(
        file[place].chunks is not None and file[place].chunks[0] < column.chunks[0]
        for place, column in dataset_specs(header.modules).items()
    )


def copy_image(
    file: h5py.File, header: TraceHeader, items: Items, committed: Any, *, fitted: bool
) -> bytes:
    """The bytes of a file with the same content.

    Args:
        file: Holds the trace.
        header: Of it.
        items: By place, how many items of each dataset count.
        committed: The counts of the new file.
        fitted: Whether its chunks are as large as what they hold, or as those of a long trace.
    """

    def fill(copy: h5py.File) -> None:
        for place, count in items.items():
            appender = DatasetAppender(copy[place], 0)
            if count:
                appender.append(np.asarray(file[place][:count]))
                appender.write()
        extend_scales(copy, header.modules, items)
        copy["committed"][()] = committed

    return trace_image(header, items if fitted else None, fill)


def has_extra_content(file: h5py.File, image: bytes) -> bool:
    """Whether something is in a file that a copy of it would lose: others may have put it there."""
    with h5py.File(io.BytesIO(image), "r") as copy:
        # A file of an older version of the format stays of that.
        same_version = tuple(file.attrs[_VERSION]) == tuple(copy.attrs[_VERSION])
        return not same_version or any(_differences(file, copy))


def copy_permissions(path: Path, new: Path) -> bool:
    """Give a new file the permissions of the one that it replaces; False if it cannot be as that.

    What has several hard links is one file under all its names, and a new one would not be.

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
    """Whether a file has attributes or access lists that a new one would not get by itself."""
    try:
        names = os.listxattr(path)
    except (OSError, AttributeError):
        return False
    return any(name.startswith(("user.", "system.posix_acl")) for name in names)


def _is_small(header: TraceHeader, items: Items) -> bool:
    sites = sum(len(module.sites) for module in header.modules)
    return sites <= MAX_SITES and _data_bytes(header, items) <= MAX_DATA_BYTES


def _data_bytes(header: TraceHeader, items: Items) -> int:
    """Bytes of all items."""
    columns = dataset_specs(header.modules)
    return sum(items[place] * _item_bytes(column) for place, column in columns.items())


def _item_bytes(column: DatasetSpec) -> int:
    return math.prod(column.item) * column.dtype.itemsize


def _wasted_bytes(column: DatasetSpec, count: int) -> int:
    """Bytes of a chunk that holds fewer items than it could, where it is the only one."""
    missing = column.chunks[0] - count if 0 < count < column.chunks[0] else 0
    return missing * _item_bytes(column)


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
    made = dataset.id.get_create_plist()
    return [made.get_filter(number)[0] for number in range(made.get_nfilters())]
