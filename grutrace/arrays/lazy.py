"""Arrays that xarray reads only when somebody looks at their values."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from grutrace.record import Array


class Indexable(Protocol):
    """An array that is read, or worked out, when it is indexed by slices and integers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements."""

    def __getitem__(self, key: tuple[Any, ...]) -> Array:
        """A part, by one slice or integer for each axis."""


class _Backend(BackendArray):
    """What xarray's own files are to it: see xarray's "How to add a new backend"."""

    def __init__(self, array: Indexable) -> None:
        self.shape, self.dtype = array.shape, array.dtype
        self._array = array

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._array.__getitem__
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled, it is its values."""
        everything = self._array[(slice(None),) * len(self.shape)]
        return indexing.NumpyIndexingAdapter, (everything,)


def lazily(array: Indexable) -> Any:
    """The data of a variable of xarray: read once, when it is needed, or only the part that is."""
    read = indexing.LazilyIndexedArray(_Backend(array))
    cached: Any = indexing.MemoryCachedArray(read)  # type: ignore[no-untyped-call]
    return indexing.CopyOnWriteArray(cached)
