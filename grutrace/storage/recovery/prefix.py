"""Find the longest intact prefix of a damaged trace.

HDF5 allocates chunks as they are needed, so a truncated file lacks a part of each dataset. The
scan looks up the address of each chunk, and keeps the leading calls whose rows and entries are all
in the file. Tables are read in blocks, so memory is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.schema import COMMITTED, TABLES, check_dataset, dataset_specs
from grutrace.storage.hdf5.errors import require
from grutrace.storage.hdf5.safe_access import get_dataset
from grutrace.storage.recovery.scan import ChunkScanner, ModuleExtents, count_leading_true

#: Entries of a table that are read together. Pieces and values are read for at least one call.
BLOCK_ENTRIES = 1 << 16


@dataclass
class IntactPrefix:
    """The part of a file that can be kept.

    Attributes:
        counts: Number of items of each dataset, by path.
        closed: Whether the writer closed the file in order.
        lost: Number of committed entries that cannot be kept, by table.
        dropped: Number of items in the file that are not kept, by dataset path.
        reason: Where the intact prefix ends, and why.
    """

    counts: dict[str, int]
    closed: bool
    lost: dict[str, int]
    dropped: dict[str, int]
    reason: str

    @property
    def calls(self) -> int:
        """Number of calls that can be kept."""
        return self.counts["calls"]

    @property
    def committed(self) -> Array:
        """The committed counts of a closed file with this content."""
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = self.counts[name]
        counts["closed"] = True
        return counts


class PrefixScanner:
    """Scans a file for the longest intact prefix of its trace.

    Args:
        file: The file, opened without its writer flag.
        modules: Modules of its header.
        size: Bytes of the file.
        limits: Number of readable items of a dataset, by path, for datasets where a read failed.

    Raises:
        FormatError: A dataset is missing, or has another type or shape.
    """

    def __init__(
        self,
        file: h5py.File,
        modules: Sequence[ModuleInfo],
        size: int,
        limits: dict[str, int],
    ) -> None:
        self._modules = modules
        self._datasets: dict[str, h5py.Dataset] = {}
        self._scanners: dict[str, ChunkScanner] = {}
        for path, spec in dataset_specs(modules).items():
            dataset = get_dataset(file, path)
            require(dataset.shape, path, "an array", "a scalar or nothing")
            check_dataset(dataset, path, spec)
            require(dataset.chunks is not None, path, "chunks", "none")
            self._datasets[path] = dataset
            self._scanners[path] = ChunkScanner(dataset, size, limits.get(path))
        self._committed = _read_committed(file, size)
        self._obstacle = ""
        self._reasons: dict[str, str] = {}

    def scan(self) -> IntactPrefix:
        """Find the leading calls that are complete, and the items that belong to them.

        Raises:
            FormatError: A table cannot be read.
        """
        counts = dict.fromkeys(self._datasets, 0)
        counts["strings"], counts["characters"] = self._scan_strings()
        modules = [ModuleExtents(module) for module in self._modules]
        counts["calls"] = self._scan_calls(modules, counts["strings"])
        for module in modules:
            counts |= module.counts()
        sequences = np.array([module.sequences for module in modules], np.uint64)
        counts["forks"] = self._scan_forks(sequences)
        counts["annotations"], counts["values"] = self._scan_annotations(
            sequences, counts["strings"]
        )
        lost = {
            name: int(self._committed[name]) - counts[name]
            for name in TABLES
            if int(self._committed[name]) > counts[name]
        }
        dropped = {
            path: len(dataset) - counts[path]
            for path, dataset in self._datasets.items()
            if len(dataset) > counts[path]
        }
        closed = bool(self._committed["closed"])
        return IntactPrefix(counts, closed, lost, dropped, self._reason if lost else "")

    def _count_available(self, path: str, count: int) -> int:
        """Count the available leading items of a dataset. Note the reason if some are missing."""
        scanner = self._scanners[path]
        available = scanner.count_available(count)
        if available < count:
            self._note_reason(path, scanner.reason)
        return available

    def _note_reason(self, path: str, reason: str) -> None:
        self._reasons.setdefault(path, reason)

    @property
    def _reason(self) -> str:
        """The reason for the end of the calls, or else for the end of any dataset."""
        path = self._obstacle if self._obstacle in self._reasons else next(iter(self._reasons), "")
        return f"{path}: {self._reasons[path]}" if path else ""

    def _scan_strings(self) -> tuple[int, int]:
        """Count the intact strings and their characters."""
        count = self._count_available("strings", int(self._committed["strings"]))
        characters = self._count_available("characters", int(self._committed["characters"]))
        position = last_end = 0
        while position < count:
            ends = self._datasets["strings"][position : min(count, position + BLOCK_ENTRIES)]
            starts = np.concatenate([[np.uint64(last_end)], ends[:-1]])
            is_intact = (ends >= starts) & (ends <= np.uint64(characters))
            intact = count_leading_true(is_intact)
            position, last_end = position + intact, int(ends[intact - 1]) if intact else last_end
            if intact < len(ends):
                reason = f"string {position} ends beyond {characters} characters"
                self._note_reason("strings", reason)
                break
        return position, last_end

    def _scan_calls(self, modules: list[ModuleExtents], strings: int) -> int:
        """Count the complete calls, and accept them in `modules`."""
        count = self._count_available("calls", int(self._committed["calls"]))
        position = 0
        while position < count:
            calls = self._datasets["calls"][position : min(count, position + BLOCK_ENTRIES)]
            batches = np.cumsum(calls["batch"], dtype=np.int64)
            calls = calls[: max(1, int(np.searchsorted(batches, BLOCK_ENTRIES, side="right")))]
            is_intact = (calls["module"] < len(modules)) & (calls["tag"] <= strings)
            intact = count_leading_true(is_intact)
            if intact < len(calls):
                self._obstacle = "calls"
                reason = f"call {position + intact} refers to a missing module or tag"
                self._note_reason("calls", reason)
            for index, module in enumerate(modules):
                rows = np.flatnonzero(calls["module"][:intact] == index)
                complete = module.advance(calls[rows], self._count_available, self._read_pieces)
                if complete < len(rows):
                    intact = int(rows[complete])
                    self._obstacle = module.obstacle
            for index, module in enumerate(modules):
                module.accept(int((calls["module"][:intact] == index).sum()))
            position += intact
            if intact < len(calls):
                return position
        self._obstacle = "calls"
        return position

    def _read_pieces(self, path: str, start: int, stop: int) -> Array:
        return np.asarray(self._datasets[path][start:stop])

    def _scan_forks(self, sequences: Array) -> int:
        count = self._count_available("forks", int(self._committed["forks"]))
        position = 0
        while position < count:
            forks = self._datasets["forks"][position : min(count, position + BLOCK_ENTRIES)]
            is_intact = _refers_to_kept(forks, sequences, "sequence")
            is_intact &= _refers_to_kept(forks, sequences, "parent")
            intact = count_leading_true(is_intact)
            position += intact
            if intact < len(forks):
                break
        return position

    def _scan_annotations(self, sequences: Array, strings: int) -> tuple[int, int]:
        """Count the intact annotations of kept sequences, and their values."""
        count = self._count_available("annotations", int(self._committed["annotations"]))
        values = self._count_available("values", int(self._committed["values"]))
        position = used_values = 0
        while position < count:
            stop = min(count, position + BLOCK_ENTRIES)
            annotations = self._datasets["annotations"][position:stop]
            lengths = np.minimum(annotations["count"], np.uint64(values + 1)).astype(np.int64)
            totals = np.cumsum(lengths)
            block = max(1, int(np.searchsorted(totals, BLOCK_ENTRIES, side="right")))
            annotations, ends = annotations[:block], used_values + totals[:block]
            is_intact = _refers_to_kept(annotations, sequences, "sequence") & (ends <= values)
            is_intact &= (annotations["name"] > 0) & (annotations["name"] <= strings)
            intact = count_leading_true(is_intact)
            intact = self._count_with_texts(annotations[:intact], used_values, strings)
            position += intact
            used_values = int(ends[intact - 1]) if intact else used_values
            if intact < len(annotations):
                self._note_reason("annotations", f"item {position} refers to missing data")
                break
        return position, used_values

    def _count_with_texts(self, annotations: Array, start: int, strings: int) -> int:
        """Count the leading annotations whose strings are all available.

        Args:
            annotations: Entries of the table of annotations.
            start: Index of the first value of the first annotation.
            strings: Number of available strings.
        """
        lengths = annotations["count"].astype(np.int64)
        values = self._datasets["values"][start : start + int(lengths.sum())]
        is_number = ~np.repeat(annotations["text"] > 0, lengths)
        is_intact = is_number | ((values >= 0) & (values < strings))
        if is_intact.all():
            return len(annotations)
        intact_values = count_leading_true(is_intact)
        return int(np.searchsorted(np.cumsum(lengths), intact_values, side="right"))


def _read_committed(file: h5py.File, size: int) -> Any:
    dataset = get_dataset(file, "committed")
    actual = f"{dataset.dtype} of shape {dataset.shape}"
    require((dataset.dtype, dataset.shape) == (COMMITTED, ()), "committed", COMMITTED, actual)
    offset = dataset.id.get_offset()
    require(
        offset is not None and offset + COMMITTED.itemsize <= size,
        "committed",
        "counts within the file",
        f"a file of {size} bytes",
    )
    return dataset[()]


def _refers_to_kept(table: Array, sequences: Array, field: str) -> Array:
    """Return whether each entry refers to a kept sequence, (entries,).

    Args:
        table: Forks or annotations.
        sequences: (modules,) number of kept sequences of each module.
        field: The field that holds the number of the sequence.
    """
    has_module = table["module"] < len(sequences)
    counts = sequences[np.where(has_module, table["module"], 0)] if len(sequences) else 0
    return has_module & (table[field] < counts)
