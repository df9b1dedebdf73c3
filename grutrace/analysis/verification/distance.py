"""Absolute and relative differences of arrays with NaN and infinity.

A module of its own, so that comparing two traces does not import torch.
"""

from __future__ import annotations

import numpy as np

from grutrace.records import Array


def abs_difference(recorded: Array, expected: Array) -> Array:
    """Return ``|recorded - expected|``: 0 for equal infinities, infinity where only one is NaN."""
    same = (recorded == expected) | (np.isnan(recorded) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(same, 0.0, np.abs(recorded - expected))
    return np.where(np.isnan(difference), np.inf, difference)


def scaled_difference(a: Array, b: Array) -> Array:
    """Return ``|a - b| / max(1, |a|, |b|)``: absolute up to magnitude 1, relative above.

    NaN and infinity are treated as in `abs_difference`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = abs_difference(a, b)
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), 1.0)
    return np.asarray(
        np.divide(
            difference, size, out=difference, where=np.isfinite(difference) & np.isfinite(size)
        )
    )
