"""A window: some steps of a call, in the form of a shorter call.

A window has one range of steps of each sequence. These steps are a valid, shorter call, because
the state before them is known: it is a state of the call, or its initial state.

T steps, B sequences in a batch, H hidden size.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grutrace.gru.layout import Integers, PackedLayout, PaddedLayout, SequenceLayout


class StepWindow(Protocol):
    """A range of steps of each sequence of a call."""

    @property
    def steps(self) -> SequenceLayout:
        """The layout of these steps."""

    def rows(self, values: Tensor) -> Tensor:
        """Return the values of these steps. May be a view.

        Args:
            values: Values of all steps of the call, in the kernel's order and shape.
        """

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Return the state before these steps, (B, H), in the batch order of `steps`.

        A sequence without any such step has its initial state of the call.

        Args:
            hidden: The states of all steps, as the kernel returned them.
            initial: (B, H) the initial states of the call, in the kernel's batch order.
            reverse: Whether the layer reads from the last step to the first.
        """


def make_window(steps: SequenceLayout, first: Integers, count: Integers) -> StepWindow:
    """Return a window of a call.

    Args:
        steps: Layout of the call.
        first: (B,) first step of each sequence, in the user's batch order.
        count: (B,) number of steps of each sequence; not all 0.
    """
    if isinstance(steps, PaddedLayout) and (first == first[0]).all() and (count == count[0]).all():
        return _TimeWindow(int(first[0]), int(count[0]), len(first))
    return _RowWindow(steps, first, count)


class _TimeWindow:
    """The same steps of all sequences of a padded batch, as views."""

    def __init__(self, start: int, count: int, batch: int) -> None:
        self._start, self._stop = start, start + count
        self.steps: SequenceLayout = PaddedLayout(count, batch)

    def rows(self, values: Tensor) -> Tensor:
        return values[self._start : self._stop]

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        previous = self._stop if reverse else self._start - 1
        return hidden[previous] if 0 <= previous < len(hidden) else initial


class _RowWindow:
    """Different steps of each sequence, gathered into the layout of a packed batch."""

    def __init__(self, steps: SequenceLayout, first: Integers, count: Integers) -> None:
        order = np.argsort(-count, kind="stable")
        self._layout = steps
        self._first, self._count = first[order], count[order]
        self._lengths, self._columns = steps.lengths[order], steps.columns[order]
        sizes = (self._count > np.arange(self._count[0])[:, np.newaxis]).sum(1)
        self.steps: SequenceLayout = PackedLayout(torch.from_numpy(sizes), torch.from_numpy(order))
        times = np.repeat(np.arange(len(sizes)), sizes)
        sequences = np.concatenate([np.arange(size) for size in sizes])
        self._row_times = self._first[sequences] + times
        self._row_columns = self._columns[sequences]

    def rows(self, values: Tensor) -> Tensor:
        return self._layout.gather(values, self._row_times, self._row_columns)

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        previous = self._first + self._count if reverse else self._first - 1
        is_step = (self._count > 0) & (previous >= 0) & (previous < self._lengths)
        result = initial[torch.from_numpy(self._columns).to(initial.device)]
        if is_step.any():
            states = self._layout.gather(hidden, previous[is_step], self._columns[is_step])
            result[torch.from_numpy(is_step).to(result.device)] = states.to(result.dtype)
        return result
