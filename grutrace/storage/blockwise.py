"""Reductions of rows that are read a block at a time: sum, mean, variance, extremes.

N rows, W columns.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from grutrace.record import Array

#: Rows that are brought into memory at once; in float64 they take twice or four times this. Bytes.
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
    """Reduce rows as the `numpy.ndarray` method of this name does.

    Sums are made in float64, whatever the type of the elements, and rounded once at the end.

    Args:
        name: sum, mean, var, std, min or max.
        shape: (N, W)
        stored: Type of the elements, a floating-point one.
        blocks: Gives all rows in blocks of about so many bytes, each once.
        axis: None or both for all elements, 0 for one value a column, 1 for one value a row.
        keepdims: Whether the axes stay, with length 1.
        ddof: For var and std.
        options: `dtype`, of the result.

    Returns:
        What the method returns; None if blocks do not serve: there are too few elements, or
        another option is given.
    """
    result = options.pop("dtype", None)
    axes = _axes(axis)
    given = [option for option, value in options.items() if value is not None]
    if given or axes is None or not all(shape) or not isinstance(keepdims, (bool, np.bool_)):
        return None
    kept = stored if result is None else np.dtype(result)
    if stored.kind != "f" or kept.kind != "f":
        return None
    if name in ("var", "std") and math.prod(shape[each] for each in axes) <= ddof:
        return None
    if axes == (1,):
        # Each row by itself. A wide row is not cut.
        found = np.concatenate([_one(name, block, 1, ddof) for block in blocks(BLOCK)])
    else:
        found = _accumulate(name, blocks(BLOCK), axes, ddof)
    if keepdims:
        found = np.expand_dims(found, axes)
    # As NumPy: a scalar where no axis is left.
    return np.asarray(found).astype(kept, copy=False)[()]


def _axes(axis: Any) -> tuple[int, ...] | None:
    """The axes that are reduced, from 0; None if there are none of these, or none at all."""
    try:
        given = _BOTH if axis is None else axis if isinstance(axis, tuple) else (axis,)
        found = tuple(sorted(range(2)[operator.index(each)] for each in given))
    except (TypeError, IndexError):
        return None
    return found if found and len(set(found)) == len(found) else None


def _one(name: str, block: Array, axis: int | tuple[int, ...], ddof: float) -> Array:
    """Reduce one block that is all there is along the axes."""
    if name in ("min", "max"):
        return np.asarray(getattr(block, name)(axis=axis))
    options = {"ddof": ddof} if name in ("var", "std") else {}
    return np.asarray(getattr(block, name)(axis=axis, dtype=np.float64, **options))


def _accumulate(name: str, blocks: Blocks, axes: tuple[int, ...], ddof: float) -> Any:
    if name in ("min", "max"):
        extreme: Any = {"min": np.minimum, "max": np.maximum}[name]
        found: Any = None
        for block in blocks:
            of_block = getattr(block, name)(axis=axes)
            found = of_block if found is None else extreme(found, of_block)
        return found
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
    """Squared deviations from the mean, joined block by block (Chan, Golub, LeVeque 1983)."""
    count, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.astype(np.float64)
        more = _count(block, axes)
        of_block = values.mean(axis=axes, keepdims=True)
        values -= of_block
        away = of_block.squeeze(axes) - mean
        total = count + more
        squares = squares + np.square(values, out=values).sum(axis=axes)
        squares = squares + np.square(away) * (count * more / total)
        mean = mean + away * (more / total)
        count = total
    return squares / (count - ddof)


def _count(block: Array, axes: tuple[int, ...]) -> int:
    return len(block) * (block.shape[1] if 1 in axes else 1)
