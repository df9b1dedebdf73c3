"""Rewrite a small trace with smaller chunks when it is closed, and with large ones to append.

HDF5 allocates whole chunks, and the chunks of a trace are made for long runs: one call of a small
layer would take 1.3 MB. So a small file is rewritten with fitting chunks when it is closed, and
with the usual chunks before it is appended to. Each time a new file replaces the old one; a reader
that has the old file open keeps reading it.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from grutrace.records import TraceHeader
from grutrace.storage.format.dimension_scales import extend_scales
from grutrace.storage.format.schema import DatasetSpec, dataset_specs
from grutrace.storage.hdf5.atomic_write import fsync_file, temporary_path, unlink_on_error
from grutrace.storage.hdf5.errors import H5PY_ERRORS, translate_write_errors
from grutrace.storage.hdf5.handle import lock_readers
from grutrace.storage.hdf5.quarantine import file_identity
from grutrace.storage.hdf5.safe_open import open_for_reading
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.create import Items, open_to_write, trace_image
from grutrace.storage.write.overwrite import file_signature

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


def publish_compact_copy(
    file: h5py.File,
    path: Path,
    header: TraceHeader,
    items: Items,
    committed: Any,
    *,
    appended: bool,
    fsync: bool,
) -> bool:
    """Replace a small file by a closed copy with fitting chunks.

    Call this while the file has its writer flag, so that no other process replaces it.

    Args:
        file: The open file.
        path: Path of the file.
        header: Header of the trace.
        items: Number of items of each dataset, by path.
        committed: The committed counts of the copy.
        appended: Whether the file existed before. Then another program may have added content.
        fsync: Whether to wait until the disk has stored the copy.

    Returns:
        False if the copy failed or would lose content. Then the file stays as it is.
    """
    with contextlib.suppress(*H5PY_ERRORS):
        image = _copy_image(file, header, items, committed, compact=True)
        if appended and _has_extra_content(file, image):
            return False
        temporary = temporary_path(path, "overwrite")
        with unlink_on_error(temporary):
            with temporary.open("xb") as stream:
                stream.write(image)
                if fsync:
                    stream.flush()
                    fsync_file(stream.fileno())
            if not _copy_permissions(path, temporary):
                raise OSError(f"{temporary} cannot replace {path} with the same owner")
            temporary.replace(path)
        return True
    return False


class ExpandedCopy(NamedTuple):
    """A copy of a compact file with chunks of the usual size, open for writing.

    Attributes:
        file: The copy.
        temporary: Path of the copy.
        identity: Device and inode of the original.
        signature: `file_signature` of the original.
    """

    file: h5py.File
    temporary: Path
    identity: tuple[int, int]
    signature: tuple[int, int, int, int] | None


def open_expanded_copy(path: Path, header: TraceHeader, items: Items) -> ExpandedCopy | None:
    """Copy a compact file, with chunks of the usual size, and open the copy for writing.

    Args:
        path: Path of the file.
        header: Header of the trace.
        items: Number of committed items of each dataset, by path.

    Returns:
        None if the file has the usual chunks, or a copy cannot replace it.

    Raises:
        TraceFileError: The file cannot be read.
    """
    signature = file_signature(path)
    if _is_open_for_writing(path):
        # HDF5 raises its own error when the file is opened.
        return None
    with (
        translate_write_errors(path, "appended to"),
        lock_readers(),
        open_for_reading(path) as file,
    ):
        if not _has_small_chunks(file, header, items):
            return None
        identity, committed = file_identity(file), file["committed"][()]
        image = _copy_image(file, header, items, committed, compact=False)
        if _has_extra_content(file, image):
            return None
    temporary = temporary_path(path, "overwrite")
    try:
        with unlink_on_error(temporary):
            temporary.write_bytes(image)
            if not _copy_permissions(path, temporary):
                temporary.unlink()
                return None
            return ExpandedCopy(open_to_write(temporary), temporary, identity, signature)
    except OSError:
        return None


def _has_small_chunks(file: h5py.File, header: TraceHeader, items: Items) -> bool:
    return _is_small(header, items) and any(
        file[path].chunks is not None and file[path].chunks[0] < spec.chunks[0]
        for path, spec in dataset_specs(header.modules).items()
    )


def _is_open_for_writing(path: Path) -> bool:
    """Return whether this process has a file open for writing, as with `h5py.File`."""
    signature = file_signature(path)
    for file in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        name = os.fsdecode(h5py.h5f.get_name(file))
        if file.get_intent() & h5py.h5f.ACC_RDWR and file_signature(Path(name)) == signature:
            return True
    return False


def _copy_image(
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


def _has_extra_content(file: h5py.File, image: bytes) -> bool:
    """Return whether a file has content that the copy lacks, as added by another program."""
    with h5py.File(io.BytesIO(image), "r") as copy:
        # A file of an older format version keeps its version.
        same_version = tuple(file.attrs[_VERSION]) == tuple(copy.attrs[_VERSION])
        return not same_version or any(_differences(file, copy))


def _copy_permissions(path: Path, copy: Path) -> bool:
    """Give a copy the permissions of its original.

    Returns:
        False if the copy cannot replace the original, because the original has several hard
        links, another owner, or extended attributes.

    Raises:
        OSError: The permissions cannot be set.
    """
    status, copy_status = path.stat(), copy.stat()
    if status.st_nlink > 1:
        return False
    if (status.st_uid, status.st_gid) != (copy_status.st_uid, copy_status.st_gid):
        return False
    if _has_extended_attributes(path):
        return False
    shutil.copymode(path, copy)
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
    unused = spec.chunks[0] - count if 0 < count < spec.chunks[0] else 0
    return unused * _item_bytes(spec)


def _differences(group: h5py.Group, copy: h5py.Group) -> Iterator[bool]:
    """Yield, for each object of a group, whether the copy lacks some of its content."""
    yield bool(set(group.attrs) - set(copy.attrs) - _SCALE_ATTRIBUTES)
    links: Mapping[str, Any] = group
    for name in links:
        if name not in copy or group.get(name, getlink=True).__class__ is not h5py.HardLink:
            yield True
            continue
        member, copied = group[name], copy[name]
        if type(member) is not type(copied):
            yield True
        elif isinstance(member, h5py.Group):
            yield from _differences(member, copied)
        else:
            yield bool(set(member.attrs) - set(copied.attrs) - _SCALE_ATTRIBUTES)
            yield _filters(member) != _filters(copied)


def _filters(dataset: h5py.Dataset) -> list[int]:
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
