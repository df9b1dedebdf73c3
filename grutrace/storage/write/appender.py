"""Appending to one dataset: many small pieces in memory become few large writes."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from grutrace.records import Array
from grutrace.storage.hdf5.filters import is_compressed


class DatasetAppender:
    """Gathers what a dataset grows by, and writes it when told.

    Args:
        dataset: Grows along its first axis; may be longer than what counts in it.
        position: How many of its items count. The next item goes there.

    Attributes:
        position: Items written so far.
        compressed: Whether chunks of the dataset are packed. Each time that HDF5 packs a chunk
            anew it takes new room, and under SWMR it never uses the old room again.
    """

    def __init__(self, dataset: h5py.Dataset, position: int) -> None:
        self.position = position
        self._id = dataset.id
        self._item: tuple[int, ...] = dataset.shape[1:]
        self._dtype: np.dtype[Any] = dataset.dtype
        self._length: int = dataset.shape[0]
        self._chunk: int = dataset.chunks[0]
        self._buffer: list[Array] = []
        self.compressed = is_compressed(dataset)

    @property
    def buffered_bytes(self) -> int:
        """Bytes that are staged."""
        return sum(items.nbytes for items in self._buffer)

    def append(self, items: Array) -> None:
        """Keep (n, ...) items for the next write."""
        self._buffer.append(items)

    def write(self, *, whole_chunks: bool = False) -> None:
        """Write what is staged. If that fails, all of it is still staged.

        Args:
            whole_chunks: Leave staged what does not make a whole chunk yet.
        """
        if not self._buffer:
            return
        buffered_bytes = self._buffer
        # With the type given NumPy need not work out a common one, slow for compound types.
        items = (
            np.concatenate(buffered_bytes, dtype=self._dtype)
            if len(buffered_bytes) > 1
            else buffered_bytes[0]
        )
        left = min(len(items), (self.position + len(items)) % self._chunk) if whole_chunks else 0
        written = items[: len(items) - left]
        if len(written):
            self._write_items(np.ascontiguousarray(written, self._dtype))
        self.position += len(written)
        self._buffer = [items[len(items) - left :]] if left else []

    def _write_items(self, items: Array) -> None:
        # h5py's low-level calls: Dataset.resize and slicing cost 70 microseconds a write, these 30.
        end = self.position + len(items)
        if end > self._length:
            self._id.set_extent((end, *self._item))
            self._length = end
        space = self._id.get_space()
        space.select_hyperslab((self.position, *(0 for _ in self._item)), items.shape)
        self._id.write(h5py.h5s.create_simple(items.shape), space, items)
