"""`JoinedSource` reads several sources as one trace; here are the tables of that trace.

`union_tables` is for sources with different modules: the parts of a run. `concatenated_tables` is
for sources with the same modules: the ranks of a distributed run.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from grutrace.records import Array
from grutrace.storage.format.schema import PIECE
from grutrace.storage.format.tables import ModuleCounts, Tables
from grutrace.storage.interfaces import AppendOnlySource

#: Index of each module of a shard among the modules of all shards.
ModuleIndices = tuple[int, ...]


class JoinedSource(ABC):
    """Several sources as one `Source`. Closing it closes them.

    Args:
        name: Name of the trace, for messages.
        sources: The sources, at least one.
    """

    def __init__(self, name: str, sources: Sequence[AppendOnlySource]) -> None:
        self.name, self._sources = name, list(sources)
        self._latest: tuple[Tables, ...] = ()
        self._tables: Tables | None = None

    @property
    def sources(self) -> tuple[AppendOnlySource, ...]:
        """The sources, in order."""
        return tuple(self._sources)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of all sources."""
        return tuple(file for source in self._sources for file in source.files)

    def refresh(self) -> Tables:
        """Return the present tables of all sources."""
        latest = tuple(source.refresh() for source in self._sources)
        unchanged = len(latest) == len(self._latest) and all(
            map(operator.is_, latest, self._latest)
        )
        if self._tables is None or not unchanged:
            self._tables, self._latest = self._join(latest), latest
        return self._tables

    @abstractmethod
    def _join(self, tables: tuple[Tables, ...]) -> Tables:
        """Return the tables of the trace, from those of each source."""

    def close(self) -> None:
        """Close all sources. Closing twice has no effect."""
        for source in self._sources:
            source.close()


def union_tables(sources: Sequence[Tables]) -> Tables:
    """Return the tables of one trace with the modules of all sources, and its calls by time."""
    starts = [0, *accumulate(len(source.pieces) for source in sources)]
    indices = [tuple(range(start, stop)) for start, stop in pairwise(starts)]
    tables = concatenated_tables(sources, indices, starts[-1])
    order = _in_time_order([source.calls for source in sources])
    return replace(tables, calls=tables.calls[order])


def _in_time_order(calls: Sequence[Array]) -> Array:
    """Return the order of all calls by time. The calls of one source keep their order.

    The order within a source determines the rows of its calls. Threads, or a clock that was set
    back, can record a time before that of the preceding call.
    """
    times = [np.maximum.accumulate(source_calls["time"]) for source_calls in calls]
    return np.argsort(np.concatenate(times), kind="stable")


def concatenated_tables(
    shards: Sequence[Tables], module_indices: Sequence[ModuleIndices], module_count: int
) -> Tables:
    """Return the tables that one process would have recorded, one shard after another.

    Args:
        shards: The tables of each shard.
        module_indices: The modules of each shard, as indexes into the modules of all shards.
        module_count: Number of modules of all shards.
    """
    counts = [ModuleCounts(0, 0, 0, 0)] * module_count
    pieces: list[list[Array]] = [[np.empty(0, PIECE)] for _ in range(module_count)]
    calls, forks, annotations, values = ([] for _ in range(4))
    string_count = 0
    for tables, indices in zip(shards, module_indices, strict=True):
        offsets = _Offsets(indices, counts, string_count)
        calls.append(offsets.apply(tables.calls))
        forks.append(offsets.apply(tables.forks))
        annotations.append(offsets.apply(tables.annotations))
        values.append(annotation_values(tables, string_count))
        for local_index, index in enumerate(indices):
            module_pieces = tables.pieces[local_index].copy()
            module_pieces["sequence"] += np.uint64(counts[index].sequences)
            pieces[index].append(module_pieces)
            both = astuple(counts[index]), astuple(tables.module_counts[local_index])
            counts[index] = ModuleCounts(*map(operator.add, *both))
        string_count += len(tables.strings)
    strings, characters = _concatenate_strings(shards)
    return Tables(
        calls=np.concatenate(calls),
        forks=np.concatenate(forks),
        annotations=np.concatenate(annotations),
        values=np.concatenate(values),
        strings=strings,
        characters=characters,
        pieces=tuple(map(np.concatenate, pieces)),
        module_counts=tuple(counts),
        closed=all(tables.closed for tables in shards),
    )


class _Offsets:
    """Offsets from the numbers in the tables of a shard to those in the concatenated tables.

    Args:
        module_indices: The modules of the shard, as indexes into the modules of all shards.
        counts: Counts of each module in the preceding shards.
        string_count: Number of strings in the preceding shards.
    """

    def __init__(
        self, module_indices: ModuleIndices, counts: Sequence[ModuleCounts], string_count: int
    ) -> None:
        module_counts = [counts[index] for index in module_indices]
        self._modules = np.array(module_indices, np.uint32)
        self._sequences = np.array([module.sequences for module in module_counts], np.uint64)
        self._versions = np.array([module.versions for module in module_counts], np.uint32)
        self._string_count = np.uint32(string_count)

    def apply(self, table: Array) -> Array:
        """Return a copy of a table of calls, forks or annotations with shifted numbers."""
        shifted, modules = table.copy(), table["module"]
        for field in table.dtype.names or ():
            if field == "module":
                shifted[field] = self._modules[modules]
            elif field in ("sequence", "parent"):
                shifted[field] += self._sequences[modules]
            elif field == "weights":
                shifted[field] += self._versions[modules]
            elif field in ("tag", "name"):
                shifted[field][table[field] > 0] += self._string_count
        return shifted


def _concatenate_strings(sources: Sequence[Tables]) -> tuple[Array, Array]:
    """Return the strings (the end of each) and the characters of all sources."""
    strings, characters, character_count = [], [], 0
    for tables in sources:
        strings.append(tables.strings + np.uint64(character_count))
        # Characters after the last string would become part of the first string that follows.
        used_characters = int(tables.strings[-1]) if len(tables.strings) else 0
        characters.append(tables.characters[:used_characters])
        character_count += used_characters
    return np.concatenate(strings), np.concatenate(characters)


def annotation_values(tables: Tables, string_count: int) -> Array:
    """Return the annotation values of a source, with string numbers shifted by `string_count`."""
    counts = tables.annotations["count"].astype(np.int64)
    values = tables.values[: int(counts.sum())].copy()
    values[np.repeat(tables.annotations["text"] > 0, counts)] += string_count
    return values
