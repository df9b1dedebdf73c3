"""Memory that copies of what calls read and made lie in, and that is used again.

Allocated one by one, between what the model allocates and frees, copies would have the model's own
memory lie elsewhere at every call, in pages that it has to get from the system first: a call of
0.8 ms (T1 B32 H512) then takes 0.1 ms longer.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from functools import partial

import numpy as np
import torch
from torch import Tensor

from grutrace.record import Array

#: Copies lie end to end in pieces of memory of this size: from 4 MiB on NumPy asks for huge pages,
#: and the first copy into each would wait until all of it is zeroed. Bytes.
PIECE = 1024 * 1024

#: Each copy begins on a multiple of this. Bytes.
ALIGNMENT = 64


class CopyBuffer:
    """Copies values. From any thread.

    Args:
        size: How much memory that nobody uses any more is kept to be used again, in bytes.
    """

    def __init__(self, size: int) -> None:
        # Rows of a trace in memory stay, and would keep the memory of what is soon dropped.
        self._lasting, self._passing = _Pieces(size), _Pieces(size)

    def copy(self, values: Tensor) -> Tensor:
        """Return a copy that is soon dropped."""
        return self._passing.copy(values)

    def copy_lasting(self, values: Tensor) -> Tensor:
        """Return a copy that may be part of the trace."""
        return self._lasting.copy(values)


class _Pieces:
    """Pieces of memory, each used again as soon as no tensor or array lies in it any more."""

    def __init__(self, size: int) -> None:
        self._spare = size // PIECE
        self._free: list[Array] = []
        # Those that are in use, and what says when they are not.
        self._lent: dict[int, tuple[Array, weakref.ref[Array]]] = {}
        self._numbers = itertools.count()
        self._current: Array | None = None
        self._typed: dict[torch.dtype, Tensor] = {}
        self._next = PIECE
        self._lock = threading.Lock()

    def copy(self, values: Tensor) -> Tensor:
        """Return a copy, in memory of its own where it is large or on a device."""
        size = values.nbytes
        if values.device.type != "cpu" or size > PIECE:
            return values.clone()
        with self._lock:
            start = self._next
            if start + size > PIECE:
                self._take()
                start = 0
            self._next = start + -(-size // ALIGNMENT) * ALIGNMENT
            memory = self._typed.get(values.dtype)
            if memory is None:
                memory = self._of_type(values.dtype)
        copied = memory.as_strided(
            values.shape, _contiguous(values.shape), start // values.element_size()
        )
        return copied.copy_(values)

    def _take(self) -> None:
        """Go on in another piece."""
        self._typed.clear()
        memory = self._free.pop() if self._free else _aligned(PIECE)
        # All that lies in the piece keeps this view of it.
        self._current = memory[:]
        number = next(self._numbers)
        self._lent[number] = memory, weakref.ref(self._current, partial(self._returned, number))

    def _returned(self, number: int, _: object) -> None:
        # In any thread at any time, also in one that holds the lock.
        memory, _ = self._lent.pop(number)
        if len(self._free) < self._spare:
            self._free.append(memory)

    def _of_type(self, dtype: torch.dtype) -> Tensor:
        # It is written to in any mode that the model is called in.
        with torch.inference_mode(False):
            memory = torch.from_numpy(self._current).view(dtype)
        self._typed[dtype] = memory
        return memory


def _aligned(size: int) -> Array:
    """Return memory that begins on a multiple of `ALIGNMENT`."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    if len(shape) == 3:
        return shape[1] * shape[2], shape[2], 1
    if len(shape) == 2:
        return shape[1], 1
    strides, each = [1], 1
    for size in reversed(shape[1:]):
        each *= size
        strides.append(each)
    return tuple(reversed(strides))
