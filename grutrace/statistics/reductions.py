"""Sums over rows and to rows, extremes, as fast as NumPy has them. n rows, H units."""

from __future__ import annotations

from typing import Any

import numpy as np

from grutrace.record import Array

#: NumPy is fast on long rows, slow on short ones: so short ones are laid side by side. Elements.
WIDE = 4096

#: What a sum of booleans can reach in the smallest type, in which it is fastest.
_LARGEST = 255


def reduce_rows(ufunc: np.ufunc, values: Array, dtype: Any = None) -> Array:
    """Reduce C-contiguous (n, H) values over their rows: (H,).

    Args:
        ufunc: By what.
        values: What.
        dtype: In which type, as long as rows are side by side: of n, one in WIDE // H, or each.
    """
    rows, width = values.shape
    beside = WIDE // max(1, width)
    if beside < 2:
        return np.asarray(ufunc.reduce(values, axis=0, dtype=dtype))
    if rows < 2 * beside:
        # Not in the type that was asked for: it need only hold what comes of rows side by side.
        return np.asarray(ufunc.reduce(values, axis=0))
    whole = rows - rows % beside
    folded = ufunc.reduce(values[:whole].reshape(-1, beside * width), axis=0, dtype=dtype)
    # Once more as wide as ever: whatever is left over goes along.
    wider = np.result_type(folded, np.int64) if folded.dtype.kind == "u" else folded.dtype
    parts = [folded.reshape(beside, width).astype(wider), values[whole:].astype(wider)]
    return np.asarray(ufunc.reduce(np.concatenate(parts), axis=0))


def add_to_rows(values: Array, row: Array) -> None:
    """Add (H,) to each row of C-contiguous (n, H) values, in place."""
    rows, width = values.shape
    beside = max(1, WIDE // max(1, width))
    whole = rows - rows % beside
    wide = values[:whole].reshape(-1, beside * width)
    wide += np.tile(row, beside)
    values[whole:] += row


def count_true(hits: Array) -> Array:
    """How many of (n, H) booleans are true, by unit: (H,) int64."""
    counts = np.zeros(hits.shape[1], np.int64)
    step = _LARGEST * max(1, WIDE // max(1, hits.shape[1]))
    for start in range(0, len(hits), step):
        some = hits[start : start + step].view(np.uint8)
        counts += reduce_rows(np.add, some, np.uint8).astype(np.int64)
    return counts
