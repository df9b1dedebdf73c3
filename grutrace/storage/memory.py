"""A trace in memory: the reference that the file is tested against."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from grutrace.record import Array, Header, Record
from grutrace.storage.admission import Admission
from grutrace.storage.entries import Entries
from grutrace.storage.preparing import GATHERED, Prepare
from grutrace.storage.schema import (
    TABLES,
    Column,
    layout,
    pieces_place,
    quantity_place,
    site_place,
    weight_shapes,
)
from grutrace.storage.source import Readable
from grutrace.storage.strings import Strings
from grutrace.storage.tables import Tables, extent

#: How far an array grows past what it must hold, so that reading after every call copies little.
GROWTH = 1.5


class MemorySink:
    """Keeps every record, and is what it is read from: both `Sink` and `Source`.

    Appending takes the same time however much there is; arrays are joined when they are read.

    Args:
        header: Of the trace.
        prepare: Finishes records when somebody reads.
    """

    name = "memory"
    live = True
    files: tuple[Path, ...] = ()

    def __init__(self, header: Header, prepare: Prepare | None = None) -> None:
        self.header, self._prepare = header, prepare
        self._lock = threading.Lock()
        self._admission = Admission(header.modules)
        self._strings = Strings()
        self._entries = Entries(header.modules, self._strings)
        self._tables: Tables | None = None
        # Records wait here until somebody reads: a stepwise decoder would feel each entry.
        self._waiting: deque[Record] = deque()
        self._arrays = {place: _Growing(column) for place, column in layout(header.modules).items()}

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a trace in memory cannot be opened by another process")

    def append(self, record: Record) -> None:
        """Take a record.

        Raises:
            SinkError: It does not fit what came before it.
        """
        with self._lock:
            if self._prepare is None:
                self._admission.admit(record)
            self._waiting.append(record)
            self._tables = None

    def flush(self) -> None:
        """Nothing is left to do: what was appended can be read."""

    def close(self) -> None:
        """Nothing is left to do: the trace stays readable."""

    def refresh(self) -> Tables:
        """The tables of everything appended so far."""
        with self._lock:
            if self._tables is None:
                self._tables = self._join_tables()
            return self._tables

    def _join_tables(self) -> Tables:
        while self._waiting:
            for record in self._next():
                for place, items in self._entries.of(record):
                    self._arrays[place].append(items)
        ends, characters = self._strings.take()
        self._arrays["strings"].append(ends)
        self._arrays["characters"].append(characters)
        tables: dict[str, Any] = {name: self._arrays[name].joined() for name in TABLES}
        pieces, extents = [], []
        for index, module in enumerate(self.header.modules):
            calls = tables["calls"][tables["calls"]["module"] == index]
            pieces.append(self._arrays[pieces_place(module)].joined())
            extents.append(extent(calls, pieces[-1]))
        return Tables(**tables, pieces=tuple(pieces), extents=tuple(extents), closed=False)

    def _next(self) -> list[Record]:
        """Some of the records that wait, finished."""
        if self._prepare is None:
            return [self._waiting.popleft()]
        records, size = list[Record](), 0
        while self._waiting and size < GATHERED:
            records.append(self._waiting.popleft())
            size += records[-1].nbytes
        finished = self._prepare(records)
        for record in finished:
            self._admission.admit(record)
        return finished

    def as_of(self, tables: Tables) -> Readable:  # noqa: ARG002
        """The sink itself: what is there stays where it is."""
        return self

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Array:
        """The first `count` rows, (count, H or I)."""
        kind = self.header.modules[module]
        site = next(site for site in kind.sites if site.suffix == suffix)
        return self._read(quantity_place(kind, site, quantity), count)

    def initial(self, module: int, suffix: str, count: int) -> Array:
        """The states that the first `count` sequences began from, (count, H)."""
        return self._read(site_place(self.header.modules[module], suffix, "initial"), count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Of the module's first `count` calls, (count,) of type `schema.CHECK`."""
        return self._read(site_place(self.header.modules[module], suffix, "checks"), count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """One version of a site's weights."""
        kind = self.header.modules[module]
        site = next(site for site in kind.sites if site.suffix == suffix)
        return {
            name: self._read(site_place(kind, suffix, name), version + 1)[version]
            for name in weight_shapes(kind, site)
        }

    def _read(self, place: str, count: int) -> Array:
        with self._lock:
            return self._arrays[place].joined()[:count]


class _Growing:
    """Arrays appended one by one, joined when somebody looks."""

    def __init__(self, column: Column) -> None:
        self._joined: Array = np.empty((0, *column.item), column.dtype)
        self._length = 0
        self._loose: deque[Array] = deque()

    def append(self, items: Array) -> None:
        """Keep (n, ...) items."""
        self._loose.append(items)

    def joined(self) -> Array:
        """All items so far, read-only. What was given out before stays as it was."""
        if self._loose:
            length = self._length + sum(map(len, self._loose))
            if length > len(self._joined):
                self._reserve(length)
            while self._loose:
                items = self._loose.popleft()
                self._joined[self._length : self._length + len(items)] = items
                self._length += len(items)
        view: Any = self._joined[: self._length]
        view.flags.writeable = False
        return np.asarray(view)

    def _reserve(self, length: int) -> None:
        # The first reading, mostly of a finished trace, takes just what it needs.
        size = int(length * GROWTH) if self._length else length
        larger = np.empty((size, *self._joined.shape[1:]), self._joined.dtype)
        larger[: self._length] = self._joined[: self._length]
        self._joined = larger
