"""`SelectedSource`, a source with some sequences of a trace.

A selection copies no rows: its tables list the selected sequences, and its rows are read from the
trace by their numbers. So everything that reads a trace reads a selection.

Module contents: `select_tables` makes the tables; `SelectedReader` reads the rows;
`SelectedSource` and `SelectedMemorySource` are the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from grutrace.errors import StateError
from grutrace.records import AnnotationRecord, Array, TraceHeader
from grutrace.storage.format.schema import (
    TABLES,
    call_tables,
    dataset_specs,
    pieces_path,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.format.tables import (
    ModuleCounts,
    SelectedSequences,
    ShardCalls,
    Tables,
    dataset_lengths,
)
from grutrace.storage.interfaces import (
    AnnotatableSource,
    InMemoryReader,
    InMemorySource,
    Rows,
    SnapshotReader,
    Source,
)
from grutrace.storage.read.lazy_rows import SelectedRows
from grutrace.storage.read.selection.criteria import Criteria
from grutrace.storage.read.selection.patterns import Mask
from grutrace.storage.read.sequence_index import Integers, ranges
from grutrace.storage.read.snapshot import TraceSnapshot


@dataclass(frozen=True, eq=False)
class SelectedTables(Tables):
    """The tables of a selection, and the reader of the rows that they count."""

    reader: SelectedReader | None = None


class _ModuleSelection:
    """The selected part of a module. All numbers are those of the stored tables.

    Args:
        snapshot: Snapshot of the trace.
        module: Index of the module in the header.
        mask: (S,) which sequences are selected.

    Attributes:
        pieces: The selected pieces.
        calls: The calls with selected pieces, counted within the module.
        batch: Number of selected pieces of each of these calls.
        sequences: The selected stored sequences (segments).
        counts: Counts of the module in the trace.
        selected: For the tables of the selection.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, mask: Mask) -> None:
        index = snapshot.index(module)
        self._index = index
        self._weights = snapshot.stored.calls["weights"][index.call_numbers].astype(np.int64)
        self.pieces: Integers = np.flatnonzero(mask[index.sequences])
        calls = np.searchsorted(index.call_numbers, index.calls[self.pieces])
        self.calls, batch = np.unique(calls, return_counts=True)
        self.batch = batch.astype(np.int64)
        self.sequences: Integers = np.unique(index.segments[self.pieces])
        self.counts: ModuleCounts = snapshot.stored.module_counts[module]
        numbers = np.flatnonzero(mask)
        self.selected = SelectedSequences(
            snapshot.original_numbers(module)[numbers],
            snapshot.is_fork(module)[numbers],
        )

    @property
    def new_counts(self) -> ModuleCounts:
        """Counts of the module in the selection. The versions of the weights keep their numbers."""
        steps = int(self._index.steps[self.pieces].sum())
        versions = int(self._weights[self.calls].max(initial=-1)) + 1
        return ModuleCounts(len(self.calls), steps, len(self.sequences), versions)

    @cached_property
    def rows(self) -> Integers:
        """Numbers of the selected rows, in the order of recording."""
        return ranges(self._index.starts[self.pieces], self._index.steps[self.pieces])


def select_tables(snapshot: TraceSnapshot, criteria: Criteria) -> SelectedTables:
    """Return the tables of the selected sequences.

    Calls without a selected sequence are left out. Sequences and calls get new numbers from 0.
    """
    stored = snapshot.stored
    modules = [
        _ModuleSelection(snapshot, number, criteria.mask(snapshot, number))
        for number in range(len(stored.pieces))
    ]
    is_kept, batches = np.zeros(len(stored.calls), bool), np.zeros(len(stored.calls), np.int64)
    for number, module in enumerate(modules):
        kept = snapshot.index(number).call_numbers[module.calls]
        is_kept[kept], batches[kept] = True, module.batch
    calls = stored.calls[is_kept].copy()
    calls["batch"] = batches[is_kept]
    forks = _renumbered(stored.forks, modules, ("sequence", "parent"))[0]
    annotations, is_annotation = _renumbered(stored.annotations, modules, ("sequence",))
    counts = stored.annotations["count"].astype(np.int64)
    starts = np.cumsum(counts) - counts
    reader = SelectedReader
    if isinstance(snapshot.source, InMemoryReader):
        reader = SelectedMemoryReader
    values = stored.values[ranges(starts[is_annotation], counts[is_annotation])]
    return SelectedTables(
        calls=calls,
        forks=forks,
        annotations=annotations,
        values=values,
        strings=stored.strings,
        characters=stored.characters,
        pieces=tuple(_pieces(snapshot, number, module) for number, module in enumerate(modules)),
        module_counts=tuple(module.new_counts for module in modules),
        closed=stored.closed,
        shards=_shards(stored, is_kept),
        selected=tuple(module.selected for module in modules),
        reader=reader(snapshot, modules, criteria),
    )


def _pieces(snapshot: TraceSnapshot, number: int, module: _ModuleSelection) -> Array:
    pieces = snapshot.stored.pieces[number][module.pieces]
    pieces["sequence"] = np.searchsorted(module.sequences, pieces["sequence"].astype(np.int64))
    return pieces


def _renumbered(
    table: Array, modules: list[_ModuleSelection], fields: tuple[str, ...]
) -> tuple[Array, Mask]:
    """Return the entries whose sequences are all selected, and which ones they are."""
    is_kept, table = np.zeros(len(table), bool), table.copy()
    for number, module in enumerate(modules):
        entries = np.flatnonzero(table["module"] == number)
        old = [table[field][entries].astype(np.int64) for field in fields]
        is_selected = np.logical_and.reduce([np.isin(values, module.sequences) for values in old])
        is_kept[entries] = is_selected
        for field, values in zip(fields, old, strict=True):
            table[field][entries] = np.searchsorted(module.sequences, values)
    return table[is_kept], is_kept


def _shards(stored: Tables, is_kept: Mask) -> tuple[ShardCalls, ...]:
    ends = np.cumsum([0, *(shard.calls for shard in stored.shards)])
    kept = np.concatenate([[0], np.cumsum(is_kept)])[ends]
    return tuple(
        ShardCalls(shard.rank, int(calls), shard.closed)
        for shard, calls in zip(stored.shards, np.diff(kept), strict=True)
    )


class SelectedReader:
    """Reads the rows of a selection.

    Args:
        snapshot: Snapshot of the trace.
        modules: The selected part of each module.
        criteria: The conditions of the selection.
    """

    def __init__(
        self, snapshot: TraceSnapshot, modules: list[_ModuleSelection], criteria: Criteria
    ) -> None:
        self._base, self._is_closed = snapshot.source, snapshot.stored.closed
        self._header, self._modules, self._criteria = snapshot.header, modules, criteria

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the trace and the criteria. The rows of a growing trace would move."""
        if not self._is_closed:
            raise TypeError("a selection from a trace that may still grow cannot be pickled")
        return _reopen, (self._base, self._criteria)

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:  # noqa: ARG002
        """Return all selected rows, (rows, H or I)."""
        selection = self._modules[module]
        rows = self._base.rows(module, suffix, quantity, selection.counts.rows)
        if len(selection.rows) == selection.counts.rows:
            return rows
        return SelectedRows(rows, selection.rows)

    def initial(self, module: int, suffix: str, count: int) -> Rows:  # noqa: ARG002
        """Return the initial states of all selected sequences, (sequences, H)."""
        selection = self._modules[module]
        initial = self._base.initial(module, suffix, selection.counts.sequences)
        if isinstance(initial, np.ndarray):
            return initial[selection.sequences]
        return SelectedRows(initial, selection.sequences)

    def checks(self, module: int, suffix: str, count: int) -> Array:  # noqa: ARG002
        """Return the checks of the module's calls with selected sequences, (calls,)."""
        selection = self._modules[module]
        return self._base.checks(module, suffix, selection.counts.calls)[selection.calls]

    def backward(self, module: int, suffix: str, count: int) -> Array:  # noqa: ARG002
        """Return facts about the backward passes of these calls, (calls,)."""
        selection = self._modules[module]
        return self._base.backward(module, suffix, selection.counts.calls)[selection.calls]

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        return self._base.weights(module, suffix, version)

    def stored_sequence(self, module: int, sequence: int) -> int:
        """Return the number of a stored sequence of the selection in the tables of the trace."""
        return int(self._modules[module].sequences[sequence])

    def datasets(self, tables: Tables) -> Iterator[tuple[str, Rows | Array]]:
        """Yield the content of a file with the selection only: datasets by path, in parts.

        Args:
            tables: The tables of the selection.
        """
        for name in TABLES:
            yield name, getattr(tables, name)
        for number, module in enumerate(self._header.modules):
            yield pieces_path(module), tables.pieces[number]
            counts, paths = tables.module_counts[number], set[str]()
            for site in module.sites:
                for quantity in site.quantities:
                    path = quantity_path(module, site, quantity)
                    if path not in paths:
                        yield path, self.rows(number, site.suffix, quantity, counts.rows)
                        paths.add(path)
                initial = self.initial(number, site.suffix, counts.sequences)
                yield site_path(module, site.suffix, "initial"), initial
                for name in call_tables(site):
                    items = getattr(self, name)(number, site.suffix, counts.calls)
                    yield site_path(module, site.suffix, name), items
                for version in range(counts.versions):
                    weights = self.weights(number, site.suffix, version)
                    for name in weight_shapes(module, site):
                        yield site_path(module, site.suffix, name), weights[name][np.newaxis]


class SelectedMemoryReader(SelectedReader):
    """Reads the rows of a selection from a trace in memory."""

    def all_items(self, tables: Tables) -> dict[str, Array]:
        """Return the items of each dataset that these tables count, by path."""
        lengths = dataset_lengths(tables, self._header.modules)
        parts: dict[str, list[Array]] = {path: [] for path in lengths}
        for path, items in self.datasets(tables):
            parts[path].append(np.asarray(items))
        specs = dataset_specs(self._header.modules)
        return {
            path: np.concatenate(arrays)
            if arrays
            else np.empty((0, *specs[path].item_shape), specs[path].dtype)
            for path, arrays in parts.items()
        }


class SelectedSource:
    """Some sequences of a trace: a `Source`. It follows the trace.

    Args:
        base: Source of the trace.
        criteria: The conditions of the selection.
        snapshot: The latest known snapshot of the trace.
        present: Returns the present snapshot of a trace that this process records.
        owns_base: Whether closing this source closes that of the trace.
    """

    def __init__(
        self,
        base: Source,
        criteria: Criteria,
        snapshot: TraceSnapshot | None = None,
        present: Callable[[], TraceSnapshot] | None = None,
        *,
        owns_base: bool = False,
    ) -> None:
        self._base, self.criteria = base, criteria
        self._snapshot, self._present, self._owns_base = snapshot, present, owns_base
        self._tables: SelectedTables | None = None
        self.name, self.header, self.live = base.name, base.header, base.live

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the trace."""
        return self._base.files

    def refresh(self) -> Tables:
        """Return the tables of the sequences that are selected now."""
        before = self._snapshot
        if self._present is not None:
            self._snapshot = self._present()
        else:
            tables = self._base.refresh()
            if before is None or tables is not before.stored:
                self._snapshot = TraceSnapshot(self._base, tables)
        if self._tables is None or self._snapshot is not before:
            self.header = self._base.header
            self._tables = select_tables(cast(TraceSnapshot, self._snapshot), self.criteria)
        return self._tables

    def as_of(self, tables: Tables) -> SnapshotReader:
        """Return the reader of the rows that these tables count."""
        reader = tables.reader if isinstance(tables, SelectedTables) else None
        if reader is None:
            raise TypeError("expected tables that this source gave")
        return reader

    def datasets(self, tables: Tables) -> Iterator[tuple[str, Rows | Array]]:
        """Yield the content of a file with the selection only; see `SelectedReader.datasets`."""
        return cast(SelectedReader, self.as_of(tables)).datasets(tables)

    @property
    def saved_header(self) -> TraceHeader:
        """The header of a file with the selection only: it is not one file of several."""
        names = ("run", "shard", "shards")
        options = {name: v for name, v in self.header.options.items() if name not in names}
        return replace(self.header, options=options)

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations to the sequences of the trace.

        Raises:
            StateError: The trace cannot be annotated.
        """
        if not isinstance(self._base, AnnotatableSource):
            raise StateError(several_files(self._base))
        assert self._tables is not None
        reader = cast(SelectedReader, self._tables.reader)
        self._base.annotate(
            [
                replace(record, sequence=reader.stored_sequence(record.module, record.sequence))
                for record in annotations
            ]
        )

    def __str__(self) -> str:
        """Return the criteria, also of the selection from which this one was taken."""
        before = f"{self._base}, " if isinstance(self._base, SelectedSource) else ""
        return f"{before}{self.criteria}"

    def close(self) -> None:
        """Close the trace if this source owns it."""
        if self._owns_base:
            self._base.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._base, self.criteria)


class SelectedMemorySource(SelectedSource):
    """Some sequences of a trace in memory: an `InMemorySource`."""

    @property
    def nbytes(self) -> int:
        """Approximate size of the whole trace, which the selection keeps in memory."""
        return cast(InMemorySource, self._base).nbytes

    def clear(self) -> None:
        """Refuse: the records belong to the trace.

        Raises:
            StateError: Always.
        """
        raise StateError("a selection cannot be cleared: clear the trace that it was taken from")


def selected_source(
    base: Source,
    criteria: Criteria,
    snapshot: TraceSnapshot | None = None,
    present: Callable[[], TraceSnapshot] | None = None,
    *,
    owns_base: bool = False,
) -> SelectedSource:
    """Return a source with the selected sequences of a trace, in memory or in a file."""
    kind = SelectedMemorySource if isinstance(base, InMemorySource) else SelectedSource
    return kind(base, criteria, snapshot, present, owns_base=owns_base)


def several_files(source: Source) -> str:
    """Return the message that a trace in several files cannot be annotated."""
    return f"{source.name} is a trace of {len(source.files)} files: annotate each of them by itself"


def _reopen(base: Source, criteria: Criteria) -> SelectedSource:
    """Return the source of a selection in another process. It owns the reopened trace."""
    return selected_source(base, criteria, owns_base=True)
