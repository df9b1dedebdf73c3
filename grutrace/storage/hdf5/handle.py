"""Reading handles that give way to a writer of the same process.

HDF5 opens a file once per process, however many handles there are: while any reading handle is
open, a writer's own close leaves the file open and marked as being written, which other programs
then refuse. So every reading handle here is lent out for one read at a time, can be taken away
between two of them, and opens again by itself.

Closing a file to which nothing more is to be written, whatever HDF5 still holds of it.

HDF5 cannot be told to drop what it holds of a file: it writes that when the file is closed, and
what it cannot write then it keeps, and the file open, for as long as the process lives.
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
from grutrace.storage.hdf5.safe_access import get_member, require_local_data
from grutrace.storage.hdf5.safe_open import CHUNK_CACHE, has_writer_flag, open_for_reading
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired

#: How many times smaller than its rows a packed dataset is at most: chunks of zeros, with an entry
#: each in the index.
MAX_COMPRESSION_RATIO = 1 << 14

#: One lock for all handles: HDF5 itself does one thing at a time, so nothing is lost.
_lock = threading.RLock()

_handles: weakref.WeakSet[SharedReadHandle] = weakref.WeakSet()

#: By thread, the handles that are noted because they are to be released.
_tracked = threading.local()

#: Files that HDF5 has failed to close. If it opened one by its path, it would read from what it
#: still holds of it; if one were forgotten, Python would have it closed again.
_quarantined: dict[tuple[int, int], list[h5py.File]] = {}

if hasattr(os, "register_at_fork"):  # There is none on Windows.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


@dataclass
class _OpenDataset:
    """An open dataset, and what was found of it.

    Attributes:
        dataset: It.
        item: Bytes of an item of it.
        packed: Whether its items are stored smaller than that.
        count: How many of them are known to be there.
    """

    dataset: h5py.Dataset
    item_bytes: int
    compressed: bool
    count: int = -1


class SharedReadHandle:
    """An HDF5 file open for reading while it may grow.

    Args:
        path: Of a file that is complete, is being written, or whose writer died.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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
        """The open file, which nobody closes meanwhile."""
        with _lock:
            if self._closed:
                raise StateError(f"the trace {self._path} is closed")
            if self._file is None:
                self._open()
            for tracked in getattr(_tracked, "handles", ()):
                tracked.add(self)
            yield self._file

    def dataset(self, place: str, count: int) -> h5py.Dataset:
        """A dataset of which the first `count` items can be read. Ask while the file is lent.

        Raises:
            FormatError: It has fewer items, or the file is too small to hold them.
        """
        known = self._datasets.get(place)
        if known is None:
            known = self._datasets[place] = self._find(place)
            if known.dataset.shape and len(known.dataset) < count:
                # What is in a group was asked before the counts were read, and HDF5 has kept how
                # long it was then.
                _refresh(known.dataset)
        elif count > known.count:
            # Also where it is long enough already: HDF5 may have cached a chunk of it from before
            # these items were written.
            _refresh(known.dataset)
        if count > known.count:
            self._require_data(known, place, count)
            known.count = count
        return known.dataset

    def dataset_id(self, place: str) -> h5d.DatasetID:
        """A dataset of which nothing was asked yet: it may be virtual. Ask while the file is lent.

        Raises:
            FormatError: It is missing, no dataset, or behind a link to elsewhere.
        """
        above, _, name = place.rpartition("/")
        return get_member(self._group(above), name, h5py.Dataset).id

    def scalar(self, place: str, dtype: np.dtype[Any]) -> Array:
        """The present value of a scalar dataset. Ask while the file is lent.

        Raises:
            FormatError: It is no scalar, or of another type.
        """
        known = self._datasets.get(place)
        if known is None:
            known = self._datasets[place] = self._find(place)
            found = known.dataset.dtype, known.dataset.shape
            require(found == (dtype, ()), place, dtype, f"{found[0]} of shape {found[1]}")
        else:
            _refresh(known.dataset)
        return np.asarray(known.dataset[()])

    def _find(self, place: str) -> _OpenDataset:
        above, _, name = place.rpartition("/")
        dataset = get_member(self._group(above), name, h5py.Dataset)
        compressed = require_local_data(dataset, place)
        return _OpenDataset(
            dataset, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize, compressed
        )

    def _group(self, place: str) -> h5py.Group:
        """A group, found once: those of a thousand sites are asked for ten times each."""
        if place not in self._groups:
            above, _, name = place.rpartition("/")
            self._groups[place] = get_member(self._group(above), name, h5py.Group)
        return self._groups[place]

    @property
    def size(self) -> int:
        """Bytes of the file. Ask while it is lent."""
        assert self._file is not None
        if self._identity in _quarantined:
            # It is read through a file of Python's.
            return self._path.stat().st_size
        return os.fstat(self._file.id.get_vfd_handle()).st_size

    def _require_data(self, known: _OpenDataset, place: str, count: int) -> None:
        """Refuse a dataset that is longer than its data, as a file that is no trace can be."""
        shape = known.dataset.shape
        require(shape, place, "an array", "a scalar or nothing")
        if shape[0] < count:
            raise FormatError(place, f"at least {count} items", shape[0])
        size, held = count * known.item_bytes, self.size
        if size > held * (MAX_COMPRESSION_RATIO if known.compressed else 1):
            raise FormatError(place, f"{size} bytes of items", f"a file of {held}")

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
                    # What could not be written is a writer's of this process, which is told so.
                    assert self._identity is not None
                    quarantine(file, self._identity)

    def reopen_if_replaced(self) -> None:
        """Open the file anew if a writer has put a copy of it in its place.

        If it is another one by now, or gone, the one that is open is read on.
        """
        with _lock:
            if self._file is None:
                return
            with contextlib.suppress(OSError, FormatError, *H5PY_ERRORS):
                status = self._path.stat()
                if (
                    self.is_same_file((status.st_dev, status.st_ino))
                    or self._identity in _quarantined
                ):
                    return
                with open_for_reading(self._path) as file:
                    same = self._created is not None and _read_created(file) == self._created
                if same:
                    self.release()

    def close(self) -> None:
        """Close the file for good."""
        with _lock:
            self.release()
            self._closed = True

    def yield_to(self, path: Path, *, flagged: bool) -> None:
        """Close the file if another handle is about to open it, and one of both follows a writer.

        HDF5 opens it once for both. Where a writer of another process adds to it, each would see
        what the other has cached; and (HDF5 2.0) if one refreshes a dataset that both have open,
        both read wrong values from then on.
        """
        if self._file is None or _is_writable(self._file):
            return
        if not flagged and not _is_swmr_reader(self._file):
            return
        status = path.stat()
        if self.is_same_file((status.st_dev, status.st_ino)):
            self.release()

    def is_same_file(self, identity: tuple[int, int]) -> bool:
        """Whether the file is the one of this device and inode."""
        return self._identity == identity

    def _open(self) -> None:
        flagged = has_writer_flag(self._path)
        for handle in list(_handles):
            handle.yield_to(self._path, flagged=flagged)
        status = self._path.stat()
        identity = status.st_dev, status.st_ino
        if identity in _quarantined:
            file = open_repaired(RepairedFile(self._path), CHUNK_CACHE)
        else:
            file = open_for_reading(self._path)
            identity = file_identity(file)
        created = _read_created(file)
        # A writer puts a copy in the place of a small file; and the number of a file that is gone
        # may be that of the next.
        if self._identity is not None and (
            created != self._created or (created is None and identity != self._identity)
        ):
            file.close()
            raise TraceFileError(f"{self._path} is another file by now; open it anew")
        self._file, self._identity, self._created = file, identity, created
        self._groups[""] = file


def file_identity(file: h5py.File) -> tuple[int, int]:
    """Device and inode of an open file, which stay when its path changes."""
    status = os.fstat(file.id.get_vfd_handle())
    return status.st_dev, status.st_ino


@contextmanager
def release_on_exit() -> Iterator[None]:
    """Close, in the end, the files that this thread reads from inside, until they are read again.

    For a process that goes on for long: HDF5 locks an open file, and no run can append to it.
    """
    tracked: set[SharedReadHandle] = set()
    outer = getattr(_tracked, "handles", ())
    _tracked.handles = (*outer, tracked)
    try:
        yield
    finally:
        _tracked.handles = outer
        for handle in tracked:
            handle.release()


@contextmanager
def lock_readers() -> Iterator[None]:
    """Let none of this process's handles be read from meanwhile."""
    with _lock:
        yield


@contextmanager
def close_readers(identity: tuple[int, int]) -> Iterator[None]:
    """Close this process's reading handles of a file, and let none open meanwhile."""
    with _lock:
        for handle in list(_handles):
            if handle.is_same_file(identity):
                handle.release()
        yield


def quarantine(file: h5py.File, identity: tuple[int, int]) -> None:
    """Never touch this file again, nor have HDF5 open it by its path: it has failed to close it."""
    _quarantined[identity] = [*_quarantined.get(identity, ()), file]


def _read_created(file: h5py.File) -> float | None:
    """When the trace began; None if that is not where it should be, which others will say."""
    name = "created"
    if name not in file.attrs:
        return None
    attribute = file.attrs.get_id(name)
    plain = attribute.shape == () and attribute.dtype == np.float64
    return float(file.attrs[name]) if plain else None


def _is_writable(file: h5py.File) -> bool:
    """Whether this process writes the file, and so sees in it whatever it has written."""
    return bool(file.id.get_intent() & h5py.h5f.ACC_RDWR)


def _is_swmr_reader(file: h5py.File) -> bool:
    """Whether another process may write the file."""
    return not _is_writable(file) and bool(file.id.get_intent() & h5py.h5f.ACC_SWMR_READ)


def _refresh(dataset: h5py.Dataset) -> None:
    """See what another process has written since."""
    if _is_swmr_reader(dataset.file):
        dataset.refresh()


def close_or_quarantine(file: h5py.File, identity: tuple[int, int]) -> None:
    """Close a file that leads nowhere.

    Args:
        file: The file.
        identity: Its device and inode.
    """
    try:
        file.close()
    except (OSError, RuntimeError):
        quarantine(file, identity)


def discard_writes(descriptor: int, identity: tuple[int, int]) -> None:
    """Let what HDF5 writes to a file from now on be forgotten.

    Args:
        descriptor: HDF5's own.
        identity: Device and inode of the file.
    """
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == identity:
            nowhere = _open_null()
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _open_null() -> int:
    """A descriptor to which a whole file can be written, and be forgotten."""
    if hasattr(os, "memfd_create"):
        # Unlike the null device, it can be truncated, which HDF5 does when it closes a file.
        return os.memfd_create("grutrace")
    return os.open(os.devnull, os.O_RDWR)
