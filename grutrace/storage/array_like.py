"""What NumPy users expect of an array, for rows that are read when they are needed.

Indexing reads a part. Operators, comparisons and most methods read all rows and give NumPy arrays.
`mean`, `sum`, `min`, `max`, `std` and `var` read a block at a time.

N rows, W columns.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from grutrace.record import Array
from grutrace.storage.blockwise import reduce_blocks

#: Attributes and methods of `numpy.ndarray` that are answered by an array of all rows. Those that
#: change an array in place are left out: they would change a copy.
_OF_THE_ARRAY = frozenset(
    {
        *("T", "all", "any", "argmax", "argmin", "argpartition", "argsort", "astype", "choose"),
        *("clip", "compress", "conj", "copy", "cumprod", "cumsum", "diagonal", "dot", "flat"),
        *("flatten", "imag", "item", "nonzero", "prod", "ravel", "real", "repeat", "reshape"),
        *("round", "searchsorted", "squeeze", "swapaxes", "take", "tobytes", "tolist", "trace"),
        *("transpose", "view"),
    }
)


def _operator(apply: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """The method of an operator, and the one for when the rows stand on its right."""

    def left(self: ArrayLike, other: Any) -> Any:
        return apply(np.asarray(self), other)

    def right(self: ArrayLike, other: Any) -> Any:
        return apply(other, np.asarray(self))

    return left, right


class ArrayLike(ABC):
    """An array of two axes, (N, W), that is read when it is needed and that nothing changes.

    Arrays that come out of it are copies: writing to them changes nothing here.

    Attributes:
        shape: (N, W)
        dtype: Type of the elements.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    ndim = 2

    @abstractmethod
    def __getitem__(self, key: Any) -> Any:
        """What NumPy gives for this index."""

    @abstractmethod
    def _blocks(self, size: int) -> Iterator[Array]:
        """All rows, some at a time, of about this many bytes. Not to be written to."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, once they are in memory."""
        return self.size * self.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(
                "the rows of a trace become an array by copying: np.asarray(rows), without "
                "copy=False"
            )
        return np.asarray(self[:], dtype)

    # Without it torch.as_tensor and torch.tensor would take the rows one by one.
    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_ARRAY:
            return getattr(np.asarray(self), name)
        raise AttributeError(
            f"the rows of a trace have no attribute {name!r}: np.asarray(rows) is an array"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_OF_THE_ARRAY})

    def __setitem__(self, key: Any, value: Any) -> None:
        raise ValueError("the rows of a trace are read-only: np.array(rows) is a copy to change")

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError(
                "the truth value of rows is ambiguous: use len(rows), or np.any or np.all of a "
                "comparison"
            )
        return bool(np.asarray(self))

    def __contains__(self, value: object) -> bool:
        return bool(np.any(np.asarray(self) == value))

    # An array has no hash either: == compares its elements.
    __hash__ = None  # type: ignore[assignment]

    __add__, __radd__ = _operator(operator.add)
    __sub__, __rsub__ = _operator(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(operator.floordiv)
    __mod__, __rmod__ = _operator(operator.mod)
    __divmod__, __rdivmod__ = _operator(divmod)
    __pow__, __rpow__ = _operator(operator.pow)
    __matmul__, __rmatmul__ = _operator(operator.matmul)
    __lt__ = _operator(operator.lt)[0]
    __le__ = _operator(operator.le)[0]
    __gt__ = _operator(operator.gt)[0]
    __ge__ = _operator(operator.ge)[0]
    __eq__ = _operator(operator.eq)[0]
    __ne__ = _operator(operator.ne)[0]

    def __neg__(self) -> Array:
        return -np.asarray(self)

    def __pos__(self) -> Array:
        return np.asarray(self)

    def __abs__(self) -> Array:
        return np.asarray(abs(np.asarray(self)))

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.sum`; added up in float64, a block at a time."""
        return self._reduced("sum", axis=axis, dtype=dtype, out=out, **options)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.mean`; added up in float64, a block at a time."""
        return self._reduced("mean", axis=axis, dtype=dtype, out=out, **options)

    def var(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.var`; computed in float64, a block at a time, in one pass."""
        return self._reduced("var", axis=axis, dtype=dtype, out=out, **options)

    def std(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.std`; computed in float64, a block at a time, in one pass."""
        return self._reduced("std", axis=axis, dtype=dtype, out=out, **options)

    def min(self, axis: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.min`, a block at a time."""
        return self._reduced("min", axis=axis, out=out, **options)

    def max(self, axis: Any = None, out: Any = None, **options: Any) -> Any:
        """As `numpy.ndarray.max`, a block at a time."""
        return self._reduced("max", axis=axis, out=out, **options)

    def _reduced(self, name: str, **options: Any) -> Any:
        found = reduce_blocks(name, self.shape, self.dtype, self._blocks, **options)
        # NumPy's own where that is of no use: no rows, or an option that is rarely given.
        return getattr(np.asarray(self), name)(**options) if found is None else found
