"""`SnapshotHandle`, a picklable handle of a snapshot, for other threads, processes and machines.

Tasks of dask must be small and picklable, and an open HDF5 file is neither. A handle is pickled as
the paths of the files, and a worker caches the tables of the last few traces. No file stays open
between two reads, because an array may live long and HDF5 does not append to a file that is open
for reading. Opening a file takes 0.7 ms; reading a chunk takes 3 ms or more.
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.handle import release_on_exit
from grutrace.storage.interfaces import Source
from grutrace.storage.read.snapshot import TraceSnapshot

#: Number of traces whose tables a worker caches.
CACHE_SIZE = 8

_lock = threading.Lock()


class SnapshotHandle:
    """A handle of a snapshot. It opens the files again wherever it is unpickled.

    It stays valid after its trace is closed. The handle of a trace in memory keeps the rows alive
    and cannot be pickled.

    Args:
        snapshot: The snapshot.
    """

    def __init__(self, snapshot: TraceSnapshot) -> None:
        self._created = snapshot.header.created
        self._snapshot_or_source: TraceSnapshot | _CachedSource
        try:
            self._address: bytes | None = pickle.dumps(snapshot.source)
        except TypeError:
            self._address, self._snapshot_or_source = None, snapshot
        else:
            self._snapshot_or_source = _get_source(self._address, self._created)

    @property
    def in_memory(self) -> bool:
        """Whether the trace is in memory, without a file."""
        return self._address is None

    @contextmanager
    def snapshot(self, module: int, calls: int) -> Iterator[TraceSnapshot]:
        """Yield a snapshot with at least this number of calls of a module.

        Raises:
            TraceFileError: The file does not exist any more, or was replaced.
        """
        if isinstance(self._snapshot_or_source, TraceSnapshot):
            yield self._snapshot_or_source
            return
        with release_on_exit():
            yield self._snapshot_or_source.snapshot(module, calls)

    def __getstate__(self) -> dict[str, Any]:
        if self._address is None:
            raise TypeError("a trace in memory cannot go to another process")
        return {"_address": self._address, "_created": self._created}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._snapshot_or_source = _get_source(state["_address"], state["_created"], keep=True)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return self._address, self._created


class _CachedSource:
    """A source that is opened on first use, with a snapshot that is refreshed on demand."""

    def __init__(self, address: bytes, created: float) -> None:
        self._address, self._created = address, created
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._snapshot: TraceSnapshot | None = None

    def snapshot(self, module: int, calls: int) -> TraceSnapshot:
        """Return a snapshot with at least this number of calls of a module."""
        with self._lock:
            if self._source is None:
                self._source = pickle.loads(self._address)
                weakref.finalize(self, self._source.close)
            if self._snapshot is None or not _covers(self._snapshot, module, calls):
                self._snapshot = TraceSnapshot(self._source, self._source.refresh())
            same = self._snapshot.header.created == self._created
            if not same or not _covers(self._snapshot, module, calls):
                raise TraceFileError(
                    f"{self._source.name} was replaced by another file; open the path again"
                )
            return self._snapshot


def _covers(snapshot: TraceSnapshot, module: int, calls: int) -> bool:
    return module < len(snapshot.tables.module_counts) and snapshot.extent(module).calls >= calls


_Key = tuple[bytes, float]

_cached: weakref.WeakValueDictionary[_Key, _CachedSource] = weakref.WeakValueDictionary()

#: The last sources that were unpickled. A dask task holds its source only while it reads a chunk.
_recent: OrderedDict[_Key, _CachedSource] = OrderedDict()


def _get_source(address: bytes, created: float, *, keep: bool = False) -> _CachedSource:
    """Return the shared source of this address. It is created if no one holds it."""
    key = address, created
    with _lock:
        source = _cached.get(key)
        if source is None:
            source = _cached[key] = _CachedSource(address, created)
        if keep:
            _recent[key] = source
            _recent.move_to_end(key)
            while len(_recent) > CACHE_SIZE:
                _recent.popitem(last=False)
        return source
