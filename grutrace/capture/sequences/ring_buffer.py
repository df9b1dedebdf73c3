"""Memory of a fixed size for the states of calls. New states replace the oldest."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grutrace.capture.sequences.final_states import FinalStates, FinalStatesBlock

#: Estimated Python overhead of each call, and of each of its states. Bytes.
CALL_OVERHEAD, ROW_OVERHEAD = 1024, 256

#: Minimum fraction of a ring buffer's bytes that a block of calls may take.
MIN_BLOCK_FRACTION = 1 / 4


class RingBuffer:
    """Memory of a fixed size for the states of calls, one call after another.

    Separate allocations, between those of the model, would fragment the heap by much more than the
    size of the states.

    Args:
        limit: Maximum bytes, with the estimated overhead of Python objects.
        freed: Fraction of the bytes that is freed at a time.
        drop: Called with the calls that are about to be overwritten.
    """

    def __init__(
        self,
        limit: int,
        freed: float,
        drop: Callable[[list[FinalStates | FinalStatesBlock]], None],
    ) -> None:
        self._limit, self._freed, self._drop = limit, freed, drop
        self._room: Tensor | None = None
        self._next = 0
        # The position of each call, and the call. A call may have moved to other memory since.
        self._calls: deque[tuple[int, FinalStates | FinalStatesBlock]] = deque()

    def __iter__(self) -> Iterator[FinalStates]:
        """Iterate over all calls in this memory, the oldest first."""
        for start, call in self._calls:
            if self._has(start, call):
                yield from call.calls() if isinstance(call, FinalStatesBlock) else (call,)

    def calls_per_block(self, states: Tensor) -> int:
        """Return how many calls with states like these, (B, W), one block may contain."""
        overhead = ROW_OVERHEAD * states.shape[0] + CALL_OVERHEAD
        return int(self._limit * max(self._freed, MIN_BLOCK_FRACTION)) // (states.nbytes + overhead)

    def put(self, call: FinalStates | FinalStatesBlock, states: Tensor) -> bool:
        """Copy the states of a call into this memory, in place of the oldest calls.

        Args:
            call: The call, or a block of calls.
            states: (B, W) its states, which are in other memory; (n, B, W) of a block.

        Returns:
            Whether the states are small enough.
        """
        calls = len(states) if isinstance(call, FinalStatesBlock) else 1
        overhead = ROW_OVERHEAD * len(call) + CALL_OVERHEAD * calls
        size = states.numel() + overhead // states.element_size()
        capacity = self._limit // states.element_size()
        if size > capacity:
            return False
        room = self._room
        if room is None or room.dtype is not states.dtype or room.device != states.device:
            self._next = 0
            self._clear(math.inf)
            # An inference tensor could not be written to outside inference_mode.
            with torch.inference_mode(False):
                room = torch.empty(capacity, dtype=states.dtype, device=states.device)
            self._room = room
        if self._next + size > capacity:
            self._clear(math.inf)
            self._next = 0
        if self._calls and self._next <= self._calls[0][0] < self._next + size:
            # Free more than needed: freeing many calls together costs less.
            self._clear(self._next + max(size, capacity * self._freed))
        call.ring, call.start = self, self._next
        strides = (states[0].numel(), states.shape[-1], 1)[-states.dim() :]
        call.states = room.as_strided(states.shape, strides, self._next)
        call.states.copy_(states)
        self._calls.append((self._next, call))
        self._next += size
        return True

    def _clear(self, stop: float) -> None:
        """Drop the oldest calls, between the current position and this one."""
        dropped = []
        while self._calls and self._next <= self._calls[0][0] < stop:
            start, call = self._calls.popleft()
            if self._has(start, call):
                dropped.append(call)
        if dropped:
            self._drop(dropped)

    def _has(self, start: int, call: FinalStates | FinalStatesBlock) -> bool:
        return call.ring is self and call.start == start
