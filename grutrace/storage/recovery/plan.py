"""Find the longest intact prefix of a damaged trace, and plan how to read it.

HDF5 allocates chunks as they are needed, so a truncated file lacks a part of each dataset. The
scan looks up the address of each chunk, and keeps the leading calls whose rows and entries are all
in the file. Tables are read in blocks, so memory is bounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import TraceFileError
from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.header import read_header
from grutrace.storage.format.schema import COMMITTED, TABLES, dataset_specs
from grutrace.storage.hdf5.errors import FormatError, require, translate_read_errors
from grutrace.storage.hdf5.safe_access import get_dataset
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired
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
            found = f"{dataset.dtype} of items {dataset.shape and dataset.shape[1:]}"
            expected = f"{spec.dtype} of items {spec.item_shape}"
            fits = dataset.shape and (dataset.dtype, dataset.shape[1:]) == (
                spec.dtype,
                spec.item_shape,
            )
            require(fits, path, expected, found)
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
        found = scanner.count_available(count)
        if found < count:
            self._note(path, scanner.reason)
        return found

    def _note(self, path: str, reason: str) -> None:
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
        kept = last = 0
        while kept < count:
            ends = self._datasets["strings"][kept : min(count, kept + BLOCK_ENTRIES)]
            before = np.concatenate([[np.uint64(last)], ends[:-1]])
            fits = (ends >= before) & (ends <= np.uint64(characters))
            intact = count_leading_true(fits)
            kept, last = kept + intact, int(ends[intact - 1]) if intact else last
            if intact < len(ends):
                self._note("strings", f"string {kept} ends beyond {characters} characters")
                break
        return kept, last

    def _scan_calls(self, modules: list[ModuleExtents], strings: int) -> int:
        """Count the complete calls, and accept them in `modules`."""
        count = self._count_available("calls", int(self._committed["calls"]))
        done = 0
        while done < count:
            calls = self._datasets["calls"][done : min(count, done + BLOCK_ENTRIES)]
            batches = np.cumsum(calls["batch"], dtype=np.int64)
            calls = calls[: max(1, int(np.searchsorted(batches, BLOCK_ENTRIES, side="right")))]
            known = (calls["module"] < len(modules)) & (calls["tag"] <= strings)
            cut = count_leading_true(known)
            if cut < len(calls):
                self._obstacle = "calls"
                self._note("calls", f"call {done + cut} refers to a missing module or tag")
            for number, module in enumerate(modules):
                own = np.flatnonzero(calls["module"][:cut] == number)
                intact = module.advance(calls[own], self._count_available, self._read_pieces)
                if intact < len(own):
                    cut = int(own[intact])
                    self._obstacle = module.obstacle
            for number, module in enumerate(modules):
                module.accept(int((calls["module"][:cut] == number).sum()))
            done += cut
            if cut < len(calls):
                return done
        self._obstacle = "calls"
        return done

    def _read_pieces(self, path: str, start: int, stop: int) -> Array:
        return np.asarray(self._datasets[path][start:stop])

    def _scan_forks(self, sequences: Array) -> int:
        count = self._count_available("forks", int(self._committed["forks"]))
        done = 0
        while done < count:
            forks = self._datasets["forks"][done : min(count, done + BLOCK_ENTRIES)]
            fits = _refers_to_kept(forks, sequences, "sequence") & _refers_to_kept(
                forks, sequences, "parent"
            )
            intact = count_leading_true(fits)
            done += intact
            if intact < len(forks):
                break
        return done

    def _scan_annotations(self, sequences: Array, strings: int) -> tuple[int, int]:
        """Count the intact annotations of kept sequences, and their values."""
        count = self._count_available("annotations", int(self._committed["annotations"]))
        values = self._count_available("values", int(self._committed["values"]))
        done = used = 0
        while done < count:
            annotations = self._datasets["annotations"][done : min(count, done + BLOCK_ENTRIES)]
            lengths = np.minimum(annotations["count"], np.uint64(values + 1)).astype(np.int64)
            ends = used + np.cumsum(lengths)
            annotations = annotations[
                : max(1, int(np.searchsorted(ends - used, BLOCK_ENTRIES, side="right")))
            ]
            ends = ends[: len(annotations)]
            fits = _refers_to_kept(annotations, sequences, "sequence") & (ends <= values)
            fits &= (annotations["name"] > 0) & (annotations["name"] <= strings)
            intact = count_leading_true(fits)
            intact = self._count_known_texts(annotations[:intact], used, strings)
            done, used = done + intact, int(ends[intact - 1]) if intact else used
            if intact < len(annotations):
                self._note("annotations", f"item {done} refers to missing data")
                break
        return done, used

    def _count_known_texts(self, annotations: Array, used: int, strings: int) -> int:
        """Count the leading annotations whose strings are all available."""
        lengths = annotations["count"].astype(np.int64)
        values = self._datasets["values"][used : used + int(lengths.sum())]
        known = (values >= 0) & (values < strings) | ~np.repeat(annotations["text"] > 0, lengths)
        last = np.searchsorted(np.cumsum(lengths), count_leading_true(known), side="right")
        return len(annotations) if known.all() else int(last)


def _read_committed(file: h5py.File, size: int) -> Any:
    dataset = get_dataset(file, "committed")
    found = f"{dataset.dtype} of shape {dataset.shape}"
    require((dataset.dtype, dataset.shape) == (COMMITTED, ()), "committed", COMMITTED, found)
    offset = dataset.id.get_offset()
    require(
        offset is not None and offset + COMMITTED.itemsize <= size,
        "committed",
        "counts within the file",
        f"a file of {size} bytes",
    )
    return dataset[()]


def _refers_to_kept(table: Array, sequences: Array, name: str) -> Array:
    """Return whether each entry refers to a kept sequence, (entries,)."""
    known = table["module"] < len(sequences)
    begun = sequences[np.where(known, table["module"], 0)] if len(sequences) else 0
    return known & (table[name] < begun)


#: Bytes of the chunk cache of each dataset: a few uncompressed chunks.
CHUNK_CACHE = 8 * 1024 * 1024


@contextlib.contextmanager
def open_damaged(path: Path, *, repair: bool) -> Iterator[tuple[RepairedFile, h5py.File]]:
    """Open a file as if its writer had closed it.

    Args:
        path: Path of the file.
        repair: Whether to accept half-written structures by correcting their checksums.

    Raises:
        TraceFileError: The file cannot be read.
    """
    with (
        translate_read_errors(path),
        RepairedFile(path, repair=repair) as unmarked,
        open_repaired(unmarked, CHUNK_CACHE) as file,
    ):
        yield unmarked, file


@dataclass
class RecoveryPlan:
    """Which part of a file to keep, and how to read it.

    Attributes:
        kept: The intact prefix.
        repair: Whether half-written structures are accepted.
        repaired: Number of half-written structures.
        limits: Number of readable items of a dataset, by path, for datasets where a read failed.
    """

    kept: IntactPrefix
    repair: bool
    repaired: int
    limits: dict[str, int]


def make_plan(source: Path, *, repair: bool, limits: dict[str, int]) -> RecoveryPlan:
    """Scan a file for its intact prefix.

    Args:
        source: Path of the file.
        repair: Whether to accept half-written structures.
        limits: As for `PrefixScanner`.

    Raises:
        TraceFileError: No call is intact, or the file cannot be read.
    """
    with open_damaged(source, repair=repair) as (unmarked, file):
        kept = PrefixScanner(file, read_header(file).modules, unmarked.size, limits).scan()
        if not kept.calls and kept.lost:
            raise FormatError("calls", "at least one intact call", f"none: {kept.reason}")
        return RecoveryPlan(kept, repair, len(unmarked.repaired), limits)


def best_plan(source: Path) -> RecoveryPlan:
    """Plan the recovery of a file. Accept half-written structures only if that keeps more calls.

    Raises:
        TraceFileError: No call is intact, or the file cannot be read.
    """
    plan, error = None, None
    try:
        plan = make_plan(source, repair=False, limits={})
        if not plan.kept.lost:
            return plan
    except TraceFileError as found:
        error = found
    with contextlib.suppress(TraceFileError):
        other = make_plan(source, repair=True, limits={})
        if plan is None or other.kept.calls > plan.kept.calls:
            return other
    if plan is None:
        assert error is not None
        raise error
    return plan
