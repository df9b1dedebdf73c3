"""`ArrayLike`, the interface of a NumPy array for rows that are read on demand.

Indexing reads a part. Operators, comparisons and most methods read all rows and return NumPy
arrays. The reductions sum, mean, var, std, min and max read one block at a time, in
`reduce_blocks`.

N rows, W columns.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, TypeAlias

import numpy as np

from grutrace.records import Array

#: Bytes of rows that are read at once. The float64 copy is two or four times as large.
BLOCK = 4 * 1024 * 1024

Blocks: TypeAlias = Iterator[Array]

_BOTH = (0, 1)


def reduce_blocks(
    name: str,
    shape: tuple[int, int],
    stored: np.dtype[Any],
    blocks: Callable[[int], Blocks],
    *,
    axis: Any = None,
    keepdims: bool = False,
    ddof: float = 0,
    **options: Any,
) -> Any:
    """Reduce rows like the `numpy.ndarray` method of this name, block by block.

    Sums are accumulated in float64 and rounded once at the end.

    Args:
        name: sum, mean, var, std, min or max.
        shape: (N, W)
        stored: Type of the elements, a floating-point type.
        blocks: Yields all rows in blocks of about the given number of bytes.
        axis: None or (0, 1) for one value, 0 for one value per column, 1 for one value per row.
        keepdims: Whether reduced axes are kept with length 1.
        ddof: Delta degrees of freedom of var and std.
        options: `dtype`: type of the result.

    Returns:
        The result of the NumPy method. None if blocks cannot be used: too few elements, or
        another option.
    """
    requested_dtype = options.pop("dtype", None)
    axes = _axes(axis)
    has_other_options = any(value is not None for value in options.values())
    if has_other_options or axes is None or not all(shape):
        return None
    if not isinstance(keepdims, (bool, np.bool_)):
        return None
    dtype = stored if requested_dtype is None else np.dtype(requested_dtype)
    if stored.kind != "f" or dtype.kind != "f":
        return None
    if name in ("var", "std") and math.prod(shape[axis] for axis in axes) <= ddof:
        return None
    if axes == (1,):
        # Each row is reduced separately. A wide row is not split.
        result = np.concatenate([_reduce_rows(name, block, ddof) for block in blocks(BLOCK)])
    else:
        result = _accumulate(name, blocks(BLOCK), axes, ddof)
    if keepdims:
        result = np.expand_dims(result, axes)
    # As in NumPy, a result without axes is a scalar.
    return np.asarray(result).astype(dtype, copy=False)[()]


def _axes(axis: Any) -> tuple[int, ...] | None:
    """Return the reduced axes, counted from 0. None if there are none, or one is invalid."""
    try:
        axes = _BOTH if axis is None else axis if isinstance(axis, tuple) else (axis,)
        axes = tuple(sorted(range(2)[operator.index(number)] for number in axes))
    except (TypeError, IndexError):
        return None
    return axes if axes and len(set(axes)) == len(axes) else None


def _reduce_rows(name: str, block: Array, ddof: float) -> Array:
    """Reduce each row of a block."""
    if name in ("min", "max"):
        return np.asarray(getattr(block, name)(axis=1))
    options = {"ddof": ddof} if name in ("var", "std") else {}
    return np.asarray(getattr(block, name)(axis=1, dtype=np.float64, **options))


def _accumulate(name: str, blocks: Blocks, axes: tuple[int, ...], ddof: float) -> Any:
    if name in ("min", "max"):
        combine: Any = {"min": np.minimum, "max": np.maximum}[name]
        return reduce(combine, (getattr(block, name)(axis=axes) for block in blocks))
    if name in ("sum", "mean"):
        total, count = _total(blocks, axes)
        return total if name == "sum" else total / count
    variance = _variance(blocks, axes, ddof)
    return variance if name == "var" else np.sqrt(variance)


def _total(blocks: Blocks, axes: tuple[int, ...]) -> tuple[Any, int]:
    total: Any = 0.0
    count = 0
    for block in blocks:
        total = total + block.sum(axis=axes, dtype=np.float64)
        count += _count(block, axes)
    return total, count


def _variance(blocks: Blocks, axes: tuple[int, ...], ddof: float) -> Any:
    """Return the variance, merged block by block (Chan, Golub, LeVeque 1983)."""
    count, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.astype(np.float64)
        block_count = _count(block, axes)
        block_mean = values.mean(axis=axes, keepdims=True)
        values -= block_mean
        shift = block_mean.squeeze(axes) - mean
        total = count + block_count
        squares = squares + np.square(values, out=values).sum(axis=axes)
        squares = squares + np.square(shift) * (count * block_count / total)
        mean = mean + shift * (block_count / total)
        count = total
    return squares / (count - ddof)


def _count(block: Array, axes: tuple[int, ...]) -> int:
    """Return how many elements of a block each reduced value covers."""
    return len(block) * (block.shape[1] if 1 in axes else 1)


#: Attributes and methods of `numpy.ndarray` that are delegated to an array of all rows. Methods
#: that modify an array in place are excluded: they would modify a copy.
_DELEGATED = frozenset(
    {
        *("T", "all", "any", "argmax", "argmin", "argpartition", "argsort", "astype", "choose"),
        *("clip", "compress", "conj", "copy", "cumprod", "cumsum", "diagonal", "dot", "flat"),
        *("flatten", "imag", "item", "nonzero", "prod", "ravel", "real", "repeat", "reshape"),
        *("round", "searchsorted", "squeeze", "swapaxes", "take", "tobytes", "tolist", "trace"),
        *("transpose", "view"),
    }
)


def _operator(apply: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """Return the method of an operator, and the method of its reflected operands."""

    def left(self: ArrayLike, other: Any) -> Any:
        return apply(np.asarray(self), other)

    def right(self: ArrayLike, other: Any) -> Any:
        return apply(other, np.asarray(self))

    return left, right


class ArrayLike(ABC):
    """A read-only two-dimensional array, (N, W), that is read on demand.

    The arrays that it returns are copies.

    Attributes:
        shape: (N, W)
        dtype: Type of the elements.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    ndim = 2

    @abstractmethod
    def __getitem__(self, key: Any) -> Any:
        """Return what NumPy returns for this index."""

    @abstractmethod
    def _blocks(self, size: int) -> Iterator[Array]:
        """Yield all rows in read-only blocks of about this many bytes."""

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory."""
        return self.size * self.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError(
                "the rows of a trace can only be converted to an array by copying: use "
                "np.asarray(rows), without copy=False"
            )
        return np.asarray(self[:], dtype)

    # Without `__dlpack__`, torch.as_tensor and torch.tensor would convert row by row.
    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return np.empty(0).__dlpack_device__()

    def __getattr__(self, name: str) -> Any:
        if name in _DELEGATED:
            return getattr(np.asarray(self), name)
        raise AttributeError(
            f"the rows of a trace have no attribute {name!r}: use np.asarray(rows)"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_DELEGATED})

    def __setitem__(self, key: Any, value: Any) -> None:
        raise ValueError("the rows of a trace are read-only: modify a copy, np.array(rows)")

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError(
                "the truth value of an array of rows is ambiguous: use len(rows), np.any or np.all"
            )
        return bool(np.asarray(self))

    def __contains__(self, value: object) -> bool:
        return bool(np.any(np.asarray(self) == value))

    # Like NumPy arrays, rows are not hashable: == compares elements.
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
        """Like `numpy.ndarray.sum`, accumulated in float64 block by block."""
        return self._reduced("sum", axis=axis, dtype=dtype, out=out, **options)

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """Like `numpy.ndarray.mean`, accumulated in float64 block by block."""
        return self._reduced("mean", axis=axis, dtype=dtype, out=out, **options)

    def var(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """Like `numpy.ndarray.var`, computed in float64 block by block in one pass."""
        return self._reduced("var", axis=axis, dtype=dtype, out=out, **options)

    def std(self, axis: Any = None, dtype: Any = None, out: Any = None, **options: Any) -> Any:
        """Like `numpy.ndarray.std`, computed in float64 block by block in one pass."""
        return self._reduced("std", axis=axis, dtype=dtype, out=out, **options)

    def min(self, axis: Any = None, out: Any = None, **options: Any) -> Any:
        """Like `numpy.ndarray.min`, block by block."""
        return self._reduced("min", axis=axis, out=out, **options)

    def max(self, axis: Any = None, out: Any = None, **options: Any) -> Any:
        """Like `numpy.ndarray.max`, block by block."""
        return self._reduced("max", axis=axis, out=out, **options)

    def _reduced(self, name: str, **options: Any) -> Any:
        result = reduce_blocks(name, self.shape, self.dtype, self._blocks, **options)
        # Without rows, or with a rare option, NumPy reduces an array of all rows.
        return getattr(np.asarray(self), name)(**options) if result is None else result
