"""Append to one dataset: collect small arrays in memory and write them in large blocks."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from grutrace.records import Array
from grutrace.storage.hdf5.filters import is_compressed

#: Items from this size on are written as they are. Smaller ones are joined first: a write costs as
#: much as copying so many bytes. Bytes.
LARGE_BYTES = 256 * 1024


class DatasetAppender:
    """Buffers items for a dataset and appends them to it.

    Args:
        dataset: A dataset that can grow along its first axis. It may be longer than `position`.
        position: Number of committed items; the next item is written there.

    Attributes:
        position: Number of items written so far.
        compressed: Whether the dataset is compressed. HDF5 stores a compressed chunk at a new
            address each time it changes, and under SWMR it never frees the old address.
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
        """Bytes in the buffer."""
        return sum(items.nbytes for items in self._buffer)

    def append(self, items: Array) -> None:
        """Add (n, ...) items to the buffer."""
        self._buffer.append(items)

    def write(self, *, whole_chunks: bool = False) -> None:
        """Write the buffer to the dataset. If that fails, the buffer is unchanged.

        Args:
            whole_chunks: Keep items in the buffer that do not fill a chunk yet.
        """
        if not self._buffer:
            return
        if not self.compressed:
            self._write_large()
        buffer = self._buffer
        if not buffer:
            return
        # Without a dtype, NumPy computes a common type, which is slow for compound types.
        items = np.concatenate(buffer, dtype=self._dtype) if len(buffer) > 1 else buffer[0]
        count = len(items)
        if whole_chunks:
            count -= min(count, (self.position + count) % self._chunk)
        if count:
            self._write_items(np.ascontiguousarray(items[:count], self._dtype))
        self.position += count
        self._buffer = [items[count:]] if count < len(items) else []

    def _write_large(self) -> None:
        """Write items that are large on their own without copying them, if all are."""
        if all(items.nbytes >= LARGE_BYTES for items in self._buffer):
            while self._buffer:
                items = np.ascontiguousarray(self._buffer[0], self._dtype)
                self._write_items(items)
                self.position += len(items)
                del self._buffer[0]

    def _write_items(self, items: Array) -> None:
        # Low-level calls take 30 microseconds a write; Dataset.resize and slicing take 70.
        end = self.position + len(items)
        if end > self._length:
            self._id.set_extent((end, *self._item))
            self._length = end
        space = self._id.get_space()
        space.select_hyperslab((self.position, *(0 for _ in self._item)), items.shape)
        self._id.write(h5py.h5s.create_simple(items.shape), space, items)
