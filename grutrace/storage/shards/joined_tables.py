"""Join the tables of several sources into the tables of one trace.

`union_tables` is for sources with different modules: the parts of a run. `concatenated_tables` is
for sources with the same modules: the ranks of a distributed run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grutrace.records import Array
from grutrace.storage.format.schema import PIECE
from grutrace.storage.format.tables import ModuleCounts, Tables

#: Index of each module of a shard among the modules of all shards.
ModuleIndices = tuple[int, ...]


def union_tables(sources: Sequence[Tables]) -> Tables:
    """Return the tables of one trace with the modules of all sources, and its calls by time."""
    calls, forks, annotations, values = ([] for _ in range(4))
    module_count = string_count = 0
    for tables in sources:
        calls.append(_shift_references(tables.calls, module_count, {"tag": string_count}))
        forks.append(_shift_references(tables.forks, module_count, {}))
        annotations.append(
            _shift_references(tables.annotations, module_count, {"name": string_count})
        )
        values.append(annotation_values(tables, string_count))
        module_count += len(tables.pieces)
        string_count += len(tables.strings)
    strings, characters = _concatenate_strings(sources)
    return Tables(
        calls=np.concatenate(calls)[_in_time_order(calls)],
        forks=np.concatenate(forks),
        annotations=np.concatenate(annotations),
        values=np.concatenate(values),
        strings=strings,
        characters=characters,
        pieces=tuple(pieces for tables in sources for pieces in tables.pieces),
        module_counts=tuple(counts for tables in sources for counts in tables.module_counts),
        closed=all(tables.closed for tables in sources),
    )


def _shift_references(table: Array, module_count: int, string_counts: dict[str, int]) -> Array:
    """Return a copy of a table whose modules and strings follow those of other tables.

    Args:
        table: Calls, forks or annotations.
        module_count: Number of modules of the other tables.
        string_counts: Number of strings of the other tables, by field. Such a field holds the
            number of the string + 1, or 0 for none.
    """
    shifted = table.copy()
    shifted["module"] += np.uint32(module_count)
    for name, string_count in string_counts.items():
        shifted[name][table[name] > 0] += np.uint32(string_count)
    return shifted


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
            counts[index] = _add_counts(counts[index], tables.module_counts[local_index])
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


def _add_counts(first: ModuleCounts, second: ModuleCounts) -> ModuleCounts:
    return ModuleCounts(
        first.calls + second.calls,
        first.rows + second.rows,
        first.sequences + second.sequences,
        first.versions + second.versions,
    )


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
