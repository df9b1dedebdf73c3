"""`ConcatenatedSource` reads the shards of several processes as one trace.

All processes run the same model. The rows of a module are those of rank 0, then those of rank 1,
and so on, as if one process had recorded them. `union.py` is for sources with different modules.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grutrace.distributed import Shard
from grutrace.errors import TraceFileError
from grutrace.records import Array, ModuleInfo, TraceHeader
from grutrace.storage.format.header import module_differences
from grutrace.storage.format.schema import CHECK, PIECE, width
from grutrace.storage.format.tables import ModuleCounts, ShardCalls, Tables
from grutrace.storage.interfaces import AppendOnlySource, Rows, SnapshotReader
from grutrace.storage.read.lazy_rows import ConcatenatedRows
from grutrace.storage.shards.union import annotation_values, concatenate_strings

#: Index of each module of a shard among the modules of all shards.
ModuleIndices = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ConcatenatedTables(Tables):
    """The tables of several shards, and the reader of the rows that they count."""

    reader: SnapshotReader | None = None


class ConcatenatedSource:
    """Several shards as one `Source`.

    Calls, rows, sequences and weight versions are in the order of the ranks. While shards grow,
    their numbers change when the trace is refreshed; earlier snapshots stay valid. Closing the
    source closes its shards.

    Args:
        name: Name of the whole, for messages.
        shards: The shard of each source.
        sources: The sources, at least one, by increasing rank. More can be added.

    Raises:
        TraceFileError: A module differs between two shards.
    """

    live = False

    def __init__(
        self, name: str, shards: Sequence[Shard], sources: Sequence[AppendOnlySource]
    ) -> None:
        self.name = name
        self._shards, self._sources = list(shards), list(sources)
        self._modules: list[ModuleInfo] = []
        self._first_of: list[AppendOnlySource] = []
        self._latest: tuple[Tables, ...] = ()
        self._tables: ConcatenatedTables | None = None
        self._merge_headers()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their ranks."""
        return tuple(self._shards)

    @property
    def sources(self) -> tuple[AppendOnlySource, ...]:
        """The source of each shard."""
        return tuple(self._sources)

    @property
    def module_indices(self) -> tuple[ModuleIndices, ...]:
        """The modules of each shard, as indexes into the modules of all shards."""
        return tuple(self._module_indices)

    @property
    def parts(self) -> tuple[Tables, ...]:
        """The tables of each shard, as of the last refresh."""
        return self._latest

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of all shards."""
        return tuple(file for source in self._sources for file in source.files)

    def add(self, shard: Shard, source: AppendOnlySource) -> None:
        """Insert a shard, in the order of the ranks.

        Raises:
            TraceFileError: A module differs from that of another shard.
        """
        position = sum(each.rank < shard.rank for each in self._shards)
        self._shards.insert(position, shard)
        self._sources.insert(position, source)
        self._merge_headers()

    def _merge_headers(self) -> None:
        """Collect the modules of all shards. Known modules keep their index."""
        known = {module.path: number for number, module in enumerate(self._modules)}
        self._module_indices: list[ModuleIndices] = []
        for source in self._sources:
            for module in source.header.modules:
                number = known.setdefault(module.path, len(self._modules))
                if number == len(self._modules):
                    self._modules.append(module)
                    self._first_of.append(source)
                for found in module_differences(
                    self._modules[number], module, ("the first", "this one")
                ):
                    first = self._first_of[number].name
                    raise TraceFileError(
                        f"{source.name} and {first} cannot be read as one trace: {found}"
                    )
            self._module_indices.append(
                tuple(known[module.path] for module in source.header.modules)
            )
        self.header = self._concatenated_header()

    def _concatenated_header(self) -> TraceHeader:
        headers, first = [source.header for source in self._sources], self._shards[0]
        own = {name: value for name, value in headers[0].options.items() if name != "shard"}
        ranks = [{"rank": shard.rank} for shard in self._shards]
        shards = {"id": first.id, "world_size": first.world_size, "of": ranks}
        return replace(
            headers[0],
            model=", ".join(dict.fromkeys(header.model for header in headers)),
            created=min(header.created for header in headers),
            options=own | {"shards": shards},
            modules=tuple(self._modules),
        )

    def refresh(self) -> Tables:
        """Return the present tables of all shards."""
        latest = tuple(source.refresh() for source in self._sources)
        if any(
            len(module_indices) < len(source.header.modules)
            for module_indices, source in zip(self._module_indices, self._sources, strict=True)
        ):
            # `grutrace run` has found more modules.
            self._merge_headers()
        known = len(latest) == len(self._latest) and all(map(operator.is_, latest, self._latest))
        if self._tables is None or not known:
            self._tables = self._concatenate(latest)
            self._latest = latest
        return self._tables

    def _concatenate(self, parts: tuple[Tables, ...]) -> ConcatenatedTables:
        tables = concatenated_tables(parts, self._module_indices, len(self._modules))
        shards = tuple(
            ShardCalls(shard.rank, len(part.calls), part.closed)
            for shard, part in zip(self._shards, parts, strict=True)
        )
        reader = _ConcatenatedReader(self, parts)
        return ConcatenatedTables(**vars(tables) | {"shards": shards, "reader": reader})

    def as_of(self, tables: Tables) -> SnapshotReader:
        """Return the reader of the rows that these tables count, even if shards have grown."""
        reader = tables.reader if isinstance(tables, ConcatenatedTables) else None
        if reader is None:
            raise TypeError("expected tables that this source gave")
        return reader

    def close(self) -> None:
        """Close all sources. Closing twice has no effect."""
        for source in self._sources:
            source.close()


class _ConcatenatedReader:
    """Reads the rows of several shards as of one refresh.

    Args:
        joined: The shards.
        parts: The tables of each shard as of that refresh.
    """

    def __init__(self, joined: ConcatenatedSource, parts: Sequence[Tables]) -> None:
        self._name, self._shards, self._sources = joined.name, joined.shards, joined.sources
        self._modules, self._tables = joined.header.modules, tuple(parts)
        #: By module: each source that has it, its index there and its counts.
        self._parts: list[list[tuple[AppendOnlySource, int, ModuleCounts]]] = [
            [] for _ in self._modules
        ]
        for source, of_source, tables in zip(
            self._sources, joined.module_indices, parts, strict=True
        ):
            for local, number in enumerate(of_source):
                self._parts[number].append((source, local, tables.module_counts[local]))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the shards if all are closed. Rows of growing shards would move."""
        if not all(tables.closed for tables in self._tables):
            raise TypeError("shards that may still grow cannot be opened by another process")
        calls = [len(tables.calls) for tables in self._tables]
        return _reopen, (self._name, self._shards, self._sources, calls)

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """Return the first `count` rows, (count, H or I)."""
        parts = [
            source.rows(local, suffix, quantity, extent.rows)
            for source, local, extent in self._parts[module]
        ]
        return self._concatenated_rows(parts, module, suffix, quantity, count)

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """Return the initial states of the first `count` sequences, (count, H)."""
        parts = [
            source.initial(local, suffix, extent.sequences)
            for source, local, extent in self._parts[module]
        ]
        return self._concatenated_rows(parts, module, suffix, "initial", count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        parts = [
            source.checks(local, suffix, extent.calls)
            for source, local, extent in self._parts[module]
        ]
        return np.concatenate([np.empty(0, CHECK), *parts])[:count]

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        for source, local, extent in self._parts[module]:
            if version < extent.versions:
                return source.weights(local, suffix, version)
            version -= extent.versions
        raise IndexError(f"the weight version is out of bounds by {version + 1}")

    def _concatenated_rows(
        self, parts: Sequence[Rows], module: int, suffix: str, quantity: str, count: int
    ) -> Rows:
        if len(parts) == 1:
            return parts[0]
        kind = self._modules[module]
        site = next(site for site in kind.sites if site.suffix == suffix)
        return ConcatenatedRows(parts, (count, width(kind, site, quantity)), np.dtype(kind.dtype))


def _reopen(
    name: str, shards: Sequence[Shard], sources: Sequence[AppendOnlySource], calls: Sequence[int]
) -> ConcatenatedSource:
    """Open the same shards in another process. They must not have grown: that would move rows."""
    joined = ConcatenatedSource(name, shards, sources)
    joined.refresh()
    if [len(part.calls) for part in joined.parts] != list(calls):
        joined.close()
        raise TraceFileError(f"{name} has grown since it was opened: open it again")
    return joined


def concatenated_tables(
    parts: Sequence[Tables], module_indices: Sequence[ModuleIndices], modules: int
) -> Tables:
    """Return the tables that one process would have recorded, one shard after another.

    Args:
        parts: The tables of each shard.
        module_indices: The modules of each shard, as indexes into the modules of all shards.
        modules: Number of modules of all shards.
    """
    before = [ModuleCounts(0, 0, 0, 0)] * modules
    pieces: list[list[Array]] = [[np.empty(0, PIECE)] for _ in range(modules)]
    calls, forks, annotations, values = ([] for _ in range(4))
    string_count = 0
    for part, indices in zip(parts, module_indices, strict=True):
        offsets = _Offsets(indices, before, string_count)
        calls.append(offsets.apply(part.calls))
        forks.append(offsets.apply(part.forks))
        annotations.append(offsets.apply(part.annotations))
        values.append(annotation_values(part, string_count))
        for local, number in enumerate(indices):
            own = part.pieces[local].copy()
            own["sequence"] += np.uint64(before[number].sequences)
            pieces[number].append(own)
            before[number] = _add_extents(before[number], part.module_counts[local])
        string_count += len(part.strings)
    strings, characters = concatenate_strings(parts)
    return Tables(
        calls=np.concatenate(calls),
        forks=np.concatenate(forks),
        annotations=np.concatenate(annotations),
        values=np.concatenate(values),
        strings=strings,
        characters=characters,
        pieces=tuple(map(np.concatenate, pieces)),
        module_counts=tuple(before),
        closed=all(part.closed for part in parts),
    )


class _Offsets:
    """Offsets from the numbers in the tables of a shard to those in the concatenated tables.

    Args:
        module_indices: The modules of the shard, as indexes into the modules of all shards.
        before: Counts of each module in the preceding shards.
        string_count: Number of strings in the preceding shards.
    """

    def __init__(
        self, module_indices: ModuleIndices, before: Sequence[ModuleCounts], string_count: int
    ) -> None:
        self._modules = np.array(module_indices, np.uint32)
        self._sequences = np.array(
            [before[number].sequences for number in module_indices], np.uint64
        )
        self._versions = np.array([before[number].versions for number in module_indices], np.uint32)
        self._string_count = np.uint32(string_count)

    def apply(self, table: Array) -> Array:
        """Return a copy of a table of calls, forks or annotations with shifted numbers."""
        shifted, of = table.copy(), table["module"]
        for field in table.dtype.names or ():
            if field == "module":
                shifted[field] = self._modules[of]
            elif field in ("sequence", "parent"):
                shifted[field] += self._sequences[of]
            elif field == "weights":
                shifted[field] += self._versions[of]
            elif field in ("tag", "name"):
                shifted[field][table[field] > 0] += self._string_count
        return shifted


def _add_extents(first: ModuleCounts, second: ModuleCounts) -> ModuleCounts:
    return ModuleCounts(
        first.calls + second.calls,
        first.rows + second.rows,
        first.sequences + second.sequences,
        first.versions + second.versions,
    )
