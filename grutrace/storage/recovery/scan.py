"""Find out which calls of a damaged trace are complete.

`ModuleExtents` counts the items that the calls of a module refer to. `ChunkScanner` counts the
leading items of a dataset that are within the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import h5py
import numpy as np

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.schema import (
    call_tables,
    pieces_path,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.hdf5.errors import H5PY_ERRORS, short_message


@dataclass
class ModuleExtents:
    """The items that the accepted calls of one module refer to.

    Attributes:
        module: The module.
        calls: Accepted calls.
        pieces: Pieces of these calls.
        rows: Rows of these pieces.
        sequences: Sequences that have begun.
        versions: Versions of the weights.
        obstacle: Path of the dataset in which the next call is incomplete, if one is.
    """

    module: ModuleInfo
    calls: int = 0
    pieces: int = 0
    rows: int = 0
    sequences: int = 0
    versions: int = 0
    obstacle: str = ""
    #: The five counts after each call of the last `advance`: (calls, 5).
    _after: Array = field(default_factory=lambda: np.empty((0, 5), np.int64))

    def advance(
        self,
        calls: Array,
        count_available: Callable[[str, int], int],
        read: Callable[[str, int, int], Array],
    ) -> int:
        """Examine the next calls of the module. Return how many of them are complete.

        Args:
            calls: Entries of the table of calls.
            count_available: Returns how many of the first items of a dataset are available, given
                its path and the number of items needed.
            read: Reads items of a dataset, given its path, start and stop.
        """
        path = pieces_path(self.module)
        ends = self.pieces + np.cumsum(calls["batch"], dtype=np.int64)
        needed_pieces = int(ends[-1]) if len(ends) else self.pieces
        pieces = read(path, self.pieces, count_available(path, needed_pieces))
        sequences = self._count_sequences(pieces)
        available = self.pieces + len(sequences)
        complete = int(np.searchsorted(ends, available, side="right"))
        self.obstacle = path
        ends = ends[:complete]
        # The first entry is the state before the first piece.
        rows = np.concatenate([[0], np.cumsum(pieces["steps"], dtype=np.int64)]) + self.rows
        sequences = np.concatenate([[self.sequences], sequences])
        versions = np.maximum.accumulate(
            np.concatenate([[self.versions], calls["weights"][:complete].astype(np.int64) + 1])
        )[1:]
        self._after = np.stack(
            [
                self.calls + 1 + np.arange(complete),
                ends,
                rows[ends - self.pieces],
                sequences[ends - self.pieces],
                versions,
            ],
            axis=1,
        )
        for path, column in self._columns().items():
            needed = self._after[:complete, column]
            available = count_available(path, int(needed[-1])) if complete else 0
            if complete and available < needed[-1]:
                complete = int(np.searchsorted(needed, available, side="right"))
                self.obstacle = path
        return complete

    def accept(self, calls: int) -> None:
        """Accept this many calls of the last `advance`."""
        if calls:
            self.calls, self.pieces, self.rows, self.sequences, self.versions = self._after[
                calls - 1
            ].tolist()

    def counts(self) -> dict[str, int]:
        """Return the number of items that the accepted calls need, by dataset path."""
        lengths = (self.calls, self.pieces, self.rows, self.sequences, self.versions)
        counts = {path: lengths[column] for path, column in self._columns().items()}
        return {pieces_path(self.module): self.pieces, **counts}

    def _count_sequences(self, pieces: Array) -> Array:
        """Count the sequences after each piece, (pieces,), up to the first skipped number."""
        numbers = np.minimum(pieces["sequence"], np.uint64(2**62)).astype(np.int64)
        counts = np.maximum.accumulate(np.concatenate([[self.sequences], numbers + 1]))
        return counts[1 : 1 + count_leading_true(numbers <= counts[:-1])]

    def _columns(self) -> dict[str, int]:
        """Map the path of each dataset to the column of `_after` that is its length."""
        columns = {}
        for site in self.module.sites:
            for quantity in site.quantities:
                columns[quantity_path(self.module, site, quantity)] = 2
            columns[site_path(self.module, site.suffix, "initial")] = 3
            for name in call_tables(site):
                columns[site_path(self.module, site.suffix, name)] = 0
            for name in weight_shapes(self.module, site):
                columns[site_path(self.module, site.suffix, name)] = 4
        return columns


def count_leading_true(mask: Array) -> int:
    """Return the number of leading True values."""
    return len(mask) if mask.all() else int(np.argmin(mask))


class ChunkScanner:
    """Counts the leading items of a dataset whose chunks are within the file.

    Args:
        dataset: A dataset of a file without writer flag.
        size: Bytes of the file.
        limit: Number of items that can be read, if a read has failed beyond it.

    Attributes:
        reason: Why items are missing; empty while none is.
    """

    def __init__(self, dataset: h5py.Dataset, size: int, limit: int | None) -> None:
        self._dataset, self._size = dataset, size
        self._length = len(dataset) if limit is None else min(limit, len(dataset))
        self._limited = limit is not None
        self._available = 0
        self._chunk: tuple[int, ...] = dataset.chunks
        self._compressed = dataset.id.get_create_plist().get_nfilters() > 0
        self._item_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
        self.reason = ""

    def count_available(self, count: int) -> int:
        """Return how many of the first `count` items are available."""
        stop = min(count, self._length)
        if not self._item_bytes:
            return stop
        while self._available < stop and not self.reason:
            is_chunk_start = self._available % self._chunk[0] == 0
            items = self._count_in_chunks(self._available) if is_chunk_start else 0
            self._available += items
            if not items and not self.reason:
                self.reason = (
                    f"item {self._available} lies beyond the end of the file, which has "
                    f"{self._size} bytes"
                )
        if stop < count and not self.reason:
            problem = "cannot be read" if self._limited else "is missing"
            self.reason = f"item {stop} {problem}"
        return min(count, self._available)

    def _count_in_chunks(self, item: int) -> int:
        """Count the available items of the chunks that start with this item.

        There are several such chunks if an item is larger than a chunk.
        """
        offsets = [
            range(0, size, step)
            for size, step in zip(self._dataset.shape[1:], self._chunk[1:], strict=True)
        ]
        items = min(self._chunk[0], self._length - item)
        for chunk_offsets in itertools.product(*offsets):
            items = min(items, self._count_in_chunk(item, chunk_offsets, items))
        return items

    def _count_in_chunk(self, item: int, offsets: tuple[int, ...], items: int) -> int:
        """Count the available items of one chunk.

        Args:
            item: The first item of the chunk.
            offsets: Start of the chunk along the other axes.
            items: Number of items in the chunk.
        """
        try:
            info = self._dataset.id.get_chunk_info_by_coord((item, *offsets))
        except H5PY_ERRORS as error:
            self.reason = f"the address of item {item} cannot be read: {short_message(error)}"
            return 0
        if info.byte_offset is None:
            self.reason = f"item {item} was never written"
            return 0
        start = int(info.byte_offset)
        if self._compressed:
            return items if start + int(info.size) <= self._size else 0
        # A dead writer may not have written the unused end of a chunk.
        item_bytes: int = math.prod(self._chunk[1:]) * self._dataset.dtype.itemsize
        complete = max(0, self._size - start) // max(1, item_bytes)
        if len(self._chunk) == 1 or self._chunk[1:] == self._dataset.shape[1:]:
            return min(items, complete)
        # If an item spans several chunks, the last one need not be full.
        used_rows: int = min(self._chunk[1], self._dataset.shape[1] - offsets[0])
        used_bytes = used_rows * item_bytes // self._chunk[1]
        return items if start + used_bytes <= self._size else 0
