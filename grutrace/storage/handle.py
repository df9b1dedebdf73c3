"""Reading handles that give way to a writer of the same process.

HDF5 opens a file once per process, however many handles there are: while any reading handle is
open, a writer's own close leaves the file open and marked as being written, which other programs
then refuse. So every reading handle here is lent out for one read at a time, can be taken away
between two of them, and opens again by itself.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import StateError, TraceFileError
from grutrace.record import Array
from grutrace.storage.faults import require
from grutrace.storage.header import member
from grutrace.storage.schema import LIBVER
from grutrace.storage.unmarked import SIGNATURE, Unmarked, open_unmarked

#: Memory in which HDF5 keeps the chunks of one dataset that were read last: four of rows. Bytes.
CHUNK_CACHE = 1024 * 1024

#: The two flags in the superblock of a file of which a writer sets one.
_WRITING = 0b101

#: One lock for all handles: HDF5 itself does one thing at a time, so nothing is lost.
_lock = threading.RLock()

_handles: weakref.WeakSet[ReadHandle] = weakref.WeakSet()

#: Files that HDF5 has failed to close. If it opened one by its path, it would read from what it
#: still holds of it; if one were forgotten, Python would have it closed again.
_kept_open: dict[tuple[int, int], list[h5py.File]] = {}

os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


class ReadHandle:
    """An HDF5 file open for reading while it may grow.

    Args:
        path: Of a file that is complete, is being written, or whose writer died.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None
        self._identity: tuple[int, int] | None = None
        self._grows = False
        self._closed = False
        self._datasets: dict[str, tuple[h5py.Dataset, int]] = {}
        with self.lent():
            _handles.add(self)

    @contextmanager
    def lent(self) -> Iterator[h5py.File]:
        """The open file, which nobody closes meanwhile."""
        with _lock:
            if self._closed:
                raise StateError(f"the trace {self._path} is closed")
            if self._file is None:
                self._open()
            yield self._file

    def dataset(self, place: str, count: int) -> h5py.Dataset:
        """A dataset of which the first `count` items can be read. Ask while the file is lent.

        Raises:
            Fault: It has fewer items, or the file is too small to hold them.
        """
        dataset, seen = self._datasets.get(place, (None, 0))
        if dataset is None:
            dataset = walk(self._file, place)
        elif count > seen:
            # Also where it is long enough already: HDF5 may have cached a chunk of it from before
            # these items were written.
            self._refresh(dataset)
        shape = dataset.shape
        require(shape, place, "an array", "a scalar or nothing")
        require(shape[0] >= count, place, f"at least {count} items", shape[0])
        if count > seen and not dataset.id.get_create_plist().get_nfilters():
            size = count * math.prod(shape[1:]) * dataset.dtype.itemsize
            held = self._path.stat().st_size
            require(size <= held, place, f"{size} bytes of items", f"a file of {held}")
        self._datasets[place] = (dataset, max(count, seen))
        return dataset

    def scalar(self, place: str, dtype: np.dtype[Any]) -> Array:
        """The present value of a scalar dataset. Ask while the file is lent.

        Raises:
            Fault: It is no scalar, or of another type.
        """
        dataset, _ = self._datasets.get(place, (None, 0))
        if dataset is None:
            dataset = walk(self._file, place)
            self._datasets[place] = (dataset, 0)
            found = f"{dataset.dtype} of shape {dataset.shape}"
            require((dataset.dtype, dataset.shape) == (dtype, ()), place, dtype, found)
        else:
            self._refresh(dataset)
        return np.asarray(dataset[()])

    def _refresh(self, dataset: h5py.Dataset) -> None:
        # Of a file that is whole nothing is asked: see `_open`.
        if self._grows:
            dataset.refresh()

    def release(self) -> None:
        """Close the file until the next read."""
        with _lock:
            self._datasets.clear()
            file, self._file = self._file, None
            if file is not None:
                try:
                    file.close()
                except (OSError, RuntimeError):
                    # What could not be written is a writer's of this process, which is told so.
                    assert self._identity is not None
                    keep_off(file, self._identity)

    def close(self) -> None:
        """Close the file for good."""
        with _lock:
            self.release()
            self._closed = True

    def is_of(self, identity: tuple[int, int]) -> bool:
        """Whether the file is the one of this device and inode."""
        return self._identity == identity

    def _open(self) -> None:
        status = self._path.stat()
        identity = status.st_dev, status.st_ino
        # Only one handle has a file open. Of a dataset that is open twice in this process and that
        # is looked at anew, HDF5 2.0 reads every chunk as if it were the first.
        for other in list(_handles):
            if other is not self and other.is_of(identity):
                other.release()
        if identity in _kept_open:
            file = open_unmarked(Unmarked(self._path), CHUNK_CACHE)
        else:
            file = _open_for_reading(self._path)
            identity = file_identity(file)
        if self._identity not in (None, identity):
            file.close()
            raise TraceFileError(f"{self._path} is another file by now; open it anew")
        self._file, self._identity = file, identity
        self._grows = bool(file.swmr_mode)


def file_identity(file: h5py.File) -> tuple[int, int]:
    """Device and inode of an open file, which stay when its path changes."""
    status = os.fstat(file.id.get_vfd_handle())
    return status.st_dev, status.st_ino


@contextmanager
def no_reading() -> Iterator[None]:
    """Let none of this process's handles be read from meanwhile."""
    with _lock:
        yield


@contextmanager
def readers_out(identity: tuple[int, int]) -> Iterator[None]:
    """Close this process's reading handles of a file, and let none open meanwhile."""
    with _lock:
        for handle in list(_handles):
            if handle.is_of(identity):
                handle.release()
        yield


def keep_off(file: h5py.File, identity: tuple[int, int]) -> None:
    """Never touch this file again, nor have HDF5 open it by its path: it has failed to close it."""
    _kept_open[identity] = [*_kept_open.get(identity, ()), file]


def _open_for_reading(path: Path) -> h5py.File:
    """Open for SWMR only what a writer has marked.

    In a damaged file SWMR reading waits, for years, that a writer put the damage right.
    """
    options = {"libver": LIBVER, "locking": "best-effort", "rdcc_nbytes": CHUNK_CACHE}
    return h5py.File(path, "r", swmr=_is_marked(path), **options)


def _is_marked(path: Path) -> bool:
    """Whether a writer has the file open, or died; from HDF5's superblock, version 2 or 3."""
    with path.open("rb") as file:
        head = file.read(12)
    is_recent = len(head) == 12 and head.startswith(SIGNATURE) and head[8] >= 2
    return is_recent and bool(head[11] & _WRITING)


def walk(file: h5py.File, place: str) -> h5py.Dataset:
    """The dataset in this place, never followed out of the file.

    Raises:
        Fault: It is missing, or has its data elsewhere.
    """
    *groups, name = place.split("/")
    group = file
    for part in groups:
        group = member(group, part, h5py.Group)
    dataset = member(group, name, h5py.Dataset)
    require(not dataset.is_virtual, place, "its own data", "a virtual dataset")
    require(dataset.external is None, place, "its own data", "data in another file")
    return dataset
