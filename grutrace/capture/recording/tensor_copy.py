"""Copy tensors into rows of the module's data type, on the CPU and from CUDA devices.

On a CUDA device, values are first copied on the model's own stream into separate memory, so that
the model cannot change them. A side stream copies this memory into pinned host memory. The model
does not wait for the side stream; a reader of the pinned memory does. The project's checks with a
CUDA device are in tests/test_cuda.py.

On a CPU, copies lie in reused memory. Separate allocations between the model's own allocations
would move the model's memory to new addresses in each call, and so to pages that the system must
provide first. A call of 0.8 ms (T1 B32 H512) would take 0.1 ms longer.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from grutrace.gru.cell import ALIGNMENT
from grutrace.gru.layout import SequenceLayout, copy_cast, has_dtype, numpy_type
from grutrace.records import Array, ModuleInfo


class SideStream:
    """One CUDA stream per device, for one module. Safe to use from any thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._of_thread = _PendingSync()

    def takes(self, values: Tensor) -> bool:
        """Whether the side stream copies these values."""
        return values.is_cuda

    def copy(self, own: Tensor, dtype: np.dtype[Any]) -> Array:
        """Start a copy. The array is complete once the function from `pop_sync` returns.

        Args:
            own: Values that will not change.
            dtype: Data type of the array.
        """
        stream = self._streams.get(own.device)
        if stream is None:
            stream_type: Any = torch.cuda.Stream
            stream = self._streams.setdefault(own.device, stream_type(own.device))
        stored: torch.dtype = getattr(torch, dtype.name)
        host = torch.empty(own.shape, dtype=stored, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            host.copy_(own, non_blocking=True)
        own.record_stream(stream)
        self._of_thread.ready = stream.record_event().synchronize
        array: Array = host.numpy()
        return array

    def pop_sync(self) -> Callable[[], None] | None:
        """Return a function that waits for this thread's copies; None if there are none."""
        ready, self._of_thread.ready = self._of_thread.ready, None
        return ready


class _PendingSync(threading.local):
    ready: Callable[[], None] | None = None


class RowConverter:
    """Copies tensors of one module into rows, and notes each kind of precision loss once.

    Args:
        module: The module.
        chosen: Whether the user chose the stored type. If so, only overflow is noted.
        copied: Whether rows keep the type of the weights for now, and are converted later.
        uses_side_stream: Whether copies from a device use a side stream. They occupy pinned
            memory, so they must be freed soon. Needs `copied`.

    Attributes:
        dtype: NumPy data type of the rows.
        stored: Torch data type of the stored rows.
    """

    def __init__(
        self,
        module: ModuleInfo,
        *,
        chosen: bool,
        copied: bool = False,
        uses_side_stream: bool = False,
    ) -> None:
        self._module = module
        self.dtype = np.dtype(module.weights_dtype if copied else module.dtype)
        self.stored: torch.dtype = getattr(torch, module.dtype)
        self._side = SideStream() if copied and uses_side_stream else None
        self._chosen = chosen
        self._noted: set[str] = set()
        self._precision_losses: list[str] = []

    def convert_steps(
        self, steps: SequenceLayout, values: Tensor, *, is_owned: bool = False
    ) -> Array:
        """Return the values of all steps as rows, (N, width), sequence by sequence.

        Args:
            steps: The layout of the call's steps.
            values: One value per step, in the kernel's order and shape.
            is_owned: Whether no other code can change the values, so that a copy is unnecessary.
        """
        if self._side is not None and self._side.takes(values):
            return self._copy_async(values, steps.to_device_rows(values))
        rows = (steps.as_rows if is_owned else steps.to_rows)(values, self.dtype)
        if values.dtype != self.stored:
            self._note_precision_loss(values, rows)
        return rows

    def convert_series(self, values: Tensor) -> Array:
        """Return the values of a series, (n, B, width), as (n * B, width).

        The values are copied only if the type differs or they are not contiguous.
        """
        if values.is_contiguous() and has_dtype(values, self.dtype):
            rows: Array = values.flatten(0, 1).numpy()
            if values.dtype != self.stored:
                self._note_precision_loss(values, rows)
            return rows
        return self.of(values.flatten(0, 1))

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
        """Return a function that waits for this thread's copies; None if there are none."""
        return None if self._side is None else self._side.pop_sync()

    def _copy_async(self, values: Tensor, own: Tensor) -> Array:
        side = cast("SideStream", self._side)
        rows = side.copy(own, self.dtype)
        if values.dtype != self.stored and (ready := side.pop_sync()) is not None:
            ready()
            self._note_precision_loss(values, rows)
        return rows

    def _note_precision_loss(self, values: Tensor, rows: Array) -> None:
        computed, stored = numpy_type(values.dtype), np.dtype(self._module.dtype)
        if np.can_cast(computed, stored):
            return
        if not self._chosen:
            self._note_loss(
                "rounded",
                f"computes in {computed} by now, and was in {stored} when it was attached: its "
                f"rows are rounded to {stored}",
            )
        with np.errstate(over="ignore"):
            infinite = np.isinf(rows.astype(stored, copy=False)).any()
        if infinite:
            finite = values[values.isfinite()]
            largest = finite.abs().max().item() if finite.numel() else 0.0
            if largest > float(np.finfo(stored).max):
                self._note_loss(
                    "overflow",
                    f"has values up to {largest:.3g}, and {stored} holds none above "
                    f"{np.finfo(stored).max:.3g}: they are kept as infinity, and cannot be "
                    "verified",
                )

    def pop_precision_losses(self) -> list[str]:
        """Return a sentence for each precision loss since the last call of this method.

        Values are rounded although the user did not choose the type, or overflow it.
        """
        losses, self._precision_losses = self._precision_losses, []
        return losses

    def _note_loss(self, about: str, message: str) -> None:
        if about not in self._noted:
            self._noted.add(about)
            self._precision_losses.append(f"{self._module.path or 'the model'} {message}")


def to_numpy(values: Tensor) -> Array:
    """Return the values as an array of the same type, or of a type that holds all its values."""
    values = values.detach().cpu()
    if str(values.dtype).removeprefix("torch.") != numpy_type(values.dtype):
        values = values.float()
    array: Array = values.numpy()
    return array


def _load_memory_functions() -> tuple[_CompareMemory, _CompareMemory, _CopyMemory]:
    """Return memcmp without the GIL, and memcmp and memmove with the GIL."""
    name = None if os.name == "posix" else "msvcrt"
    free, held = ctypes.CDLL(name), ctypes.PyDLL(name)
    comparisons: Any = free.memcmp, held.memcmp
    for function in comparisons:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        function.restype = ctypes.c_int
    move: Any = held.memmove
    move.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    move.restype = None
    return (*comparisons, move)


_CompareMemory: TypeAlias = Callable[[int, int, int], int]
_CopyMemory: TypeAlias = Callable[[int, int, int], None]

#: ``compare(a, b, n)`` is 0 if n bytes at two addresses are equal. ``copy_small(a, b, n)`` copies n
#: bytes from b to a. The small variants keep the GIL, because releasing it takes longer than the
#: work.
compare, compare_small, copy_small = _load_memory_functions()


#: Size of a memory segment, which holds several copies. Bytes.
SEGMENT_BYTES = 1024 * 1024


class CopyBuffer:
    """Copies tensors into reused memory. Safe to use from any thread.

    Args:
        size: Maximum bytes of unused memory of each kind.

    Attributes:
        lasting: Memory for rows of the trace.
        passing: Memory for temporary copies.
    """

    def __init__(self, size: int) -> None:
        # Two pools, because the rows of a trace in memory keep their segments alive.
        self.lasting, self.passing = SegmentPool(size), SegmentPool(size)

    def copy(self, values: Tensor) -> Tensor:
        """Return a temporary copy."""
        return self.passing.copy(values)

    def copy_lasting(self, values: Tensor) -> Tensor:
        """Return a copy that may be part of the trace."""
        return self.lasting.copy(values)


class SegmentPool:
    """Memory segments. A segment is reused when no tensor or array uses it.

    Args:
        size: Maximum bytes of unused memory.
    """

    def __init__(self, size: int) -> None:
        self._spare = size // SEGMENT_BYTES
        self._free: list[Tensor] = []
        # Segments in use, each with a weak reference whose callback marks it as unused.
        self._in_use: dict[int, tuple[Tensor, weakref.ref[Array]]] = {}
        self._numbers = itertools.count()
        self._current: Array | None = None
        self._typed: dict[torch.dtype, Tensor] = {}
        self._next = SEGMENT_BYTES
        self._lock = threading.Lock()

    def copy(self, values: Tensor) -> Tensor:
        """Return a copy. Large tensors and tensors on a device get memory of their own."""
        size = values.nbytes
        if values.device.type != "cpu" or size > SEGMENT_BYTES:
            return values.clone()
        return self.allocate(values.numel(), values.dtype).view(values.shape).copy_(values)

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory on the CPU for `count` values."""
        size = count * dtype.itemsize
        if size > SEGMENT_BYTES:
            return torch.empty(count, dtype=dtype, device="cpu")
        with self._lock:
            start = self._next
            if self._current is None or start + size > SEGMENT_BYTES:
                self._take()
                start = 0
            self._next = start + -(-size // ALIGNMENT) * ALIGNMENT
            memory = self._typed.get(dtype)
            if memory is None:
                memory = self._of_type(dtype)
        return memory.narrow(0, start // dtype.itemsize, count)

    def _take(self) -> None:
        """Make another segment the current one."""
        self._typed.clear()
        memory = self._free.pop() if self._free else _new_segment()
        # All copies in the segment keep this array alive.
        self._current = memory.numpy()
        number = next(self._numbers)
        self._in_use[number] = memory, weakref.ref(self._current, partial(self._returned, number))

    def _returned(self, number: int, _: object) -> None:
        # Runs in any thread at any time, even while that thread holds the lock.
        memory, _ = self._in_use.pop(number)
        if len(self._free) < self._spare:
            self._free.append(memory)

    def _of_type(self, dtype: torch.dtype) -> Tensor:
        # An inference tensor could not be written to outside inference_mode.
        with torch.inference_mode(False):
            memory = torch.from_numpy(self._current).view(dtype)
        self._typed[dtype] = memory
        return memory


def _new_segment() -> Tensor:
    # As in `_of_type`.
    with torch.inference_mode(False):
        return torch.empty(SEGMENT_BYTES, dtype=torch.uint8, device="cpu")
