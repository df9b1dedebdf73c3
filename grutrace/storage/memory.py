"""Traces in memory. They are the reference that files are tested against.

Module contents: `MemorySink` records, `MemoryCopy` is a trace that is no longer recorded, and
`MemoryStore` holds the arrays of both.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from grutrace.records import AnnotationRecord, Array, Collect, Record, TraceHeader
from grutrace.storage.format.schema import (
    TABLES,
    DatasetSpec,
    dataset_specs,
    pieces_path,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.format.tables import Tables, count_module, dataset_lengths
from grutrace.storage.write.encoding import RecordEncoder, StringTable
from grutrace.storage.write.file_sink import BATCH_BYTES, RecordTransform
from grutrace.storage.write.validation import RecordValidator

#: Growth factor of an array, so that reading after every call copies little.
GROWTH = 1.5


class MemoryStore:
    """The datasets of one trace in memory, by their path in a file: a `SnapshotReader`.

    Args:
        header: Header of the trace.
        lock: Held while appended items are merged into an array.
        items: Initial items of each dataset, by path.

    Attributes:
        nbytes: Bytes of all items.
    """

    def __init__(
        self, header: TraceHeader, lock: threading.Lock, items: Mapping[str, Array] | None = None
    ) -> None:
        self.header, self._lock = header, lock
        existing = items or {}
        self.nbytes = sum(array.nbytes for array in existing.values())
        self._arrays = {
            path: _GrowableArray(spec, existing.get(path))
            for path, spec in dataset_specs(header.modules).items()
        }

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a trace in memory cannot be opened by another process")

    def append(self, path: str, items: Array) -> None:
        """Append (n, ...) items to a dataset."""
        self.nbytes += items.nbytes
        self._arrays[path].append(items)

    def tables(self) -> Tables:
        """Return the present tables. The caller holds the lock."""
        tables: dict[str, Any] = {name: self._arrays[name].array() for name in TABLES}
        pieces, module_counts = [], []
        for index, module in enumerate(self.header.modules):
            calls = tables["calls"][tables["calls"]["module"] == index]
            pieces.append(self._arrays[pieces_path(module)].array())
            module_counts.append(count_module(calls, pieces[-1]))
        return Tables(
            **tables, pieces=tuple(pieces), module_counts=tuple(module_counts), closed=False
        )

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Array:
        """Return the first `count` rows, (count, H or I)."""
        info = self.header.modules[module]
        site = next(site for site in info.sites if site.suffix == suffix)
        return self.items(quantity_path(info, site, quantity), count)

    def initial(self, module: int, suffix: str, count: int) -> Array:
        """Return the initial states of the first `count` sequences, (count, H)."""
        return self.items(site_path(self.header.modules[module], suffix, "initial"), count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        return self.items(site_path(self.header.modules[module], suffix, "checks"), count)

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""
        return self.items(site_path(self.header.modules[module], suffix, "backward"), count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        info = self.header.modules[module]
        site = next(site for site in info.sites if site.suffix == suffix)
        return {
            name: self.items(site_path(info, suffix, name), version + 1)[version]
            for name in weight_shapes(info, site)
        }

    def items(self, path: str, count: int) -> Array:
        """Return the first `count` items of a dataset, read-only."""
        with self._lock:
            return self._arrays[path].array()[:count]

    def all_items(self, tables: Tables) -> dict[str, Array]:
        """Return the items of each dataset that these tables count, read-only, by path."""
        counts = dataset_lengths(tables, self.header.modules)
        return {path: self.items(path, count) for path, count in counts.items()}


class _MemorySource:
    """The reading methods of a trace in memory: an `AppendOnlySource` without `refresh`."""

    name = "memory"
    files: tuple[Path, ...] = ()
    header: TraceHeader
    _store: MemoryStore

    def as_of(self, tables: Tables) -> MemoryStore:  # noqa: ARG002
        """Return the store. It keeps its rows when the trace is cleared."""
        return self._store

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Array:
        """Return the first `count` rows, (count, H or I)."""
        return self._store.rows(module, suffix, quantity, count)

    def initial(self, module: int, suffix: str, count: int) -> Array:
        """Return the initial states of the first `count` sequences, (count, H)."""
        return self._store.initial(module, suffix, count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        return self._store.checks(module, suffix, count)

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""
        return self._store.backward(module, suffix, count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        return self._store.weights(module, suffix, version)

    def close(self) -> None:
        """Do nothing: a trace in memory stays readable."""


class MemorySink(_MemorySource):
    """The sink and source of a recording in memory.

    Appending takes constant time. Records are merged into arrays when the trace is read.

    Args:
        header: Header of the trace.
        transform: Completes records when the trace is read.
    """

    live = True

    def __init__(self, header: TraceHeader, transform: RecordTransform | None = None) -> None:
        self.header, self._transform = header, transform
        self._lock = threading.Lock()
        self._appended = 0
        self._reset()

    def _reset(self) -> None:
        self._validator = RecordValidator(self.header.modules)
        self._strings = StringTable()
        self._encoder = RecordEncoder(self.header.modules, self._strings)
        self._tables: Tables | None = None
        # Records are encoded when the trace is read: encoding would slow a stepwise decoder.
        self._pending: deque[Record] = deque()
        self._pending_bytes = 0
        self._store = MemoryStore(self.header, self._lock)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a trace in memory cannot be opened by another process")

    @property
    def nbytes(self) -> int:
        """Approximate size in memory, in bytes."""
        return self._store.nbytes + self._pending_bytes

    @property
    def appended(self) -> int:
        """Number of records appended so far."""
        return self._appended

    has_failed = False

    def collect_from(self, collect: Collect) -> None:
        """Do nothing: reading appends all records first."""

    def gather(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def append(self, record: Record) -> None:
        """Append a record.

        Raises:
            SinkError: The record is inconsistent with earlier records.
        """
        with self._lock:
            if self._transform is None:
                self._validator.validate(record)
            self._pending.append(record)
            self._appended += 1
            self._pending_bytes += record.nbytes
            self._tables = None

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations of recorded sequences."""
        for annotation in annotations:
            self.append(annotation)

    def flush(self) -> None:
        """Do nothing: appended records are readable at once."""

    def clear(self) -> None:
        """Delete all records and restart their numbering.

        Arrays that were read before keep their content.
        """
        with self._lock:
            self._reset()

    def refresh(self) -> Tables:
        """Return the tables of all records appended so far."""
        with self._lock:
            if self._tables is None:
                self._tables = self._join_tables()
            return self._tables

    def _join_tables(self) -> Tables:
        while self._pending:
            for record in self._pop_records():
                for path, items in self._encoder.encode(record):
                    self._store.append(path, items)
        self._pending_bytes = 0
        ends, characters = self._strings.pop_new()
        self._store.append("strings", ends)
        self._store.append("characters", characters)
        return self._store.tables()

    def _pop_records(self) -> list[Record]:
        """Remove some pending records, complete them and return them."""
        if self._transform is None:
            return [self._pending.popleft()]
        records, size = list[Record](), 0
        while self._pending and size < BATCH_BYTES:
            records.append(self._pending.popleft())
            size += records[-1].nbytes
        completed = self._transform(records)
        for record in completed:
            self._validator.validate(record)
        return completed


class MemoryCopy(_MemorySource):
    """A trace in memory that is no longer recorded: a `Source` that can be pickled.

    Args:
        header: Header of the trace.
        items: All items of each dataset, by path.
    """

    live = False

    def __init__(self, header: TraceHeader, items: Mapping[str, Array]) -> None:
        self.header = header
        self._reset(items)

    def _reset(self, items: Mapping[str, Array]) -> None:
        self._store = MemoryStore(self.header, threading.Lock(), items)
        self._tables = self._store.tables()

    def __reduce__(self) -> tuple[object, ...]:
        return MemoryCopy, (self.header, self._store.all_items(self._tables))

    @property
    def nbytes(self) -> int:
        """Approximate size in memory, in bytes."""
        return self._store.nbytes

    def refresh(self) -> Tables:
        """Return the tables: the same object until the trace is annotated."""
        return self._tables

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations."""
        strings = StringTable(self._tables.texts, len(self._tables.characters))
        encoder = RecordEncoder(self.header.modules, strings)
        for annotation in annotations:
            for path, items in encoder.encode(annotation):
                self._store.append(path, items)
        ends, characters = strings.pop_new()
        self._store.append("strings", ends)
        self._store.append("characters", characters)
        self._tables = self._store.tables()

    def clear(self) -> None:
        """Delete all records."""
        self._reset({})


class _GrowableArray:
    """An array with fast appends. Appended items are merged when the array is read."""

    def __init__(self, spec: DatasetSpec, items: Array | None = None) -> None:
        if items is None:
            items = np.empty((0, *spec.item_shape), spec.dtype)
        self._array: Array = items
        self._length = len(self._array)
        self._unmerged: deque[Array] = deque()

    def append(self, items: Array) -> None:
        """Append (n, ...) items."""
        self._unmerged.append(items)

    def array(self) -> Array:
        """Return all items, read-only. Arrays that were returned before do not change."""
        if self._unmerged:
            length = self._length + sum(map(len, self._unmerged))
            if length > len(self._array):
                self._reserve(length)
            while self._unmerged:
                items = self._unmerged.popleft()
                self._array[self._length : self._length + len(items)] = items
                self._length += len(items)
        view: Any = self._array[: self._length]
        view.flags.writeable = False
        return np.asarray(view)

    def _reserve(self, length: int) -> None:
        # The first read is usually of a complete trace, so it reserves no more than needed.
        size = int(length * GROWTH) if self._length else length
        larger = np.empty((size, *self._array.shape[1:]), self._array.dtype)
        larger[: self._length] = self._array[: self._length]
        self._array = larger
