"""Absolute and relative differences of arrays with NaN and infinity.

Apart from `residuals`, so that comparing two traces does not load torch.
"""

from __future__ import annotations

import numpy as np

from grutrace.records import Array


def abs_difference(recorded: Array, expected: Array) -> Array:
    """Return ``|recorded - expected|``: 0 for the same infinity, infinite for one no number."""
    same = (recorded == expected) | (np.isnan(recorded) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.where(same, 0.0, np.abs(recorded - expected))
    return np.where(np.isnan(off), np.inf, off)


def scaled_difference(a: Array, b: Array) -> Array:
    """Return ``|a - b| / max(1, |a|, |b|)``: absolute for what is at most 1, else relative.

    Otherwise as for `differences`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    off = abs_difference(a, b)
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), 1.0)
    return np.asarray(np.divide(off, size, out=off, where=np.isfinite(off) & np.isfinite(size)))
