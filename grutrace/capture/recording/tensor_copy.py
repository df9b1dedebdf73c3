"""Keeping rows in the type of their module's rows.

Copies from a CUDA device that the model's stream does not wait for.

What is to be kept is first brought, on the model's own stream, into memory of its own, so that
whatever the model does next cannot reach it. From there a stream beside the model's copies it into
pinned memory. Who reads that memory waits for the stream first.

Nobody has run this on a device yet: tests/test_cuda.py has what would.

Memory that copies of what calls read and made lie in, and that is used again.

Allocated one by one, between what the model allocates and frees, copies would have the model's own
memory lie elsewhere at every call, in pages that it has to get from the system first: a call of
0.8 ms (T1 B32 H512) then takes 0.1 ms longer.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from grutrace.gru.layout import SequenceLayout, copy_cast, numpy_type
from grutrace.records import Array, ModuleInfo


class SideStream:
    """One stream a device, for one module; from any thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._of_thread = _PendingSync()

    def takes(self, values: Tensor) -> bool:
        """Whether these values are copied here."""
        return values.is_cuda

    def copy(self, own: Tensor, dtype: np.dtype[Any]) -> Array:
        """Begin to copy; the array is whole once `pop_sync` has returned and been called.

        Args:
            own: Values that nobody else changes.
            dtype: Of the array.
        """
        stream = self._streams.get(own.device)
        if stream is None:
            beside: Any = torch.cuda.Stream
            stream = self._streams.setdefault(own.device, beside(own.device))
        kept: torch.dtype = getattr(torch, dtype.name)
        host = torch.empty(own.shape, dtype=kept, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            host.copy_(own, non_blocking=True)
        own.record_stream(stream)
        self._of_thread.ready = stream.record_event().synchronize
        array: Array = host.numpy()
        return array

    def pop_sync(self) -> Callable[[], None] | None:
        """Return what waits for all that this thread has begun to copy; None if that is nothing."""
        ready, self._of_thread.ready = self._of_thread.ready, None
        return ready


class _PendingSync(threading.local):
    ready: Callable[[], None] | None = None


class RowConverter:
    """Copies tensors of one module into rows, and notes once what that loses.

    Args:
        module: The module.
        chosen: Whether the user chose the type. Then only what does not fit at all is noted.
        copied: Whether rows are made now in the type of the weights, and get their own later.
        beside: Whether copies from a device may be made beside the model's stream. They lie in
            pinned memory, so only if they are soon let go.

    Attributes:
        dtype: NumPy's type of the rows that are made.
        stored: Torch's type that they are stored as.
    """

    def __init__(
        self, module: ModuleInfo, *, chosen: bool, copied: bool = False, beside: bool = False
    ) -> None:
        self._module = module
        self.dtype = np.dtype(module.weights_dtype if copied else module.dtype)
        self.stored: torch.dtype = getattr(torch, module.dtype)
        self._side = SideStream() if copied and beside else None
        self._chosen = chosen
        self._noted: set[str] = set()
        self._precision_losses: list[str] = []

    def convert_steps(
        self, steps: SequenceLayout, values: Tensor, *, is_owned: bool = False
    ) -> Array:
        """Return values, one a step in the kernel's order, as (N, width), sequence by sequence.

        Args:
            steps: Of the call.
            values: To be copied.
            is_ours: Whether nobody else will change them, so that they need not be copied.
        """
        if self._side is not None and self._side.takes(values):
            return self._copy_async(values, steps.to_device_rows(values))
        rows = (steps.as_rows if is_owned else steps.to_rows)(values, self.dtype)
        if values.dtype != self.stored:
            self._note_precision_loss(values, rows)
        return rows

    def of(self, values: Tensor) -> Array:
        """Copy values of any shape."""
        if self._side is not None and self._side.takes(values):
            return self._copy_async(values, values.clone())
        rows = np.empty(values.shape, self.dtype)
        copy_cast(torch.from_numpy(rows), values)
        if values.dtype != self.stored:
            self._note_precision_loss(values, rows)
        return rows

    def pop_sync(self) -> Callable[[], None] | None:
        """Return what waits until this thread's copies are whole; None if they are."""
        return None if self._side is None else self._side.pop_sync()

    def _copy_async(self, values: Tensor, own: Tensor) -> Array:
        side = cast("SideStream", self._side)
        rows = side.copy(own, self.dtype)
        if values.dtype != self.stored and (ready := side.pop_sync()) is not None:
            ready()
            self._note_precision_loss(values, rows)
        return rows

    def _note_precision_loss(self, values: Tensor, rows: Array) -> None:
        computed, kept = numpy_type(values.dtype), np.dtype(self._module.dtype)
        if np.can_cast(computed, kept):
            return
        if not self._chosen:
            self._note_loss(
                "rounded",
                f"computes in {computed} by now, and was in {kept} when it was attached: its "
                f"rows are rounded to {kept}",
            )
        with np.errstate(over="ignore"):
            infinite = np.isinf(rows.astype(kept, copy=False)).any()
        if infinite:
            finite = values[values.isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            if largest > float(np.finfo(kept).max):
                self._note_loss(
                    "overflow",
                    f"has values up to {largest:.3g}, and {kept} holds none above "
                    f"{np.finfo(kept).max:.3g}: they are kept as infinity, and cannot be verified",
                )

    def pop_precision_losses(self) -> list[str]:
        """Return what copying has lost that was not taken from here yet, a sentence each.

        Values are rounded without anybody having asked for it, or are too large.
        """
        found, self._precision_losses = self._precision_losses, []
        return found

    def _note_loss(self, about: str, message: str) -> None:
        if about not in self._noted:
            self._noted.add(about)
            self._precision_losses.append(f"{self._module.path or 'the model'} {message}")


def to_numpy(values: Tensor) -> Array:
    """Return the values as an array: in their own type, or the one that holds all its values."""
    values = values.detach().cpu()
    if str(values.dtype).removeprefix("torch.") != numpy_type(values.dtype):
        values = values.float()
    array: Array = values.numpy()
    return array


#: Copies lie end to end in pieces of memory of this size: from 4 MiB on NumPy asks for huge pages,
#: and the first copy into each would wait until all of it is zeroed. Bytes.
SEGMENT_BYTES = 1024 * 1024

#: Each copy begins on a multiple of this. Bytes.
ALIGNMENT = 64


class CopyBuffer:
    """Copies values. From any thread.

    Args:
        size: How much memory that nobody uses any more is kept to be used again, in bytes.
    """

    def __init__(self, size: int) -> None:
        # Rows of a trace in memory stay, and would keep the memory of what is soon dropped.
        self._lasting, self._passing = _SegmentPool(size), _SegmentPool(size)

    def copy(self, values: Tensor) -> Tensor:
        """Return a copy that is soon dropped."""
        return self._passing.copy(values)

    def copy_lasting(self, values: Tensor) -> Tensor:
        """Return a copy that may be part of the trace."""
        return self._lasting.copy(values)


class _SegmentPool:
    """Pieces of memory, each used again as soon as no tensor or array lies in it any more."""

    def __init__(self, size: int) -> None:
        self._spare = size // SEGMENT_BYTES
        self._free: list[Tensor] = []
        # Those that are in use, and what says when they are not.
        self._in_use: dict[int, tuple[Tensor, weakref.ref[Array]]] = {}
        self._numbers = itertools.count()
        self._current: Array | None = None
        self._typed: dict[torch.dtype, Tensor] = {}
        self._next = SEGMENT_BYTES
        self._lock = threading.Lock()

    def copy(self, values: Tensor) -> Tensor:
        """Return a copy, in memory of its own where it is large or on a device."""
        size = values.nbytes
        if values.device.type != "cpu" or size > SEGMENT_BYTES:
            return values.clone()
        with self._lock:
            start = self._next
            if self._current is None or start + size > SEGMENT_BYTES:
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
        memory = self._free.pop() if self._free else _new_segment()
        # All that lies in the piece keeps this view of it.
        self._current = memory.numpy()
        number = next(self._numbers)
        self._in_use[number] = memory, weakref.ref(self._current, partial(self._returned, number))

    def _returned(self, number: int, _: object) -> None:
        # In any thread at any time, also in one that holds the lock.
        memory, _ = self._in_use.pop(number)
        if len(self._free) < self._spare:
            self._free.append(memory)

    def _of_type(self, dtype: torch.dtype) -> Tensor:
        # It is written to in any mode that the model is called in.
        with torch.inference_mode(False):
            memory = torch.from_numpy(self._current).view(dtype)
        self._typed[dtype] = memory
        return memory


def _new_segment() -> Tensor:
    # It is written to in any mode that the model is called in.
    with torch.inference_mode(False):
        return torch.empty(SEGMENT_BYTES, dtype=torch.uint8, device="cpu")


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
