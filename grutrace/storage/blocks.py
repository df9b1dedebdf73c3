"""Rows brought into memory some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from grutrace.record import Array
from grutrace.storage.source import Rows

#: How much is brought into memory at once. Bytes.
BLOCK = 16 * 1024 * 1024


def blocks(rows: Rows) -> Iterator[Array]:
    """Yield all rows, some at a time."""
    each = max(1, BLOCK // max(1, rows.shape[1] * rows.dtype.itemsize))
    for start in range(0, len(rows), each):
        yield np.asarray(rows[start : start + each])
