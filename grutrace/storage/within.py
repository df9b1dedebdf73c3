"""How many of the first items of a dataset lie within a file that may have been cut short."""

from __future__ import annotations

import itertools
import math

import h5py

from grutrace.storage.faults import H5PY_ERRORS, in_brief


class Within:
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
        self._packed = dataset.id.get_create_plist().get_nfilters() > 0
        #: Bytes.
        self._item = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
        self.reason = ""

    def upto(self, count: int) -> int:
        """How many of the first `count` items are there."""
        wanted = min(count, self._length)
        if not self._item:
            return wanted
        while self._known < wanted and not self.reason:
            found = 0 if self._known % self._chunk[0] else self._of_chunk(self._known)
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

    def _of_chunk(self, first: int) -> int:
        """How many items, from the first of a chunk on, are there."""
        rest = [
            range(0, size, step)
            for size, step in zip(self._dataset.shape[1:], self._chunk[1:], strict=True)
        ]
        items = min(self._chunk[0], self._length - first)
        for others in itertools.product(*rest):
            items = min(items, self._of_one(first, others, items))
        return items

    def _of_one(self, first: int, others: tuple[int, ...], items: int) -> int:
        try:
            info = self._dataset.id.get_chunk_info_by_coord((first, *others))
        except H5PY_ERRORS as error:
            self.reason = f"where item {first} lies cannot be read: {in_brief(error)}"
            return 0
        if info.byte_offset is None:
            self.reason = f"item {first} was never written"
            return 0
        start = int(info.byte_offset)
        if self._packed:
            return items if start + int(info.size) <= self._size else 0
        # A writer that died may not have written the unused end of a chunk.
        item: int = math.prod(self._chunk[1:]) * self._dataset.dtype.itemsize
        whole = max(0, self._size - start) // max(1, item)
        if len(self._chunk) == 1 or self._chunk[1:] == self._dataset.shape[1:]:
            return min(items, whole)
        # Of an item in several chunks, the last chunk need not be filled.
        used: int = min(self._chunk[1], self._dataset.shape[1] - others[0]) * item // self._chunk[1]
        return items if start + used <= self._size else 0
