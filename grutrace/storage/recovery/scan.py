"""What the calls of one module need of its datasets, and how many calls have it all.

How many of the first items of a dataset lie within a file that may have been cut short.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import h5py
import numpy as np

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.schema import pieces_path, quantity_path, site_path, weight_shapes
from grutrace.storage.hdf5.errors import H5PY_ERRORS, short_message


@dataclass
class ModuleExtents:
    """How much of one module the calls so far need.

    Attributes:
        module: The module.
        calls: Its calls so far.
        pieces: Their pieces.
        rows: The steps of these.
        sequences: Sequences that have begun.
        versions: Versions of the weights.
        obstacle: Where the next call is not whole, if one is not.
    """

    module: ModuleInfo
    calls: int = 0
    pieces: int = 0
    rows: int = 0
    sequences: int = 0
    versions: int = 0
    obstacle: str = ""
    #: The same after each call that is looked at now: (calls, 5).
    _after: Array = field(default_factory=lambda: np.empty((0, 5), np.int64))

    def advance(
        self,
        calls: Array,
        count_available: Callable[[str, int], int],
        read: Callable[[str, int, int], Array],
    ) -> int:
        """Look at the module's next calls; how many of them are whole.

        Args:
            calls: Entries of the table of calls.
            upto: Tells how many of the first items of a dataset are there, of so many.
            read: Reads items of a dataset.
        """
        place = pieces_path(self.module)
        ends = self.pieces + np.cumsum(calls["batch"], dtype=np.int64)
        last = int(ends[-1]) if len(ends) else self.pieces
        there = count_available(place, last)
        pieces = read(place, self.pieces, there)
        begun = self._begun(pieces)
        there = self.pieces + len(begun)
        whole = int(np.searchsorted(ends, there, side="right"))
        self.obstacle = place
        ends = ends[:whole]
        # Before the first piece there are the rows and sequences of the calls before.
        rows = np.concatenate([[0], np.cumsum(pieces["steps"], dtype=np.int64)]) + self.rows
        begun = np.concatenate([[self.sequences], begun])
        versions = np.maximum.accumulate(
            np.concatenate([[self.versions], calls["weights"][:whole].astype(np.int64) + 1])
        )[1:]
        self._after = np.stack(
            [
                self.calls + 1 + np.arange(whole),
                ends,
                rows[ends - self.pieces],
                begun[ends - self.pieces],
                versions,
            ],
            axis=1,
        )
        for place, column in self._columns().items():
            needed = self._after[:whole, column]
            there = count_available(place, int(needed[-1])) if whole else 0
            if whole and there < needed[-1]:
                whole = int(np.searchsorted(needed, there, side="right"))
                self.obstacle = place
        return whole

    def accept(self, calls: int) -> None:
        """Keep this many of the calls that were looked at."""
        if calls:
            self.calls, self.pieces, self.rows, self.sequences, self.versions = self._after[
                calls - 1
            ].tolist()

    def counts(self) -> dict[str, int]:
        """By dataset of the module, how many items are needed."""
        have = (self.calls, self.pieces, self.rows, self.sequences, self.versions)
        found = {place: have[column] for place, column in self._columns().items()}
        return {pieces_path(self.module): self.pieces, **found}

    def _begun(self, pieces: Array) -> Array:
        """(pieces,) how many sequences have begun by each; up to the first that leaves one out."""
        numbers = np.minimum(pieces["sequence"], np.uint64(2**62)).astype(np.int64)
        begun = np.maximum.accumulate(np.concatenate([[self.sequences], numbers + 1]))
        return begun[1 : 1 + count_leading_true(numbers <= begun[:-1])]

    def _columns(self) -> dict[str, int]:
        """By dataset, which of the counts is its length: calls, rows, sequences or versions."""
        columns = {}
        for site in self.module.sites:
            for quantity in site.quantities:
                columns[quantity_path(self.module, site, quantity)] = 2
            columns[site_path(self.module, site.suffix, "initial")] = 3
            columns[site_path(self.module, site.suffix, "checks")] = 0
            for name in weight_shapes(self.module, site):
                columns[site_path(self.module, site.suffix, name)] = 4
        return columns


def count_leading_true(mask: Array) -> int:
    """How many are true before the first that is not."""
    return len(mask) if mask.all() else int(np.argmin(mask))


class ChunkScanner:
    """Looks for the chunks of a dataset, as far as is asked.

    Args:
        dataset: Of a file that is not marked as being written.
        size: Bytes that the file has.
        limit: How many items can be read at most, if it is known; not because of where they lie.

    Attributes:
        reason: Why no more items are there than were found; empty if none was missed yet.
    """

    def __init__(self, dataset: h5py.Dataset, size: int, limit: int | None) -> None:
        self._dataset, self._size = dataset, size
        self._length = len(dataset) if limit is None else min(limit, len(dataset))
        self._limited = limit is not None
        self._known = 0
        self._chunk: tuple[int, ...] = dataset.chunks
        self._compressed = dataset.id.get_create_plist().get_nfilters() > 0
        #: Bytes.
        self._item_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
        self.reason = ""

    def count_available(self, count: int) -> int:
        """How many of the first `count` items are there."""
        wanted = min(count, self._length)
        if not self._item_bytes:
            return wanted
        while self._known < wanted and not self.reason:
            found = 0 if self._known % self._chunk[0] else self._count_in_row_of_chunks(self._known)
            self._known += found
            if not found and not self.reason:
                self.reason = (
                    f"item {self._known} lies beyond the end of the file, which has "
                    f"{self._size} bytes"
                )
        if wanted < count and not self.reason:
            cannot = "cannot be read" if self._limited else "is not there"
            self.reason = f"item {wanted} {cannot}"
        return min(count, self._known)

    def _count_in_row_of_chunks(self, first: int) -> int:
        """How many items, from the first of a chunk on, are there."""
        rest = [
            range(0, size, step)
            for size, step in zip(self._dataset.shape[1:], self._chunk[1:], strict=True)
        ]
        items = min(self._chunk[0], self._length - first)
        for others in itertools.product(*rest):
            items = min(items, self._count_in_chunk(first, others, items))
        return items

    def _count_in_chunk(self, first: int, others: tuple[int, ...], items: int) -> int:
        try:
            info = self._dataset.id.get_chunk_info_by_coord((first, *others))
        except H5PY_ERRORS as error:
            self.reason = f"where item {first} lies cannot be read: {short_message(error)}"
            return 0
        if info.byte_offset is None:
            self.reason = f"item {first} was never written"
            return 0
        start = int(info.byte_offset)
        if self._compressed:
            return items if start + int(info.size) <= self._size else 0
        # A writer that died may not have written the unused end of a chunk.
        item: int = math.prod(self._chunk[1:]) * self._dataset.dtype.itemsize
        whole = max(0, self._size - start) // max(1, item)
        if len(self._chunk) == 1 or self._chunk[1:] == self._dataset.shape[1:]:
            return min(items, whole)
        # Of an item in several chunks, the last chunk need not be filled.
        used: int = min(self._chunk[1], self._dataset.shape[1] - others[0]) * item // self._chunk[1]
        return items if start + used <= self._size else 0
