"""Copies from a CUDA device that the model's stream does not wait for.

What is to be kept is first brought, on the model's own stream, into memory of its own, so that
whatever the model does next cannot reach it. From there a stream beside the model's copies it into
pinned memory. Who reads that memory waits for the stream first.

Nobody has run this on a device yet: tests/test_cuda.py has what would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grutrace.record import Array


class SideStream:
    """One stream a device, for one module; from any thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._of_thread = _Waiting()

    def takes(self, values: Tensor) -> bool:
        """Whether these values are copied here."""
        return values.is_cuda

    def copy(self, own: Tensor, dtype: np.dtype[Any]) -> Array:
        """Begin to copy; the array is whole once `take_ready` has returned and been called.

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

    def take_ready(self) -> Callable[[], None] | None:
        """Return what waits for all that this thread has begun to copy; None if that is nothing."""
        ready, self._of_thread.ready = self._of_thread.ready, None
        return ready


class _Waiting(threading.local):
    ready: Callable[[], None] | None = None
