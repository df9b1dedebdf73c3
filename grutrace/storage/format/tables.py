"""The tables of a trace at one moment, and a reader of them in a file.

Tables are small compared with the rows, and hold the number of committed rows. `TableReader` reads
them up to the committed counts; later reads fetch only new entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.schema import (
    COMMITTED,
    PIECE,
    TABLES,
    DatasetSpec,
    call_tables,
    check_dataset,
    pieces_path,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.hdf5.errors import require
from grutrace.storage.hdf5.handle import SharedReadHandle


@dataclass(frozen=True)
class ModuleCounts:
    """The numbers of calls, rows, sequences and weight versions of one module.

    Attributes:
        calls: Calls; the length of `checks`.
        rows: Rows of each quantity.
        sequences: Sequences that have started; the length of `initial`.
        versions: Versions of the weights.
    """

    calls: int
    rows: int
    sequences: int
    versions: int


@dataclass(frozen=True)
class ShardCalls:
    """The calls of one of several processes.

    Attributes:
        rank: Rank of the process.
        calls: Number of its calls.
        closed: Whether the process closed its file in order.
    """

    rank: int
    calls: int
    closed: bool


@dataclass(frozen=True, eq=False)
class SelectedSequences:
    """Properties of selected sequences that the tables of the selection lack, for one module.

    Attributes:
        numbers: (sequences,) their numbers in the trace that they were selected from.
        is_fork: (sequences,) whether they began inside another sequence, selected or not.
    """

    numbers: Array
    is_fork: Array


@dataclass(frozen=True)
class Tables:
    """A consistent prefix of a trace, without its rows. Types are those of `schema`.

    Attributes:
        calls: (calls,), of all modules.
        forks: (forks,)
        annotations: (annotations,)
        values: (values,) float64
        strings: (strings,) uint64, the end of each string in `characters`.
        characters: (characters,) uint8
        pieces: By module, (pieces,).
        module_counts: By module, its counts.
        closed: Whether the trace is complete.
        shards: The processes that made the calls, in the order of `calls`. Empty for the trace of
            a single process.
        selected: By module, the sequences of a selection. Empty for a whole trace.
    """

    calls: Array
    forks: Array
    annotations: Array
    values: Array
    strings: Array
    characters: Array
    pieces: tuple[Array, ...]
    module_counts: tuple[ModuleCounts, ...]
    closed: bool
    shards: tuple[ShardCalls, ...] = ()
    selected: tuple[SelectedSequences, ...] = ()

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All strings, by number."""
        data = self.characters.tobytes()
        bounds = pairwise([0, *self.strings.tolist()])
        return tuple(data[start:end].decode("utf-8", "replace") for start, end in bounds)


def count_module(calls: Array, pieces: Array) -> ModuleCounts:
    """Return the counts of a module, from its calls and pieces."""
    return ModuleCounts(
        calls=len(calls),
        rows=int(pieces["steps"].sum(dtype=np.uint64)),
        sequences=int(pieces["sequence"].max()) + 1 if len(pieces) else 0,
        versions=int(calls["weights"].max()) + 1 if len(calls) else 0,
    )


def dataset_lengths(tables: Tables, modules: Sequence[ModuleInfo]) -> dict[str, int]:
    """Return the number of items of each growing dataset, by its path in the file."""
    counts = {name: len(getattr(tables, name)) for name in TABLES}
    for module, pieces, module_counts in zip(
        modules, tables.pieces, tables.module_counts, strict=True
    ):
        counts[pieces_path(module)] = len(pieces)
        for site in module.sites:
            for quantity in site.quantities:
                counts[quantity_path(module, site, quantity)] = module_counts.rows
            counts[site_path(module, site.suffix, "initial")] = module_counts.sequences
            for name in call_tables(site):
                counts[site_path(module, site.suffix, name)] = module_counts.calls
            for name in weight_shapes(module, site):
                counts[site_path(module, site.suffix, name)] = module_counts.versions
    return counts


def check_tables(tables: Tables, modules: Sequence[ModuleInfo]) -> None:
    """Check every number in the tables that refers to another entry.

    Raises:
        FormatError: A number refers to an entry that does not exist.
    """
    for module, pieces in zip(modules, tables.pieces, strict=True):
        _check_pieces(pieces, pieces_path(module))
    _check_texts(tables)
    _check_references(tables, len(modules))
    _check_values(tables)


def _check_texts(tables: Tables) -> None:
    ends, characters = tables.strings, len(tables.characters)
    require(np.all(ends[1:] >= ends[:-1]), "strings", "ends that never decrease", "decreasing ends")
    require(
        not len(ends) or ends[-1] <= characters,
        "strings",
        f"ends within {characters} characters",
        ends[-1:],
    )
    for table, field in (("calls", "tag"), ("annotations", "name")):
        _require_below(getattr(tables, table)[field], 1 + len(ends), f"{table}.{field}")
    require(np.all(tables.annotations["name"] > 0), "annotations.name", "a name", "none")


def _check_references(tables: Tables, modules: int) -> None:
    for name in ("calls", "forks", "annotations"):
        _require_below(getattr(tables, name)["module"], modules, f"{name}.module")
    _require_below(tables.forks["steps"], 1 << 63, "forks.steps")
    sequences = np.array([counts.sequences for counts in tables.module_counts], np.uint64)
    for name, fields in (("forks", ("sequence", "parent")), ("annotations", ("sequence",))):
        table = getattr(tables, name)
        for field in fields:
            is_invalid = table[field] >= sequences[table["module"]]
            require(
                not is_invalid.any(),
                f"{name}.{field}",
                "a sequence that has begun",
                table[field][is_invalid][:1],
            )


def _check_values(tables: Tables) -> None:
    counts, values = tables.annotations["count"], tables.values
    # Check each count first: the sum of huge counts could overflow.
    _require_below(counts, 1 + len(values), "annotations.count")
    total = int(counts.sum(dtype=np.float64))
    require(total <= len(values), "annotations.count", f"at most {len(values)} values", total)
    is_text = np.repeat(tables.annotations["text"] > 0, counts.astype(np.int64))
    numbers = values[:total][is_text]
    is_valid = (numbers >= 0) & (numbers < len(tables.strings)) & (numbers == np.floor(numbers))
    require(is_valid.all(), "values", "the number of a string", numbers[~is_valid][:1])


def _check_pieces(pieces: Array, path: str) -> None:
    """Check that each sequence begins with the next unused number, so that none is skipped."""
    numbers = pieces["sequence"]
    if not len(numbers):
        return
    next_numbers = np.maximum.accumulate(numbers) + np.uint64(1)
    require(numbers[0] == 0, f"{path}.sequence", 0, numbers[0])
    is_skip = numbers[1:] > next_numbers[:-1]
    skipped = f"{numbers[1:][is_skip][:1]}"
    require(not is_skip.any(), f"{path}.sequence", "no skipped number", skipped)


def _require_below(numbers: Array, bound: int, where: str) -> None:
    is_invalid = numbers >= bound
    require(not is_invalid.any(), where, f"below {bound}", numbers[is_invalid][:1])


#: The highest compression ratio of gzip.
MAX_GZIP_RATIO = 1032


class TableReader:
    """Reads the tables of a file that may grow. Call while the handle is acquired.

    Args:
        handle: Handle of the file.
        modules: Modules of its header.
    """

    def __init__(self, handle: SharedReadHandle, modules: Sequence[ModuleInfo]) -> None:
        self._handle = handle
        self._modules = modules
        self._counts: Any = None
        self._available_bytes = 0
        self._tables: Tables | None = None

    def read(self) -> Tables:
        """Read the tables up to the counts that are committed now.

        Raises:
            FormatError: The file is damaged.
        """
        counts = self._stable_counts()
        if self._tables is None or counts != self._counts:
            self._tables, self._counts = self._read_up_to(counts), counts
        return self._tables

    def _stable_counts(self) -> Any:
        # A writer may be writing the counts at this moment. Accept counts that are read twice.
        counts = self._handle.scalar("committed", COMMITTED)[()]
        while (new_counts := self._handle.scalar("committed", COMMITTED)[()]) != counts:
            counts = new_counts
        return counts

    def _read_up_to(self, counts: Any) -> Tables:
        previous = self._tables
        # Each table fits into the file, but a damaged file could store many at the same address.
        self._available_bytes = self._handle.size
        tables: dict[str, Any] = {
            name: self._read_table(name, int(counts[name]), dtype, getattr(previous, name, None))
            for name, dtype in TABLES.items()
        }
        calls = tables["calls"]
        pieces, module_counts = [], []
        for index, module in enumerate(self._modules):
            module_calls = calls[calls["module"] == index]
            count = int(module_calls["batch"].sum(dtype=np.uint64))
            previous_pieces = previous.pieces[index] if previous else None
            pieces.append(self._read_table(pieces_path(module), count, PIECE, previous_pieces))
            module_counts.append(count_module(module_calls, pieces[-1]))
        result = Tables(
            **tables,
            pieces=tuple(pieces),
            module_counts=tuple(module_counts),
            closed=bool(counts["closed"]),
        )
        check_tables(result, self._modules)
        return result

    def _read_table(self, path: str, count: int, dtype: Any, previous: Array | None) -> Array:
        """Read the first items of a table.

        Args:
            path: Path of the table.
            count: Number of items.
            dtype: Type of an item.
            previous: The items of the last read, which are not read again.
        """
        start = 0 if previous is None else len(previous)
        if previous is not None and start == count:
            return previous
        dataset = self._handle.dataset(path, count)
        check_dataset(dataset, path, DatasetSpec(dtype))
        compressed = dataset.id.get_create_plist().get_nfilters()
        self._available_bytes -= count * dtype.itemsize // (MAX_GZIP_RATIO if compressed else 1)
        fits = self._available_bytes >= 0
        require(fits, path, "tables that fit into the file together", f"{count} items")
        items = np.asarray(dataset[start:count], dtype)
        table = items if previous is None else np.concatenate([previous, items])
        table.flags.writeable = False
        return table
