"""`ConcatenatedSource` reads the shards of several processes as one trace.

All processes run the same model. The rows of a module are those of rank 0, then those of rank 1,
and so on, as if one process had recorded them. `union.py` is for sources with different modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from grutrace.distributed import Shard
from grutrace.errors import TraceFileError
from grutrace.records import Array, ModuleInfo, TraceHeader
from grutrace.storage.format.header import module_differences
from grutrace.storage.format.schema import BACKWARD, CHECK, width
from grutrace.storage.format.tables import ModuleCounts, ShardCalls, Tables
from grutrace.storage.interfaces import AppendOnlySource, Rows, SnapshotReader
from grutrace.storage.read.lazy_rows import ConcatenatedRows
from grutrace.storage.shards.joined_tables import JoinedSource, ModuleIndices, concatenated_tables


@dataclass(frozen=True, eq=False)
class ConcatenatedTables(Tables):
    """The tables of several shards, and the reader of the rows that they count."""

    reader: SnapshotReader | None = None


class ConcatenatedSource(JoinedSource):
    """Several shards as one `Source`.

    Calls, rows, sequences and weight versions are in the order of the ranks. While shards grow,
    their numbers change when the trace is refreshed; earlier snapshots stay valid. Closing the
    source closes its shards.

    Args:
        name: Name of the trace, for messages.
        shards: The shard of each source.
        sources: The sources, at least one, by increasing rank. More can be added.

    Raises:
        TraceFileError: A module differs between two shards.
    """

    live = False

    def __init__(
        self, name: str, shards: Sequence[Shard], sources: Sequence[AppendOnlySource]
    ) -> None:
        super().__init__(name, sources)
        self._shards = list(shards)
        self._modules: list[ModuleInfo] = []
        self._first_source: list[AppendOnlySource] = []
        self._merge_headers()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their ranks."""
        return tuple(self._shards)

    @property
    def module_indices(self) -> tuple[ModuleIndices, ...]:
        """The modules of each shard, as indexes into the modules of all shards."""
        return tuple(self._module_indices)

    @property
    def shard_tables(self) -> tuple[Tables, ...]:
        """The tables of each shard, as of the last refresh."""
        return self._latest

    def add(self, shard: Shard, source: AppendOnlySource) -> None:
        """Insert a shard, in the order of the ranks.

        Raises:
            TraceFileError: A module differs from that of another shard.
        """
        position = sum(other.rank < shard.rank for other in self._shards)
        self._shards.insert(position, shard)
        self._sources.insert(position, source)
        self._merge_headers()

    def _merge_headers(self) -> None:
        """Collect the modules of all shards. Known modules keep their index."""
        index_by_path = {module.path: index for index, module in enumerate(self._modules)}
        self._module_indices: list[ModuleIndices] = []
        for source in self._sources:
            for module in source.header.modules:
                index = index_by_path.setdefault(module.path, len(self._modules))
                if index == len(self._modules):
                    self._modules.append(module)
                    self._first_source.append(source)
                for difference in module_differences(
                    self._modules[index], module, ("the first", "this one")
                ):
                    first_name = self._first_source[index].name
                    raise TraceFileError(
                        f"{source.name} and {first_name} cannot be read as one trace: {difference}"
                    )
            self._module_indices.append(
                tuple(index_by_path[module.path] for module in source.header.modules)
            )
        self.header = self._concatenated_header()

    def _concatenated_header(self) -> TraceHeader:
        headers, shard = [source.header for source in self._sources], self._shards[0]
        options = {name: value for name, value in headers[0].options.items() if name != "shard"}
        ranks = [{"rank": shard.rank} for shard in self._shards]
        shards = {"id": shard.id, "world_size": shard.world_size, "of": ranks}
        return replace(
            headers[0],
            model=", ".join(dict.fromkeys(header.model for header in headers)),
            created=min(header.created for header in headers),
            options=options | {"shards": shards},
            modules=tuple(self._modules),
        )

    def _join(self, tables: tuple[Tables, ...]) -> ConcatenatedTables:
        if any(
            len(module_indices) < len(source.header.modules)
            for module_indices, source in zip(self._module_indices, self._sources, strict=True)
        ):
            # `grutrace run` has found more modules.
            self._merge_headers()
        concatenated = concatenated_tables(tables, self._module_indices, len(self._modules))
        shards = tuple(
            ShardCalls(shard.rank, len(shard_tables.calls), shard_tables.closed)
            for shard, shard_tables in zip(self._shards, tables, strict=True)
        )
        reader = _ConcatenatedReader(self, tables)
        return ConcatenatedTables(**vars(concatenated) | {"shards": shards, "reader": reader})

    def as_of(self, tables: Tables) -> SnapshotReader:
        """Return the reader of the rows that these tables count, even if shards have grown."""
        reader = tables.reader if isinstance(tables, ConcatenatedTables) else None
        if reader is None:
            raise TypeError("expected tables that this source gave")
        return reader


class _ModuleRows(NamedTuple):
    """The rows of a module in one shard.

    Attributes:
        source: Source of the shard.
        module: Index of the module in the shard.
        counts: Counts of the module in the shard.
    """

    source: AppendOnlySource
    module: int
    counts: ModuleCounts


class _ConcatenatedReader:
    """Reads the rows of several shards as of one refresh.

    Args:
        source: The shards.
        shard_tables: The tables of each shard as of that refresh.
    """

    def __init__(self, source: ConcatenatedSource, shard_tables: Sequence[Tables]) -> None:
        self._name, self._shards, self._sources = source.name, source.shards, source.sources
        self._modules, self._tables = source.header.modules, tuple(shard_tables)
        #: By module, the shards that have it.
        self._module_rows: list[list[_ModuleRows]] = [[] for _ in self._modules]
        for shard, indices, tables in zip(
            self._sources, source.module_indices, shard_tables, strict=True
        ):
            for local_index, index in enumerate(indices):
                self._module_rows[index].append(
                    _ModuleRows(shard, local_index, tables.module_counts[local_index])
                )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the shards if all are closed. Rows of growing shards would move."""
        if not all(tables.closed for tables in self._tables):
            raise TypeError("shards that may still grow cannot be opened by another process")
        calls = [len(tables.calls) for tables in self._tables]
        return _reopen, (self._name, self._shards, self._sources, calls)

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """Return the first `count` rows, (count, H or I)."""
        arrays = [
            shard.source.rows(shard.module, suffix, quantity, shard.counts.rows)
            for shard in self._module_rows[module]
        ]
        return self._concatenated_rows(arrays, module, suffix, quantity, count)

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """Return the initial states of the first `count` sequences, (count, H)."""
        arrays = [
            shard.source.initial(shard.module, suffix, shard.counts.sequences)
            for shard in self._module_rows[module]
        ]
        return self._concatenated_rows(arrays, module, suffix, "initial", count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        arrays = [
            shard.source.checks(shard.module, suffix, shard.counts.calls)
            for shard in self._module_rows[module]
        ]
        return np.concatenate([np.empty(0, CHECK), *arrays])[:count]

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""
        arrays = [
            shard.source.backward(shard.module, suffix, shard.counts.calls)
            for shard in self._module_rows[module]
        ]
        return np.concatenate([np.empty(0, BACKWARD), *arrays])[:count]

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        for shard in self._module_rows[module]:
            if version < shard.counts.versions:
                return shard.source.weights(shard.module, suffix, version)
            version -= shard.counts.versions
        raise IndexError(f"the weight version is out of bounds by {version + 1}")

    def _concatenated_rows(
        self, arrays: Sequence[Rows], module: int, suffix: str, quantity: str, count: int
    ) -> Rows:
        if len(arrays) == 1:
            return arrays[0]
        info = self._modules[module]
        site = next(site for site in info.sites if site.suffix == suffix)
        return ConcatenatedRows(arrays, (count, width(info, site, quantity)), np.dtype(info.dtype))


def _reopen(
    name: str, shards: Sequence[Shard], sources: Sequence[AppendOnlySource], calls: Sequence[int]
) -> ConcatenatedSource:
    """Open the same shards in another process. They must not have grown: that would move rows."""
    source = ConcatenatedSource(name, shards, sources)
    source.refresh()
    if [len(tables.calls) for tables in source.shard_tables] != list(calls):
        source.close()
        raise TraceFileError(f"{name} has grown since it was opened: open it again")
    return source
