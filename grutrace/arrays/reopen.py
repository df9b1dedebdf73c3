"""A trace that can be looked at from anywhere: in another thread, process or machine, or later.

What goes to a worker of dask must be small and picklable, and an open HDF5 file is neither. So it
is how to open the files again, and a worker keeps what it has worked out of the last few traces. No
file stays open between two reads (opening it takes 0.7 ms, and a part 3 ms or more): an array can
live long, and HDF5 lets nobody append to a file that is open.
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

#: Traces of which a worker keeps the tables.
CACHE_SIZE = 8

_lock = threading.Lock()


class SnapshotHandle:
    """A trace as it was at one moment, wherever it is unpickled.

    It keeps working after the trace that it was taken from is closed; unless that was in memory:
    then the rows stay as long as this does, and it cannot be pickled.

    Args:
        moment: What there was.
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
        """Whether there is no file that it could be read from."""
        return self._address is None

    @contextmanager
    def snapshot(self, module: int, calls: int) -> Iterator[TraceSnapshot]:
        """One in which this module has had so many calls at least; there may be more by now.

        Raises:
            TraceFileError: The file is gone, or another one.
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
    """A source that is opened when it is first needed, and looked at again when it has grown."""

    def __init__(self, address: bytes, created: float) -> None:
        self._address, self._created = address, created
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._snapshot: TraceSnapshot | None = None

    def snapshot(self, module: int, calls: int) -> TraceSnapshot:
        """A look at the source in which a module has had at least so many calls."""
        with self._lock:
            if self._source is None:
                self._source = pickle.loads(self._address)
                weakref.finalize(self, self._source.close)
            if self._snapshot is None or not _covers(self._snapshot, module, calls):
                self._snapshot = TraceSnapshot(self._source, self._source.refresh())
            same = self._snapshot.header.created == self._created
            if not same or not _covers(self._snapshot, module, calls):
                raise TraceFileError(
                    f"{self._source.name} is another file by now; open it and ask it anew"
                )
            return self._snapshot


def _covers(snapshot: TraceSnapshot, module: int, calls: int) -> bool:
    return module < len(snapshot.tables.module_counts) and snapshot.extent(module).calls >= calls


_Key = tuple[bytes, float]

_cached: weakref.WeakValueDictionary[_Key, _CachedSource] = weakref.WeakValueDictionary()

#: Held here for a while: a task of dask comes, reads a part, and is forgotten.
_recent: OrderedDict[_Key, _CachedSource] = OrderedDict()


def _get_source(address: bytes, created: float, *, keep: bool = False) -> _CachedSource:
    """One for all who ask while anybody holds it."""
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
