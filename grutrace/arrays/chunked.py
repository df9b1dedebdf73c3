"""Rows of a trace as dask arrays, whose chunks are whole chunks of the file."""

from __future__ import annotations

import uuid
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from grutrace.arrays.reopened import Look
from grutrace.arrays.rows import PaddedRows, Quantity, QuantityRows
from grutrace.errors import needing
from grutrace.record import Array, Site
from grutrace.storage.moment import Moment
from grutrace.storage.schema import row_chunks

if TYPE_CHECKING:
    import dask.array

#: What one task of dask reads at once: many chunks of the file, and little beside a worker's
#: memory. Bytes.
CHUNK = 16 * 1024 * 1024


def to_dask(moment: Moment, module: int, site: Site, quantity: str) -> dask.array.Array:
    """The rows of a quantity as a dask array, (N, H), or (N, I) for the input.

    Raises:
        MissingExtraError: dask is not installed.
        NotRecordedError: The quantity was not recorded.
    """
    with needing("to_dask", "dask"):
        import dask.array  # noqa: F401
    found = Quantity(Look(moment), moment, module, site, quantity)
    return chunked_rows(found, aligned_rows(found))


def aligned_rows(quantity: Quantity) -> int:
    """How many rows make a chunk of dask's: about `CHUNK` bytes, and whole chunks of the file."""
    width = quantity.shape[1]
    of_file = row_chunks(quantity.dtype, width)[0]
    size = max(1, width * quantity.dtype.itemsize)
    return max(1, CHUNK // (size * of_file)) * of_file


def chunked_rows(quantity: Quantity, rows: int) -> dask.array.Array:
    """All rows, so many in a chunk."""
    found: dask.array.Array = _chunked(QuantityRows(quantity), rows, quantity.look)
    return found


def chunked_sequences(padded: PaddedRows, look: Look) -> dask.array.Array:
    """All sequences, padded: as many in a chunk as `CHUNK` holds."""
    size = padded.shape[1] * padded.shape[2] * padded.dtype.itemsize
    found: dask.array.Array = _chunked(padded, max(1, CHUNK // max(1, size)), look)
    return found


def _chunked(whole: Any, length: int, look: Look) -> Any:
    # dask has no types of its own yet.
    array: Any = import_module("dask.array")
    chunks = (length, *whole.shape[1:])
    meta = np.empty((0,) * whole.ndim, whole.dtype)
    if not look.in_memory:
        # With the array in every task, for it is small: it would be a task of its own otherwise,
        # which one worker has and the others ask for.
        return array.from_array(
            whole, chunks, asarray=False, fancy=False, meta=meta, inline_array=True
        )
    sizes = array.core.normalize_chunks(chunks, whole.shape, dtype=whole.dtype)
    name = f"grutrace-{uuid.uuid4().hex}"
    starts = np.cumsum((0, *sizes[0])).tolist()
    beyond = (0,) * (whole.ndim - 1)
    graph = {
        (name, number, *beyond): (np.asarray, _Part(whole, slice(start, start + size)))
        for number, (start, size) in enumerate(zip(starts, sizes[0], strict=False))
    }
    return array.Array(graph, name, sizes, meta=meta)


class _Part:
    """A part of what is in memory. Pickled, it is an array.

    So a cluster gets arrays, while the threads of this process copy nothing beforehand, and derive
    gates side by side.
    """

    def __init__(self, whole: Any, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        part = self._whole[(self._rows, *(slice(None),) * (self._whole.ndim - 1))]
        return np.array(part, dtype) if copy else np.asarray(part, dtype)

    def __reduce__(self) -> tuple[object, ...]:
        return np.asarray, (np.ascontiguousarray(self),)
