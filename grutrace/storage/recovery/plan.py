"""How much of a damaged trace is whole: the longest run of calls from the first.

A file that was cut short lacks what lies behind the cut, which is a part of each dataset: chunks
are allocated as they are needed. So where each chunk lies is asked for, and the calls are kept of
which every row and every entry is there. Everything is gone through in blocks.

What to keep of a file that its writer left behind or that was damaged, and how to read it.
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

#: Entries of a table that are looked at together; of pieces and values, one call's at least.
BLOCK_ENTRIES = 1 << 16


@dataclass
class IntactPrefix:
    """What can be kept of a file.

    Attributes:
        counts: By dataset, items.
        closed: Whether the writer closed the file in order.
        lost: By table, entries that were committed and cannot be kept.
        dropped: By dataset, items that are in the file and are not kept.
        reason: Where that which can be kept ends, and why.
    """

    counts: dict[str, int]
    closed: bool
    lost: dict[str, int]
    dropped: dict[str, int]
    reason: str

    @property
    def calls(self) -> int:
        """Calls that can be kept."""
        return self.counts["calls"]

    @property
    def committed(self) -> Array:
        """The counts of a file that holds just this, and is closed."""
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = self.counts[name]
        counts["closed"] = True
        return counts


class PrefixScanner:
    """What there is of a trace in a file.

    Args:
        file: Of the trace, not marked as being written.
        modules: Of its header.
        size: Bytes that the file has.
        limits: By dataset, how many of its items can be read at most.

    Raises:
        FormatError: A dataset is missing, or of another type or shape.
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
        for place, column in dataset_specs(modules).items():
            dataset = get_dataset(file, place)
            found = f"{dataset.dtype} of items {dataset.shape and dataset.shape[1:]}"
            expected = f"{column.dtype} of items {column.item}"
            fits = dataset.shape and (dataset.dtype, dataset.shape[1:]) == (
                column.dtype,
                column.item,
            )
            require(fits, place, expected, found)
            require(dataset.chunks is not None, place, "chunks", "none")
            self._datasets[place] = dataset
            self._scanners[place] = ChunkScanner(dataset, size, limits.get(place))
        self._committed = _read_committed(file, size)
        self._obstacle = ""
        self._reasons: dict[str, str] = {}

    def scan(self) -> IntactPrefix:
        """The longest run of calls from the first that is whole, and what belongs to it.

        Raises:
            FormatError: A table cannot be read where it should be.
        """
        counts = dict.fromkeys(self._datasets, 0)
        counts["strings"], counts["characters"] = self._strings()
        modules = [ModuleExtents(module) for module in self._modules]
        counts["calls"] = self._calls(modules, counts["strings"])
        for module in modules:
            counts |= module.counts()
        sequences = np.array([module.sequences for module in modules], np.uint64)
        counts["forks"] = self._forks(sequences)
        counts["annotations"], counts["values"] = self._annotations(sequences, counts["strings"])
        lost = {
            name: int(self._committed[name]) - counts[name]
            for name in TABLES
            if int(self._committed[name]) > counts[name]
        }
        dropped = {
            place: len(dataset) - counts[place]
            for place, dataset in self._datasets.items()
            if len(dataset) > counts[place]
        }
        closed = bool(self._committed["closed"])
        return IntactPrefix(counts, closed, lost, dropped, self._reason if lost else "")

    def _count_available(self, place: str, count: int) -> int:
        """How many of the first items of a dataset are there. Why not all, is the reason."""
        there = self._scanners[place]
        found = there.count_available(count)
        if found < count:
            self._note(place, there.reason)
        return found

    def _note(self, place: str, reason: str) -> None:
        self._reasons.setdefault(place, reason)

    @property
    def _reason(self) -> str:
        """Why calls end where they do, or else why anything does."""
        place = self._obstacle if self._obstacle in self._reasons else next(iter(self._reasons), "")
        return f"{place}: {self._reasons[place]}" if place else ""

    def _strings(self) -> tuple[int, int]:
        """How many strings are whole, and how many characters they have."""
        count = self._count_available("strings", int(self._committed["strings"]))
        characters = self._count_available("characters", int(self._committed["characters"]))
        kept = last = 0
        while kept < count:
            ends = self._datasets["strings"][kept : min(count, kept + BLOCK_ENTRIES)]
            before = np.concatenate([[np.uint64(last)], ends[:-1]])
            fits = (ends >= before) & (ends <= np.uint64(characters))
            whole = count_leading_true(fits)
            kept, last = kept + whole, int(ends[whole - 1]) if whole else last
            if whole < len(ends):
                self._note("strings", f"string {kept} ends beyond {characters} characters")
                break
        return kept, last

    def _calls(self, modules: list[ModuleExtents], strings: int) -> int:
        """How many calls are whole. What of each module they need, is noted there."""
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
                self._note("calls", f"call {done + cut} has a module or a tag that is not there")
            for number, module in enumerate(modules):
                own = np.flatnonzero(calls["module"][:cut] == number)
                whole = module.advance(calls[own], self._count_available, self._pieces)
                if whole < len(own):
                    cut = int(own[whole])
                    self._obstacle = module.obstacle
            for number, module in enumerate(modules):
                module.accept(int((calls["module"][:cut] == number).sum()))
            done += cut
            if cut < len(calls):
                return done
        self._obstacle = "calls"
        return done

    def _pieces(self, place: str, start: int, stop: int) -> Array:
        return np.asarray(self._datasets[place][start:stop])

    def _forks(self, sequences: Array) -> int:
        count = self._count_available("forks", int(self._committed["forks"]))
        done = 0
        while done < count:
            forks = self._datasets["forks"][done : min(count, done + BLOCK_ENTRIES)]
            fits = _refers_to_kept(forks, sequences, "sequence") & _refers_to_kept(
                forks, sequences, "parent"
            )
            whole = count_leading_true(fits)
            done += whole
            if whole < len(forks):
                break
        return done

    def _annotations(self, sequences: Array, strings: int) -> tuple[int, int]:
        """How many annotations are whole and of calls that are, and how many values they have."""
        count = self._count_available("annotations", int(self._committed["annotations"]))
        values = self._count_available("values", int(self._committed["values"]))
        done = used = 0
        while done < count:
            entries = self._datasets["annotations"][done : min(count, done + BLOCK_ENTRIES)]
            lengths = np.minimum(entries["count"], np.uint64(values + 1)).astype(np.int64)
            ends = used + np.cumsum(lengths)
            entries = entries[
                : max(1, int(np.searchsorted(ends - used, BLOCK_ENTRIES, side="right")))
            ]
            ends = ends[: len(entries)]
            fits = _refers_to_kept(entries, sequences, "sequence") & (ends <= values)
            fits &= (entries["name"] > 0) & (entries["name"] <= strings)
            whole = count_leading_true(fits)
            whole = self._known_texts(entries[:whole], used, strings)
            done, used = done + whole, int(ends[whole - 1]) if whole else used
            if whole < len(entries):
                self._note("annotations", f"item {done} is of what is not whole")
                break
        return done, used

    def _known_texts(self, entries: Array, used: int, strings: int) -> int:
        """How many of these annotations have no text that is not there."""
        lengths = entries["count"].astype(np.int64)
        values = self._datasets["values"][used : used + int(lengths.sum())]
        known = (values >= 0) & (values < strings) | ~np.repeat(entries["text"] > 0, lengths)
        last = np.searchsorted(np.cumsum(lengths), count_leading_true(known), side="right")
        return len(entries) if known.all() else int(last)


def _read_committed(file: h5py.File, size: int) -> Any:
    dataset = get_dataset(file, "committed")
    found = f"{dataset.dtype} of shape {dataset.shape}"
    require((dataset.dtype, dataset.shape) == (COMMITTED, ()), "committed", COMMITTED, found)
    place = dataset.id.get_offset()
    require(
        place is not None and place + COMMITTED.itemsize <= size,
        "committed",
        "counts within the file",
        f"a file of {size} bytes",
    )
    return dataset[()]


def _refers_to_kept(table: Array, sequences: Array, name: str) -> Array:
    """(entries,) whether each is of a sequence that is kept."""
    known = table["module"] < len(sequences)
    begun = sequences[np.where(known, table["module"], 0)] if len(sequences) else 0
    return known & (table[name] < begun)


#: Bytes of the chunks of a dataset that HDF5 keeps: of a packed one, some that were unpacked.
CHUNK_CACHE = 8 * 1024 * 1024


@contextlib.contextmanager
def open_damaged(path: Path, *, repair: bool) -> Iterator[tuple[RepairedFile, h5py.File]]:
    """A file as if its writer had closed it; with half-written structures, or without."""
    with (
        translate_read_errors(path),
        RepairedFile(path, repair=repair) as unmarked,
        open_repaired(unmarked, CHUNK_CACHE) as file,
    ):
        yield unmarked, file


@dataclass
class RecoveryPlan:
    """What to keep of a file, and how to read it.

    Attributes:
        kept: What can be kept.
        mend: Whether half-written structures are read.
        mended: How many there were.
        limits: By dataset, how many items can be read, where it has turned out to be fewer than are
            there.
    """

    kept: IntactPrefix
    repair: bool
    repaired: int
    limits: dict[str, int]


def make_plan(source: Path, *, repair: bool, limits: dict[str, int]) -> RecoveryPlan:
    """Look what can be kept.

    Raises:
        TraceFileError: Nothing.
    """
    with open_damaged(source, repair=repair) as (unmarked, file):
        kept = PrefixScanner(file, read_header(file).modules, unmarked.size, limits).scan()
        if not kept.calls and kept.lost:
            raise FormatError("calls", "at least one that is whole", f"none: {kept.reason}")
        return RecoveryPlan(kept, repair, len(unmarked.repaired), limits)


def best_plan(source: Path) -> RecoveryPlan:
    """What to keep of a file; with half-written structures only if that keeps more.

    Raises:
        TraceFileError: Nothing can be kept.
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
