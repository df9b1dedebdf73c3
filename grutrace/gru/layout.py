"""How the steps of a call lie in the kernel's tensors, and in which order they are recorded.

The kernel's order is by time: all sequences' first steps, then all second steps. The recorded
order is by sequence: the rows of the batch's first sequence, then those of the second, in time
order, without padding. See docs/format.md.

T steps, B sequences in a batch, H hidden size, N rows: the steps of all sequences together.

Some steps of a call, as a call of its own: which rows they are, and what they started from.

Of every sequence the steps of one range are kept, which may be another range for each. They are a
valid, shorter sequence, since the state before the first of them (in the order in which the layer
reads) is known: it is a state of the call, or the one that the call started from.

T steps, B sequences in a batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.records import Array

#: Types that NumPy does not have, and the ones that hold all their values.
_NUMPY_TYPES = {torch.bfloat16: "float32"}


def numpy_type(dtype: torch.dtype) -> str:
    """Return the name of the NumPy type that holds every value of a torch type."""
    return _NUMPY_TYPES.get(dtype) or str(dtype).removeprefix("torch.")


def has_dtype(values: Tensor, dtype: npt.DTypeLike) -> bool:
    """Whether an array of this type can share memory with a tensor."""
    held = _held_type(values.dtype)
    # To NumPy, no type is float64.
    return values.device.type == "cpu" and held is not None and held == dtype


@lru_cache
def _held_type(dtype: torch.dtype) -> np.dtype[Any] | None:
    """Return NumPy's own name of a torch type; None if it has none."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(name) if name == numpy_type(dtype) else None


def copy_cast(target: Tensor, values: Tensor) -> None:
    """Copy values into memory of NumPy's, each rounded to the nearest that its type has.

    torch makes a float16 of a float64 by way of float32. That rounds twice, and one value in some
    ten thousand ends up a spacing away from the nearest.
    """
    if values.dtype == torch.float64 and target.dtype == torch.float16:
        with np.errstate(over="ignore"):
            target.numpy()[...] = values.detach().clone().cpu().numpy()
    else:
        target.copy_(values)


class OutputBuffer(NamedTuple):
    """Memory for one quantity of a call.

    Attributes:
        values: To be written to, in the kernel's order and shape.
        rows: Returns what was written as (N, width), sequence by sequence.
    """

    values: Tensor
    rows: Callable[[], Array]


class SequenceLayout(Protocol):
    """The steps of one call."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(B,) number of steps of each sequence, in the order of the user's batch."""

    @property
    def columns(self) -> npt.NDArray[np.int64]:
        """(B,) the kernel's batch place of each sequence, in the order of the user's batch."""

    def gather(
        self, values: Tensor, times: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> Tensor:
        """Gather values, one a step in the kernel's order, of some steps: (n, width).

        Args:
            values: Those of all steps.
            times: (n,) which steps.
            columns: (n,) of which sequences, by the kernel's batch place.
        """

    def previous(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Return the state before each step, in the kernel's order and shape.

        Args:
            hidden: The states after each step, as the kernel returned them.
            initial: (B, H) the states before the first steps, in the kernel's batch order.
            reverse: Whether the layer reads from the last step to the first.
        """

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the state before each step for some steps at a time.

        Args:
            hidden: As for `previous`.
            initial: Likewise.
            size: Steps of all sequences together that a block has, about.
            reverse: As for `previous`.

        Yields:
            Where on the first axis of the kernel's order they are, and the states. They may share
            memory with the arguments.
        """

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return memory for one quantity, on the CPU, whose rows need not be copied if possible."""

    def previous_product(
        self,
        product: Callable[[Tensor], Tensor],
        hidden: Tensor,
        initial: Tensor,
        *,
        reverse: bool,
    ) -> Tensor:
        """Return a product of the state before each step, without gathering those states.

        Args:
            product: A function of each state on its own, from (..., H) to (..., R).
            hidden: As for `previous`.
            initial: Likewise.
            reverse: Likewise.
        """

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Copy values, one a step in the kernel's order, to (N, width), sequence by sequence.

        Args:
            values: In the kernel's shape, on any device.
            dtype: NumPy type of the copy.
        """

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Return the same on the device of the values, in memory of its own."""

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Return values that nobody else will change as `to_rows`; not copied if possible."""

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Bring (B, width) from the kernel's batch order into the user's. May be a view."""

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Return (B, H), in the user's batch order, the state after each sequence's last step.

        For the reverse direction the last step that is made is the sequence's first.
        """


class PaddedLayout:
    """The steps of a padded batch (T, B, width): every sequence has T of them."""

    def __init__(self, length: int, batch: int) -> None:
        self._length, self._batch = length, batch

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(B,) all of them T."""
        return _equal_lengths(self._batch, self._length)

    @property
    def columns(self) -> npt.NDArray[np.int64]:
        """(B,) the same places: the kernel keeps a padded batch in the user's order."""
        return np.arange(self._batch)

    def gather(
        self, values: Tensor, times: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> Tensor:
        """Gather (n, width) of (T, B, width)."""
        return values[tuple(torch.from_numpy(each).to(values.device) for each in (times, columns))]

    def previous(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Shift the states by one step, (T, B, H)."""
        if reverse:
            return torch.cat((hidden[1:], initial.unsqueeze(0)))
        return torch.cat((initial.unsqueeze(0), hidden[:-1]))

    def previous_product(
        self,
        product: Callable[[Tensor], Tensor],
        hidden: Tensor,
        initial: Tensor,
        *,
        reverse: bool,
    ) -> Tensor:
        """Put the products of the initial states before those of all but the last, (T, B, R)."""
        first = product(initial).unsqueeze(0)
        if self._length == 1:
            return first
        others = product(hidden[1:] if reverse else hidden[:-1])
        return torch.cat((others, first) if reverse else (first, others))

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield some times of (T, B, H) at once; all but one of them share its memory."""
        times = max(1, size // max(1, self._batch))
        for first in range(0, self._length, times):
            last = min(first + times, self._length)
            if reverse and last == self._length:
                states = torch.cat((hidden[first + 1 :], initial.unsqueeze(0)))
            elif reverse:
                states = hidden[first + 1 : last + 1]
            elif not first:
                states = torch.cat((initial.unsqueeze(0), hidden[: last - 1]))
            else:
                states = hidden[first - 1 : last - 1]
            yield slice(first, last), states

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return memory in which the rows of a sequence lie one after another."""
        rows = np.empty((self._batch, self._length, width), dtype)
        joined = rows.reshape(self._batch * self._length, width)
        return OutputBuffer(torch.from_numpy(rows).transpose(0, 1), lambda: joined)

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Copy (T, B, width) to (B * T, width)."""
        # Memory of NumPy's comes in huge pages where it is large: half the time of torch's.
        rows = np.empty((self._batch, self._length, values.shape[-1]), dtype)
        copy_cast(torch.from_numpy(rows), values.transpose(0, 1))
        return rows.reshape(self._batch * self._length, values.shape[-1])

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Copy (T, B, width) to (B * T, width)."""
        rows = values.transpose(0, 1).contiguous()
        rows = rows.clone() if rows.data_ptr() == values.data_ptr() else rows
        return rows.view(self._batch * self._length, values.shape[-1])

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Return (T, B, width), which may lie in memory as `allocate` does, as (B * T, width)."""
        rows = values.transpose(0, 1)
        if not rows.is_contiguous() or not has_dtype(values, dtype):
            return self.to_rows(values, dtype)
        array: Array = rows.detach().numpy()
        return array.reshape(self._batch * self._length, values.shape[-1])

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Return the values as they are: the kernel keeps a padded batch in the user's order."""
        return values

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Return the states at the last step, or at the first for the reverse direction."""
        return hidden[0] if reverse else hidden[-1]


@lru_cache(maxsize=1024)
def _equal_lengths(batch: int, length: int) -> npt.NDArray[np.int64]:
    lengths = np.full(batch, length, dtype=np.int64)
    lengths.flags.writeable = False
    return lengths


class PackedLayout:
    """The steps of a PackedSequence's data (N, width).

    Args:
        batch_sizes: (T,) how many sequences, longest first, have each step.
        sorted_indices: (B,) the user's place of each of the kernel's sequences; None where the
            user gave them sorted by length.
    """

    def __init__(self, batch_sizes: Tensor, sorted_indices: Tensor | None) -> None:
        # By way of a list: NumPy's view of a tensor makes its storage unresizable for good.
        self._batch_sizes: npt.NDArray[np.int64] = np.array(batch_sizes.tolist(), np.int64)
        batch = int(self._batch_sizes[0])
        self._user_rows = np.arange(batch)
        if sorted_indices is not None:
            self._user_rows = np.array(sorted_indices.tolist(), np.int64)

    @cached_property
    def _sorted_lengths(self) -> npt.NDArray[np.int64]:
        lengths = np.searchsorted(-self._batch_sizes, -np.arange(len(self._user_rows)), side="left")
        return lengths.astype(np.int64)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """(T,) the row of each time's first sequence."""
        ends = np.cumsum(self._batch_sizes, dtype=np.int64)
        return ends - self._batch_sizes

    @cached_property
    def _times(self) -> npt.NDArray[np.int64]:
        """(N,) the time of each row."""
        return np.repeat(np.arange(len(self._batch_sizes)), self._batch_sizes)

    @cached_property
    def _columns(self) -> npt.NDArray[np.int64]:
        """(N,) the kernel's batch place of each row."""
        return np.arange(len(self._times)) - self._starts[self._times]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(B,) in the user's order."""
        lengths = np.empty_like(self._sorted_lengths)
        lengths[self._user_rows] = self._sorted_lengths
        return lengths

    @property
    def columns(self) -> npt.NDArray[np.int64]:
        """(B,) where sorting by length has put each."""
        return np.argsort(self._user_rows)

    def gather(
        self, values: Tensor, times: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> Tensor:
        """Gather (n, width) of (N, width)."""
        rows = torch.from_numpy(self._starts[times] + columns)
        return values.index_select(0, rows.to(values.device))

    def previous_rows(self, *, reverse: bool) -> npt.NDArray[np.int64]:
        """Return (N,), for each row, the row of the state before it in [initial; hidden].

        The first B rows of that are the initial states, in the kernel's batch order.
        """
        batch = len(self._user_rows)
        if reverse:
            last = self._times + 1 == self._sorted_lengths[self._columns]
            neighbours = np.minimum(self._times + 1, len(self._starts) - 1)
        else:
            last = self._times == 0
            neighbours = np.maximum(self._times - 1, 0)
        return np.where(last, self._columns, batch + self._starts[neighbours] + self._columns)

    def previous(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Gather the state before each row, (N, H)."""
        rows = torch.from_numpy(self.previous_rows(reverse=reverse)).to(hidden.device)
        return torch.cat((initial, hidden)).index_select(0, rows)

    def previous_product(
        self,
        product: Callable[[Tensor], Tensor],
        hidden: Tensor,
        initial: Tensor,
        *,
        reverse: bool,
    ) -> Tensor:
        """Gather the product of the state before each row, (N, R)."""
        return self.previous(product(hidden), product(initial), reverse=reverse)

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows of (N, H) at once, gathered."""
        rows = torch.from_numpy(self.previous_rows(reverse=reverse)).to(hidden.device)
        states = torch.cat((initial, hidden))
        for first in range(0, len(rows), size):
            part = slice(first, min(first + size, len(rows)))
            yield part, states.index_select(0, rows[part])

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return memory in the kernel's order, which is gathered in the end."""
        values = torch.from_numpy(np.empty((len(self._times), width), dtype))
        return OutputBuffer(values, lambda: self.to_rows(values, dtype))

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Copy (N, width) sequence by sequence."""
        rows = np.empty(values.shape, dtype)
        order = self._order.to(values.device)
        copy_cast(torch.from_numpy(rows), values.index_select(0, order))
        return rows

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Gather (N, width) sequence by sequence."""
        return values.index_select(0, self._order.to(values.device))

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Gather (N, width) sequence by sequence."""
        return self.to_rows(values, dtype)

    @cached_property
    def _order(self) -> Tensor:
        """(N,) the kernel's row of each recorded row."""
        return torch.from_numpy(np.lexsort((self._times, self._user_rows[self._columns])))

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Bring (B, width) into the user's order."""
        order = np.argsort(self._user_rows)
        return values.index_select(0, torch.from_numpy(order).to(values.device))

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Gather the last state that was made of each sequence."""
        last = np.zeros_like(self._sorted_lengths) if reverse else self._sorted_lengths - 1
        rows = self._starts[last] + np.arange(len(last))
        return self.unsort_batch(hidden.index_select(0, torch.from_numpy(rows).to(hidden.device)))


Integers = npt.NDArray[np.int64]


class StepWindow(Protocol):
    """The steps that are kept of a call."""

    @property
    def steps(self) -> SequenceLayout:
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


def make_window(steps: SequenceLayout, first: Integers, count: Integers) -> StepWindow:
    """Return the window of a call that keeps these steps.

    Args:
        steps: Of the call.
        first: (B,) the first kept step of each sequence, in the user's order.
        count: (B,) how many of each; not all 0.
    """
    if isinstance(steps, PaddedLayout) and (first == first[0]).all() and (count == count[0]).all():
        return _TimeWindow(int(first[0]), int(count[0]), len(first))
    return _RowWindow(steps, first, count)


class _TimeWindow:
    """The same steps of all sequences of a padded batch: views."""

    def __init__(self, first: int, count: int, batch: int) -> None:
        self._first, self._stop = first, first + count
        self.steps: SequenceLayout = PaddedLayout(count, batch)

    def rows(self, values: Tensor) -> Tensor:
        return values[self._first : self._stop]

    def initial(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        before = self._stop if reverse else self._first - 1
        return hidden[before] if 0 <= before < len(hidden) else initial


class _RowWindow:
    """Other steps of each sequence: rows are gathered, and lie as those of a packed batch."""

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
        before = self._first + self._count if reverse else self._first - 1
        inside = (self._count > 0) & (before >= 0) & (before < self._lengths)
        found = initial[torch.from_numpy(self._columns).to(initial.device)]
        if inside.any():
            states = self._layout.gather(hidden, before[inside], self._columns[inside])
            found[torch.from_numpy(inside).to(found.device)] = states.to(found.dtype)
        return found
