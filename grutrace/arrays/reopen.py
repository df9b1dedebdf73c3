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
from grutrace.storage.read.snapshot import Moment

#: Traces of which a worker keeps the tables.
KEPT = 8

_lock = threading.Lock()


class Look:
    """A trace as it was at one moment, wherever it is unpickled.

    It keeps working after the trace that it was taken from is closed; unless that was in memory:
    then the rows stay as long as this does, and it cannot be pickled.

    Args:
        moment: What there was.
    """

    def __init__(self, moment: Moment) -> None:
        self._created = moment.header.created
        self._held: Moment | _Reopened
        try:
            self._address: bytes | None = pickle.dumps(moment.source)
        except TypeError:
            self._address, self._held = None, moment
        else:
            self._held = _reopened(self._address, self._created)

    @property
    def in_memory(self) -> bool:
        """Whether there is no file that it could be read from."""
        return self._address is None

    @contextmanager
    def moment(self, module: int, calls: int) -> Iterator[Moment]:
        """One in which this module has had so many calls at least; there may be more by now.

        Raises:
            TraceFileError: The file is gone, or another one.
        """
        if isinstance(self._held, Moment):
            yield self._held
            return
        with release_on_exit():
            yield self._held.moment(module, calls)

    def __getstate__(self) -> dict[str, Any]:
        if self._address is None:
            raise TypeError("a trace in memory cannot go to another process")
        return {"_address": self._address, "_created": self._created}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = _reopened(state["_address"], state["_created"], keep=True)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return self._address, self._created


class _Reopened:
    """A source that is opened when it is first needed, and looked at again when it has grown."""

    def __init__(self, address: bytes, created: float) -> None:
        self._address, self._created = address, created
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._moment: Moment | None = None

    def moment(self, module: int, calls: int) -> Moment:
        """A look at the source in which a module has had at least so many calls."""
        with self._lock:
            if self._source is None:
                self._source = pickle.loads(self._address)
                weakref.finalize(self, self._source.close)
            if self._moment is None or not _has(self._moment, module, calls):
                self._moment = Moment(self._source, self._source.refresh())
            same = self._moment.header.created == self._created
            if not same or not _has(self._moment, module, calls):
                raise TraceFileError(
                    f"{self._source.name} is another file by now; open it and ask it anew"
                )
            return self._moment


def _has(moment: Moment, module: int, calls: int) -> bool:
    return module < len(moment.tables.extents) and moment.extent(module).calls >= calls


_Key = tuple[bytes, float]

_known: weakref.WeakValueDictionary[_Key, _Reopened] = weakref.WeakValueDictionary()

#: Held here for a while: a task of dask comes, reads a part, and is forgotten.
_lately: OrderedDict[_Key, _Reopened] = OrderedDict()


def _reopened(address: bytes, created: float, *, keep: bool = False) -> _Reopened:
    """One for all who ask while anybody holds it."""
    key = address, created
    with _lock:
        found = _known.get(key)
        if found is None:
            found = _known[key] = _Reopened(address, created)
        if keep:
            _lately[key] = found
            _lately.move_to_end(key)
            while len(_lately) > KEPT:
                _lately.popitem(last=False)
        return found
