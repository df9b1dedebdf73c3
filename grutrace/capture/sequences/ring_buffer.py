"""Memory of a fixed size for the states of calls, where the oldest make room for the newest."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grutrace.capture.sequences.final_states import FinalStates, FinalStatesBlock

#: Estimated Python overhead of each call, and of each of its states. Bytes.
CALL_OVERHEAD, ROW_OVERHEAD = 1024, 256

#: The part of a ring buffer's bytes that a block of calls may take, at least.
MIN_BLOCK_FRACTION = 1 / 4


class RingBuffer:
    """Memory of a fixed size that calls' states lie in, one call after another.

    Allocated one by one, between what the model allocates and frees, states would fragment the heap
    by much more than they take themselves.

    Args:
        limit: Bytes, with what is estimated beside the states.
        freed: The part of them that is freed at once.
        drop: Is told of calls that have to go, while their states are still there.
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
        # Where each begins, and the call. One that was moved since lies elsewhere by now.
        self._calls: deque[tuple[int, FinalStates | FinalStatesBlock]] = deque()

    def __iter__(self) -> Iterator[FinalStates]:
        """All calls that lie here, the oldest first."""
        for start, call in self._calls:
            if self._has(start, call):
                yield from call.calls() if isinstance(call, FinalStatesBlock) else (call,)

    def calls_per_block(self, states: Tensor) -> int:
        """Return how many calls with states like these, (B, W), may be put here as one block."""
        overhead = ROW_OVERHEAD * states.shape[0] + CALL_OVERHEAD
        return int(self._limit * max(self._freed, MIN_BLOCK_FRACTION)) // (states.nbytes + overhead)

    def put(self, call: FinalStates | FinalStatesBlock, states: Tensor) -> bool:
        """Copy the states of a call to here, where the oldest make room; whether they fit at all.

        Args:
            call: The call, or a block of calls.
            states: (B, W) its states, which do not lie here; (n, B, W) of a block.
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
            # It is written to in any mode that the model is called in.
            with torch.inference_mode(False):
                room = torch.empty(capacity, dtype=states.dtype, device=states.device)
            self._room = room
        if self._next + size > capacity:
            self._clear(math.inf)
            self._next = 0
        if self._calls and self._next <= self._calls[0][0] < self._next + size:
            # Some more at once: it costs less than one by one.
            self._clear(self._next + max(size, capacity * self._freed))
        call.ring, call.start = self, self._next
        strides = (states[0].numel(), states.shape[-1], 1)[-states.dim() :]
        call.states = room.as_strided(states.shape, strides, self._next)
        call.states.copy_(states)
        self._calls.append((self._next, call))
        self._next += size
        return True

    def _clear(self, stop: float) -> None:
        """Have the oldest calls go that lie from the present place to this one."""
        dropped = []
        while self._calls and self._next <= self._calls[0][0] < stop:
            start, call = self._calls.popleft()
            if self._has(start, call):
                dropped.append(call)
        if dropped:
            self._drop(dropped)

    def _has(self, start: int, call: FinalStates | FinalStatesBlock) -> bool:
        return call.ring is self and call.start == start
