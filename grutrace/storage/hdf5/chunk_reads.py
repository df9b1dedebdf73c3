"""Read rows of an uncompressed dataset by their position in the file, outside HDF5.

HDF5 runs one call at a time, so threads that read through it wait for each other. Here HDF5 only
says where the chunks are. The bytes are read without its lock and without Python's.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5t

from grutrace.records import Array

if TYPE_CHECKING:
    from typing_extensions import Self

#: Fewest bytes that are read in this way: fewer are read as fast by HDF5.
SMALLEST = 512 * 1024

#: The largest number of chunks whose positions are kept, of 8 bytes each.
MOST_CHUNKS = 1 << 20

#: The HDF5 driver whose positions are those of the file.
_DRIVER = "sec2"

#: Whether the system reads by position, and HDF5 is new enough to list the chunks.
_HAS_POSITIONS = hasattr(os, "preadv") and hasattr(h5d.DatasetID, "chunk_iter")


@dataclass(frozen=True)
class FilePieces:
    """Pieces of an open file that together hold some rows. A context, which closes the file.

    Attributes:
        descriptor: File descriptor of its own.
        pieces: Position and number of bytes of each piece.
    """

    descriptor: int
    pieces: tuple[tuple[int, int], ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def read_into(self, target: Array) -> bool:
        """Read all pieces into a C-contiguous array of their size.

        Returns:
            Whether all of them could be read.
        """
        memory, start = target.view(np.uint8).reshape(-1).data, 0
        for position, size in self.pieces:
            stop = start + size
            while start < stop:
                try:
                    count = os.preadv(self.descriptor, [memory[start:stop]], position)
                except OSError:
                    return False
                if not count:
                    return False
                start, position = start + count, position + count
        return True


def find_rows(
    dataset: h5py.Dataset, start: int, stop: int, dtype: np.dtype[np.generic]
) -> FilePieces | None:
    """Find rows `start` to `stop` - 1 of a dataset in its file, while no other thread closes it.

    Args:
        dataset: The open dataset, of two axes.
        start: The first row.
        stop: End of the rows, exclusive. All of them were written.
        dtype: Type of the array that they are read into.

    Returns:
        Where they are; None where only HDF5 can read them: they are few, compressed, of another
        type or byte order, in chunks of less than a row, or in a file that has a writer.
    """
    row_bytes = dataset.shape[1] * dtype.itemsize
    if not _HAS_POSITIONS or (stop - start) * row_bytes < SMALLEST:
        return None
    # A writer, in this process or another, has rows that are not in the file yet.
    if dataset.file.id.get_intent() != h5f.ACC_RDONLY:
        return None
    if dataset not in _chunks:
        _chunks[dataset] = _find_chunks(dataset, dtype)
    chunks = _chunks[dataset]
    if chunks is None or stop > len(chunks.positions) * chunks.rows:
        return None
    pieces = list[tuple[int, int]]()
    for number in range(start // chunks.rows, -(-stop // chunks.rows)):
        first, position = number * chunks.rows, int(chunks.positions[number])
        if position < 0:
            return None
        low, high = max(start, first) - first, min(stop, first + chunks.rows) - first
        position, size = position + low * row_bytes, (high - low) * row_bytes
        if pieces and sum(pieces[-1]) == position:
            pieces[-1] = pieces[-1][0], pieces[-1][1] + size
        else:
            pieces.append((position, size))
    return FilePieces(os.dup(dataset.file.id.get_vfd_handle()), tuple(pieces))


@dataclass(frozen=True)
class _Chunks:
    """The chunks of a dataset.

    Attributes:
        rows: Number of rows of a chunk.
        positions: (chunks,) int64, position of each in the file; -1 for one that was never written.
    """

    rows: int
    positions: Array


#: The chunks of open datasets; None for datasets that only HDF5 can read.
_chunks: weakref.WeakKeyDictionary[h5py.Dataset, _Chunks | None] = weakref.WeakKeyDictionary()


def _find_chunks(dataset: h5py.Dataset, dtype: np.dtype[np.generic]) -> _Chunks | None:
    properties, width = dataset.id.get_create_plist(), dataset.shape[1]
    if properties.get_layout() != h5d.CHUNKED or properties.get_nfilters():
        return None
    rows, chunk_width = properties.get_chunk()
    has_type = dataset.id.get_type().equal(h5t.py_create(dtype))
    if chunk_width != width or not has_type or dataset.file.driver != _DRIVER:
        return None
    count = -(-dataset.shape[0] // rows)
    if dataset.file.userblock_size or count > MOST_CHUNKS:
        return None
    positions = np.full(count, -1)

    def note(chunk: Any) -> None:
        number = chunk.chunk_offset[0] // rows
        if number < count and chunk.size == rows * width * dtype.itemsize:
            positions[number] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return _Chunks(rows, positions)
