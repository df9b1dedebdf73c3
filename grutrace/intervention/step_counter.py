"""Count the steps of sequences over the calls of a decoder.

A decoder calls its layer once per step, with the state that an earlier call returned. The state
says which sequences go on: the very tensor, or rows with the same values. Any other state starts
new sequences, and so does a state of zeros.

B sequences in a batch, L layers, H hidden size.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[np.int64]

#: Number of calls whose final states are remembered: streams that may take turns on one layer.
REMEMBERED_CALLS = 16


class Progress(NamedTuple):
    """How far the sequences of a call have come, in the kernel's batch order.

    Attributes:
        steps: (B,) steps of each before the call.
        positions: (B,) position of each in the batch in which it started.
        is_known: Whether each sequence continues one, or starts from zeros.
    """

    steps: Integers
    positions: Integers
    is_known: bool = True


class _Ended(NamedTuple):
    """The end of a call.

    Attributes:
        final: (L, B, H) its final states.
        version: PyTorch's version counter of these states.
        progress: How far the sequences had come after it.
    """

    final: Tensor
    version: int | None
    progress: Progress


class StepCounter:
    """Counts the steps of the sequences of one module. Not for several threads at once."""

    def __init__(self) -> None:
        self._ended: deque[_Ended] = deque(maxlen=REMEMBERED_CALLS)

    def before(self, initial: Tensor, positions: Integers) -> Progress:
        """Return how far the sequences of a call have come before it.

        Args:
            initial: (L, B, H) the states that the call starts from.
            positions: (B,) the user's batch index of each of the kernel's sequences.
        """
        new = Progress(np.zeros(len(positions), np.int64), positions)
        for ended in reversed(self._ended):
            if _is_same(initial, ended) and len(ended.progress.steps) == len(positions):
                return ended.progress
        is_new = ~(initial != 0).any(0).any(-1).cpu().numpy()
        if is_new.all():
            return new
        return self._match(initial, new, is_new)

    def _match(self, initial: Tensor, new: Progress, is_new: npt.NDArray[np.bool_]) -> Progress:
        """Match each row by its values; the latest call first."""
        remaining = {row: key for row, key in enumerate(_keys(initial)) if not is_new[row]}
        steps, positions = new.steps.copy(), new.positions.copy()
        for ended in reversed(self._ended):
            if not remaining:
                break
            ends: dict[bytes, list[int]] = {}
            for row, key in enumerate(_keys(ended.final)):
                ends.setdefault(key, []).append(row)
            for row, key in list(remaining.items()):
                rows = ends.get(key)
                if rows:
                    # Of equal rows, as many go on in the same order.
                    source = rows.pop(0) if len(rows) > 1 else rows[0]
                    steps[row] = ended.progress.steps[source]
                    positions[row] = ended.progress.positions[source]
                    del remaining[row]
        return Progress(steps, positions, not remaining)

    def add(self, final: Tensor, progress: Progress, lengths: Integers) -> None:
        """Remember the end of a call.

        Args:
            final: (L, B, H) its final states.
            progress: How far the sequences had come before it.
            lengths: (B,) its steps of each.
        """
        final = final.detach()
        version = None if final.is_inference() else final._version
        after = Progress(progress.steps + lengths, progress.positions)
        self._ended.append(_Ended(final, version, after))


def _is_same(initial: Tensor, ended: _Ended) -> bool:
    """Whether states are the very tensor that a call returned, unchanged."""
    final = ended.final
    return (
        initial.data_ptr() == final.data_ptr()
        and initial.shape == final.shape
        and (ended.version is None or initial.is_inference() or initial._version == ended.version)
        and (ended.version is None or final._version == ended.version)
    )


def _keys(states: Tensor) -> list[bytes]:
    """Return the bytes of each sequence's states, from (L, B, H)."""
    rows = states.detach().transpose(0, 1).flatten(1).contiguous().cpu()
    array = rows.view(torch.uint8).numpy() if rows.dtype is torch.bfloat16 else rows.numpy()
    return [row.tobytes() for row in array]
