"""Read handles that a writer of the same process can close.

HDF5 opens a file once per process, for all its handles. While a read handle is open, closing the
writer leaves the file open and flagged as being written, and other programs refuse to open it.
So a read handle is acquired for one read at a time. Between two reads it can be closed; the next
read opens it again.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d

from grutrace.errors import StateError, TraceFileError
from grutrace.records import Array
from grutrace.storage.hdf5.errors import H5PY_ERRORS, FormatError, require
from grutrace.storage.hdf5.quarantine import file_identity, is_quarantined, quarantine
from grutrace.storage.hdf5.safe_access import get_member, require_local_data
from grutrace.storage.hdf5.safe_open import CHUNK_CACHE, has_writer_flag, open_for_reading
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired

#: The highest compression ratio of a dataset: chunks of zeros that take only an index entry.
MAX_COMPRESSION_RATIO = 1 << 14

#: One lock for all handles. HDF5 runs one call at a time anyway.
_lock = threading.RLock()

_handles: weakref.WeakSet[SharedReadHandle] = weakref.WeakSet()

#: By thread: the handles to release at the end of `release_on_exit`.
_tracked = threading.local()


if hasattr(os, "register_at_fork"):  # Not available on Windows.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


@dataclass
class _OpenDataset:
    """An open dataset and its checked properties.

    Attributes:
        dataset: The dataset.
        item_bytes: Uncompressed bytes of one item.
        compressed: Whether the dataset has filters.
        count: Number of items that are known to be readable.
    """

    dataset: h5py.Dataset
    item_bytes: int
    compressed: bool
    count: int = -1


class SharedReadHandle:
    """An HDF5 file that is open for reading and may still grow.

    Args:
        path: Path of a file that is complete, being written, or left behind by a dead writer.
        name: Name of the file in messages; its path by default.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = path
        self._name = str(path) if name is None else name
        self._file: h5py.File | None = None
        self._identity: tuple[int, int] | None = None
        self._created: float | None = None
        self._closed = False
        self._datasets: dict[str, _OpenDataset] = {}
        self._groups: dict[str, h5py.Group] = {}
        with self.acquire():
            _handles.add(self)

    @contextmanager
    def acquire(self) -> Iterator[h5py.File]:
        """Return a context with the open file. No other thread closes it before the end."""
        with _lock:
            if self._closed:
                raise StateError(f"the trace {self._name} is closed: open it again")
            if self._file is None:
                self._open()
            for tracked in getattr(_tracked, "handles", ()):
                tracked.add(self)
            yield self._file

    def dataset(self, path: str, count: int) -> h5py.Dataset:
        """Return a dataset whose first `count` items can be read. Call while the file is acquired.

        Raises:
            FormatError: The dataset has fewer items, or the file is too small to hold them.
        """
        entry = self._datasets.get(path)
        if entry is None:
            entry = self._datasets[path] = self._open_dataset(path)
            if entry.dataset.shape and len(entry.dataset) < count:
                # HDF5 cached the length when the group was listed, before the counts were read.
                _refresh(entry.dataset)
        elif count > entry.count:
            # Needed even if the dataset is long enough: HDF5 may have cached a chunk from before
            # these items were written.
            _refresh(entry.dataset)
        if count > entry.count:
            self._require_data(entry, path, count)
            entry.count = count
        return entry.dataset

    def dataset_id(self, path: str) -> h5d.DatasetID:
        """Return the id of a dataset that may be virtual. Call while the file is acquired.

        Raises:
            FormatError: The object is missing, is not a dataset, or is a link.
        """
        parent, _, name = path.rpartition("/")
        return get_member(self._open_group(parent), name, h5py.Dataset).id

    def scalar(self, path: str, dtype: np.dtype[Any]) -> Array:
        """Read the current value of a scalar dataset. Call while the file is acquired.

        Raises:
            FormatError: The dataset is not a scalar of this type.
        """
        entry = self._datasets.get(path)
        if entry is None:
            entry = self._datasets[path] = self._open_dataset(path)
            actual_dtype, shape = entry.dataset.dtype, entry.dataset.shape
            matches = (actual_dtype, shape) == (dtype, ())
            require(matches, path, dtype, f"{actual_dtype} of shape {shape}")
        else:
            _refresh(entry.dataset)
        return np.asarray(entry.dataset[()])

    def _open_dataset(self, path: str) -> _OpenDataset:
        parent, _, name = path.rpartition("/")
        dataset = get_member(self._open_group(parent), name, h5py.Dataset)
        compressed = require_local_data(dataset, path)
        return _OpenDataset(
            dataset, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize, compressed
        )

    def _open_group(self, path: str) -> h5py.Group:
        """Return a group. Cached, because each group of a thousand sites is needed ten times."""
        if path not in self._groups:
            parent, _, name = path.rpartition("/")
            self._groups[path] = get_member(self._open_group(parent), name, h5py.Group)
        return self._groups[path]

    @property
    def size(self) -> int:
        """Size of the file in bytes. Call while the file is acquired."""
        assert self._file is not None
        if is_quarantined(self._identity):
            # Such a file is read through a Python file object.
            return self._path.stat().st_size
        return os.fstat(self._file.id.get_vfd_handle()).st_size

    def _require_data(self, entry: _OpenDataset, path: str, count: int) -> None:
        """Refuse a dataset that claims more items than the file can hold."""
        shape = entry.dataset.shape
        require(shape, path, "an array", "a scalar or nothing")
        if shape[0] < count:
            raise FormatError(path, f"at least {count} items", shape[0])
        size, available = count * entry.item_bytes, self.size
        if size > available * (MAX_COMPRESSION_RATIO if entry.compressed else 1):
            raise FormatError(path, f"{size} bytes of items", f"a file of {available}")

    def release(self) -> None:
        """Close the file until the next read."""
        with _lock:
            self._datasets.clear()
            self._groups.clear()
            file, self._file = self._file, None
            if file is not None:
                try:
                    file.close()
                except (OSError, RuntimeError):
                    # The unwritten data belong to a writer of this process, which gets the error.
                    assert self._identity is not None
                    quarantine(file, self._identity)

    def reopen_if_replaced(self) -> None:
        """Open the path again if a writer has replaced the file by a copy of the same trace.

        If the path now holds a different trace or no file, keep reading the open file.
        """
        with _lock:
            if self._file is None:
                return
            with contextlib.suppress(OSError, FormatError, *H5PY_ERRORS):
                status = self._path.stat()
                unchanged = self.is_same_file((status.st_dev, status.st_ino))
                if unchanged or is_quarantined(self._identity):
                    return
                with open_for_reading(self._path) as file:
                    is_copy = self._created is not None and _read_created(file) == self._created
                if is_copy:
                    self.release()

    def close(self) -> None:
        """Close the file permanently."""
        with _lock:
            self.release()
            self._closed = True

    def yield_to(self, path: Path, *, flagged: bool) -> None:
        """Close the file if another handle is about to open it and either handle follows a writer.

        HDF5 opens the file once for both handles. If another process writes to it, each handle
        would see the cache of the other. In HDF5 2.0, if one handle refreshes a dataset that both
        have open, both read wrong values afterwards.

        Args:
            path: The path that is about to be opened.
            flagged: Whether the file at the path has the flag of a writer.
        """
        if self._file is None or _is_writable(self._file):
            return
        if not flagged and not _is_swmr_reader(self._file):
            return
        status = path.stat()
        if self.is_same_file((status.st_dev, status.st_ino)):
            self.release()

    def is_same_file(self, identity: tuple[int, int]) -> bool:
        """Return whether the file has this device and inode."""
        return self._identity == identity

    def _open_file(self) -> tuple[h5py.File, tuple[int, int] | None]:
        """Open the file. Return it with its device and inode, if it has them."""
        flagged = has_writer_flag(self._path)
        for handle in list(_handles):
            handle.yield_to(self._path, flagged=flagged)
        status = self._path.stat()
        identity = status.st_dev, status.st_ino
        if is_quarantined(identity):
            file = open_repaired(RepairedFile(self._path), CHUNK_CACHE)
        else:
            file = open_for_reading(self._path)
            identity = file_identity(file)
        return file, identity

    def _open(self) -> None:
        file, identity = self._open_file()
        created = _read_created(file)
        # A writer replaces a small file by a copy with another inode, and the inode of a deleted
        # file may be used again. So compare the time when the trace began.
        if self._identity is not None and (
            created != self._created or (created is None and identity != self._identity)
        ):
            file.close()
            raise TraceFileError(f"{self._name} was replaced by another file; open the path again")
        self._file, self._identity, self._created = file, identity, created
        self._groups[""] = file


@contextmanager
def release_on_exit() -> Iterator[None]:
    """Close at the end all files that this thread reads inside. The next read opens them again.

    For long-running processes: HDF5 locks an open file, so no other process could append to it.
    """
    tracked: set[SharedReadHandle] = set()
    previous = getattr(_tracked, "handles", ())
    _tracked.handles = (*previous, tracked)
    try:
        yield
    finally:
        _tracked.handles = previous
        for handle in tracked:
            handle.release()


@contextmanager
def lock_readers() -> Iterator[None]:
    """Block all reads of this process until the end of the context."""
    with _lock:
        yield


@contextmanager
def close_readers(identity: tuple[int, int]) -> Iterator[None]:
    """Close all read handles of a file in this process, and block new ones inside the context."""
    with _lock:
        for handle in list(_handles):
            if handle.is_same_file(identity):
                handle.release()
        yield


def _read_created(file: h5py.File) -> float | None:
    """Return when the trace began; None if the attribute is missing or damaged."""
    name = "created"
    if name not in file.attrs:
        return None
    attribute = file.attrs.get_id(name)
    is_float = attribute.shape == () and attribute.dtype == np.float64
    return float(file.attrs[name]) if is_float else None


def _is_writable(file: h5py.File) -> bool:
    """Return whether this process writes the file, and so sees its own writes at once."""
    return bool(file.id.get_intent() & h5py.h5f.ACC_RDWR)


def _is_swmr_reader(file: h5py.File) -> bool:
    """Return whether the file is open for SWMR reading: another process may write it."""
    return not _is_writable(file) and bool(file.id.get_intent() & h5py.h5f.ACC_SWMR_READ)


def _refresh(dataset: h5py.Dataset) -> None:
    """Update the cached state of a dataset that another process may have extended."""
    if _is_swmr_reader(dataset.file):
        dataset.refresh()
