"""Some steps of a call, as a call of its own: which rows they are, and what they started from.

Of every sequence the steps of one range are kept, which may be another range for each. They are a
valid, shorter sequence, since the state before the first of them (in the order in which the layer
reads) is known: it is a state of the call, or the one that the call started from.

T steps, B sequences in a batch, H hidden size.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.gru.steps import PackedSteps, PaddedSteps, Steps

Integers = npt.NDArray[np.int64]


class Window(Protocol):
    """The steps that are kept of a call."""

    @property
    def steps(self) -> Steps:
        """Their layout."""

    def rows(self, values: Tensor) -> Tensor:
        """Return the kept ones of values, one a step in the kernel's order. May be a view."""

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Return the state before each sequence's kept steps, (B, H), in the order of `steps`.

        That of a sequence without any is the one that it started the call from.

        Args:
            hidden: The states of all steps, as the kernel returned them.
            initial: (B, H) the states before the first steps, in the kernel's batch order.
            reverse: Whether the layer reads from the last step to the first.
        """


def window(steps: Steps, first: Integers, count: Integers) -> Window:
    """Return the window of a call that keeps these steps.

    Args:
        steps: Of the call.
        first: (B,) the first kept step of each sequence, in the user's order.
        count: (B,) how many of each; not all 0.
    """
    if isinstance(steps, PaddedSteps) and (first == first[0]).all() and (count == count[0]).all():
        return _TimeWindow(int(first[0]), int(count[0]), len(first))
    return _RowWindow(steps, first, count)


class _TimeWindow:
    """The same steps of all sequences of a padded batch: views."""

    def __init__(self, first: int, count: int, batch: int) -> None:
        self._first, self._stop = first, first + count
        self.steps: Steps = PaddedSteps(count, batch)

    def rows(self, values: Tensor) -> Tensor:
        return values[self._first : self._stop]

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        before = self._stop if reverse else self._first - 1
        return hidden[before] if 0 <= before < len(hidden) else initial


class _RowWindow:
    """Other steps of each sequence: rows are gathered, and lie as those of a packed batch."""

    def __init__(self, steps: Steps, first: Integers, count: Integers) -> None:
        order = np.argsort(-count, kind="stable")
        self._of_call = steps
        self._first, self._count = first[order], count[order]
        self._lengths, self._columns = steps.lengths[order], steps.columns[order]
        sizes = (self._count > np.arange(self._count[0])[:, np.newaxis]).sum(1)
        self.steps: Steps = PackedSteps(torch.from_numpy(sizes), torch.from_numpy(order))
        times = np.repeat(np.arange(len(sizes)), sizes)
        sequences = np.concatenate([np.arange(size) for size in sizes])
        self._row_times = self._first[sequences] + times
        self._row_columns = self._columns[sequences]

    def rows(self, values: Tensor) -> Tensor:
        return self._of_call.at(values, self._row_times, self._row_columns)

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        before = self._first + self._count if reverse else self._first - 1
        inside = (self._count > 0) & (before >= 0) & (before < self._lengths)
        found = initial[torch.from_numpy(self._columns).to(initial.device)]
        if inside.any():
            states = self._of_call.at(hidden, before[inside], self._columns[inside])
            found[torch.from_numpy(inside).to(found.device)] = states.to(found.dtype)
        return found
