"""Source and target addresses of the gate copies, for all calls of one shape.

T steps, H hidden size, U units that are copied.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from grutrace.native.library import GateCopy
from grutrace.records import Array


class GateStrides(NamedTuple):
    """The memory layout of a step's gate in the kernel's memory, in elements.

    Attributes:
        row: Stride from one row to the next.
        unit: Stride from one unit to the next.
        offset: Offset of the first unit.
    """

    row: int
    unit: int
    offset: int


class CopyTemplate(NamedTuple):
    """The gate copies of all calls of one shape.

    Attributes:
        product: The copies of reset and update, direction by direction. The target of each is the
            offset from its gate's first element, in bytes.
        candidate: The copies of the candidate, likewise.
        rows: Number of rows of each step of all directions, in the order of execution.
        arrays: Arrays that the copies refer to by address.
    """

    product: ctypes.Array[GateCopy]
    candidate: ctypes.Array[GateCopy]
    rows: Array
    arrays: list[Array]


@lru_cache(maxsize=64)
def make_template(
    rows: tuple[int, ...],
    padded: bool,
    hidden_size: int,
    product: tuple[tuple[int, GateStrides], ...],
    candidate: tuple[tuple[int, GateStrides], ...],
    directions: tuple[bool, ...],
    itemsize: int,
) -> CopyTemplate:
    """Return the copies of calls of one shape.

    Args:
        rows: (T,) number of sequences at each time.
        padded: Whether all sequences have all times.
        hidden_size: H
        product: For each copy of reset or update: U, and the strides in the kernel's memory.
        candidate: The same for the candidate.
        directions: For each direction, in the order of execution, whether it is the reverse one.
        itemsize: Bytes of an element.
    """
    counts = np.array(rows, np.int64)
    starts = np.cumsum(counts) - counts
    orders = [slice(None, None, -1 if reverse else 1) for reverse in directions]
    arrays: list[Array] = []

    def copies(gates: tuple[tuple[int, GateStrides], ...], origin: int) -> ctypes.Array[GateCopy]:
        copies = []
        for reverse, order in zip(directions, orders, strict=True):
            for units, strides in gates:
                target, step_stride, row_stride, offsets = 0, units, units * len(rows), None
                if padded and reverse:
                    target, step_stride = itemsize * units * (len(rows) - 1), -units
                elif not padded:
                    step_stride, row_stride = 0, units
                    arrays.append(starts[order] * units)
                    offsets = arrays[-1].ctypes.data
                row, unit, offset = strides
                copies.append(
                    GateCopy(
                        row,
                        offset - origin,
                        unit,
                        units,
                        itemsize,
                        target,
                        row_stride,
                        step_stride,
                        offsets,
                    )
                )
        return (GateCopy * len(copies))(*copies)

    # The address of a step's product points to its last third.
    return CopyTemplate(
        copies(product, 2 * hidden_size),
        copies(candidate, 0),
        np.concatenate([counts[order] for order in orders]),
        arrays,
    )
