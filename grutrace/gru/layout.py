"""The order of the steps of a call: in the kernel's tensors, and in the rows of a trace.

The kernel's order is by time: the first steps of all sequences, then all second steps. The order of
rows is by sequence: all steps of the first sequence of the batch in time order, then those of the
second, without padding. See docs/format.md.

T steps, B sequences in a batch, H hidden size, N rows: the steps of all sequences together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.records import Array

Integers: TypeAlias = npt.NDArray[np.int64]

#: Types that NumPy does not have, and NumPy types that hold all their values.
_NUMPY_TYPES = {torch.bfloat16: "float32"}


def numpy_type(dtype: torch.dtype) -> str:
    """Return the name of the NumPy type that holds every value of a torch type."""
    return _NUMPY_TYPES.get(dtype) or str(dtype).removeprefix("torch.")


def has_dtype(values: Tensor, dtype: npt.DTypeLike) -> bool:
    """Return whether an array of this type can share memory with a tensor."""
    tensor_dtype = _same_numpy_dtype(values.dtype)
    # NumPy takes None for float64, so `None == dtype` could be true.
    return values.device.type == "cpu" and tensor_dtype is not None and tensor_dtype == dtype


@lru_cache
def _same_numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """Return the NumPy type with the same values as a torch type; None if there is none."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(name) if name == numpy_type(dtype) else None


def copy_cast(target: Tensor, values: Tensor) -> None:
    """Copy values into NumPy memory, each rounded to the nearest value of the target type.

    torch converts float64 to float16 in two steps, through float32. That rounds twice, and about
    one value in ten thousand is then not the nearest.
    """
    if values.dtype == torch.float64 and target.dtype == torch.float16:
        with np.errstate(over="ignore"):
            target.numpy()[...] = values.detach().clone().cpu().numpy()
    else:
        target.copy_(values)


class OutputBuffer(NamedTuple):
    """Memory for one quantity of a call.

    Attributes:
        values: Memory to write to, in the kernel's order and shape.
        rows: Returns the written values as rows, (N, width).
    """

    values: Tensor
    rows: Callable[[], Array]


class SequenceLayout(Protocol):
    """The steps of one call."""

    @property
    def lengths(self) -> Integers:
        """(B,) number of steps of each sequence, in the user's batch order."""

    @property
    def columns(self) -> Integers:
        """(B,) the kernel's batch index of each sequence, in the user's batch order."""

    def gather(self, values: Tensor, times: Integers, columns: Integers) -> Tensor:
        """Gather the values of some steps, (n, width).

        Args:
            values: Values of all steps, in the kernel's order and shape.
            times: (n,) the step within each sequence.
            columns: (n,) the kernel's batch index of each sequence.
        """

    def previous(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Return the state before each step, in the kernel's order and shape.

        Args:
            hidden: The state after each step, as the kernel returned it.
            initial: (B, H) the initial states, in the kernel's batch order.
            reverse: Whether the layer reads from the last step to the first.
        """

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the state before each step, in blocks of steps.

        Args:
            hidden: As for `previous`.
            initial: As for `previous`.
            size: Approximate number of rows of a block.
            reverse: As for `previous`.

        Yields:
            The slice of the first axis that the block covers, and its states. They may share
            memory with the arguments.
        """

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return CPU memory for one quantity. If possible, its rows need no copy."""

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
            product: Maps states (..., H) to products (..., R), each state on its own.
            hidden: As for `previous`.
            initial: As for `previous`.
            reverse: As for `previous`.
        """

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Copy values to an array of rows, (N, width).

        Args:
            values: Values of all steps, in the kernel's order and shape, on any device.
            dtype: NumPy type of the copy.
        """

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Copy values to a tensor of rows, (N, width), on the same device."""

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Return values that no other code changes as rows, like `to_rows`; no copy if possible."""

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Return (B, width) in the user's batch order, from the kernel's. May be a view."""

    def from_kernel_rows(self, values: Tensor) -> Tensor:
        """Return (N, width) in the kernel's order in the kernel's shape."""

    def final_rows(self, *, reverse: bool) -> Integers:
        """Return the row, in the kernel's order, of the final state of each sequence, (B,)."""

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Return the final state of each sequence, (B, H), in the user's batch order.

        The reverse direction makes the first step of a sequence last.
        """


class PaddedLayout:
    """The steps of a padded batch (T, B, width): every sequence has T steps."""

    def __init__(self, length: int, batch: int) -> None:
        self._length, self._batch = length, batch

    @property
    def lengths(self) -> Integers:
        """(B,) T for each sequence."""
        return _equal_lengths(self._batch, self._length)

    @property
    def columns(self) -> Integers:
        """(B,) 0 to B - 1: the kernel keeps a padded batch in the user's order."""
        return np.arange(self._batch)

    def gather(self, values: Tensor, times: Integers, columns: Integers) -> Tensor:
        """Gather (n, width) of (T, B, width)."""
        time_index, column_index = torch.from_numpy(times), torch.from_numpy(columns)
        return values[time_index.to(values.device), column_index.to(values.device)]

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
        """Concatenate the products of the initial states and of all but the last, (T, B, R)."""
        initial_product = product(initial).unsqueeze(0)
        if self._length == 1:
            return initial_product
        if reverse:
            return torch.cat((product(hidden[1:]), initial_product))
        return torch.cat((initial_product, product(hidden[:-1])))

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of (T, B, H). All but the block with the initial states are views."""
        times = max(1, size // max(1, self._batch))
        for start in range(0, self._length, times):
            stop = min(start + times, self._length)
            if reverse and stop == self._length:
                states = torch.cat((hidden[start + 1 :], initial.unsqueeze(0)))
            elif reverse:
                states = hidden[start + 1 : stop + 1]
            elif not start:
                states = torch.cat((initial.unsqueeze(0), hidden[: stop - 1]))
            else:
                states = hidden[start - 1 : stop - 1]
            yield slice(start, stop), states

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return memory in which the rows of each sequence are adjacent."""
        values = np.empty((self._batch, self._length, width), dtype)
        rows = values.reshape(self._batch * self._length, width)
        return OutputBuffer(torch.from_numpy(values).transpose(0, 1), lambda: rows)

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Copy (T, B, width) to (B * T, width)."""
        # NumPy allocates large arrays in huge pages, so writing them takes half as long as torch's.
        rows = np.empty((self._batch, self._length, values.shape[-1]), dtype)
        copy_cast(torch.from_numpy(rows), values.transpose(0, 1))
        return rows.reshape(self._batch * self._length, values.shape[-1])

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Copy (T, B, width) to (B * T, width)."""
        rows = values.transpose(0, 1).contiguous()
        rows = rows.clone() if rows.data_ptr() == values.data_ptr() else rows
        return rows.view(self._batch * self._length, values.shape[-1])

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Return (T, B, width) as (B * T, width); without a copy if it has `allocate`'s strides."""
        rows = values.transpose(0, 1)
        if not rows.is_contiguous() or not has_dtype(values, dtype):
            return self.to_rows(values, dtype)
        array: Array = rows.detach().numpy()
        return array.reshape(self._batch * self._length, values.shape[-1])

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Return the values as they are: the kernel keeps a padded batch in the user's order."""
        return values

    def from_kernel_rows(self, values: Tensor) -> Tensor:
        """Return (T * B, width) as (T, B, width)."""
        return values.reshape(self._length, self._batch, values.shape[-1])

    def final_rows(self, *, reverse: bool) -> Integers:
        """Return the rows of the last step, or of the first for the reverse direction."""
        return np.arange(self._batch) + (0 if reverse else (self._length - 1) * self._batch)

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Return the states at the last step, or at the first for the reverse direction."""
        return hidden[0] if reverse else hidden[-1]


@lru_cache(maxsize=1024)
def _equal_lengths(batch: int, length: int) -> Integers:
    lengths = np.full(batch, length, dtype=np.int64)
    lengths.flags.writeable = False
    return lengths


class PackedLayout:
    """The steps of a PackedSequence's data (N, width).

    Args:
        batch_sizes: (T,) number of sequences, longest first, that have each step.
        sorted_indices: (B,) the user's batch index of each of the kernel's sequences; None if
            the user's batch is sorted by length.
    """

    def __init__(self, batch_sizes: Tensor, sorted_indices: Tensor | None) -> None:
        # Converted to a list, because a NumPy view would make the tensor's storage permanently
        # unresizable.
        self._batch_sizes: Integers = np.array(batch_sizes.tolist(), np.int64)
        batch = int(self._batch_sizes[0])
        self._user_indices = np.arange(batch)
        if sorted_indices is not None:
            self._user_indices = np.array(sorted_indices.tolist(), np.int64)

    @cached_property
    def _sorted_lengths(self) -> Integers:
        lengths = np.searchsorted(
            -self._batch_sizes, -np.arange(len(self._user_indices)), side="left"
        )
        return lengths.astype(np.int64)

    @cached_property
    def _starts(self) -> Integers:
        """(T,) the row of each time's first sequence."""
        return np.cumsum(self._batch_sizes, dtype=np.int64) - self._batch_sizes

    @cached_property
    def _times(self) -> Integers:
        """(N,) the time of each row."""
        return np.repeat(np.arange(len(self._batch_sizes)), self._batch_sizes)

    @cached_property
    def _columns(self) -> Integers:
        """(N,) the kernel's batch index of each row."""
        return np.arange(len(self._times)) - self._starts[self._times]

    @cached_property
    def lengths(self) -> Integers:
        """(B,) number of steps of each sequence, in the user's batch order."""
        lengths = np.empty_like(self._sorted_lengths)
        lengths[self._user_indices] = self._sorted_lengths
        return lengths

    @property
    def columns(self) -> Integers:
        """(B,) position of each sequence after sorting by length."""
        return np.argsort(self._user_indices)

    def gather(self, values: Tensor, times: Integers, columns: Integers) -> Tensor:
        """Gather (n, width) of (N, width)."""
        rows = torch.from_numpy(self._starts[times] + columns)
        return values.index_select(0, rows.to(values.device))

    def previous_rows(self, *, reverse: bool) -> Integers:
        """Return the index of each row's previous state in [initial; hidden], (N,).

        The first B indices are initial states, in the kernel's batch order.
        """
        batch = len(self._user_indices)
        if reverse:
            is_initial = self._times + 1 == self._sorted_lengths[self._columns]
            times = np.minimum(self._times + 1, len(self._starts) - 1)
        else:
            is_initial = self._times == 0
            times = np.maximum(self._times - 1, 0)
        return np.where(is_initial, self._columns, batch + self._starts[times] + self._columns)

    def previous(self, hidden: Tensor, initial: Tensor, *, reverse: bool) -> Tensor:
        """Gather the previous state of each row, (N, H)."""
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
        """Gather the product of the previous state of each row, (N, R)."""
        return self.previous(product(hidden), product(initial), reverse=reverse)

    def blocks(
        self, hidden: Tensor, initial: Tensor, size: int, *, reverse: bool
    ) -> Iterator[tuple[slice, Tensor]]:
        """Gather blocks of (N, H)."""
        rows = torch.from_numpy(self.previous_rows(reverse=reverse)).to(hidden.device)
        states = torch.cat((initial, hidden))
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            yield block, states.index_select(0, rows[block])

    def allocate(self, width: int, dtype: npt.DTypeLike) -> OutputBuffer:
        """Return memory in the kernel's order. Its rows are gathered at the end."""
        values = torch.from_numpy(np.empty((len(self._times), width), dtype))
        return OutputBuffer(values, lambda: self.to_rows(values, dtype))

    def to_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Gather (N, width) into the order of rows."""
        rows = np.empty(values.shape, dtype)
        order = self._order.to(values.device)
        copy_cast(torch.from_numpy(rows), values.index_select(0, order))
        return rows

    def to_device_rows(self, values: Tensor) -> Tensor:
        """Gather (N, width) into the order of rows."""
        return values.index_select(0, self._order.to(values.device))

    def as_rows(self, values: Tensor, dtype: npt.DTypeLike) -> Array:
        """Gather (N, width) into the order of rows."""
        return self.to_rows(values, dtype)

    @cached_property
    def _order(self) -> Tensor:
        """(N,) the index in the kernel's order of each row."""
        return torch.from_numpy(np.lexsort((self._times, self._user_indices[self._columns])))

    def unsort_batch(self, values: Tensor) -> Tensor:
        """Gather (B, width) into the user's batch order."""
        order = np.argsort(self._user_indices)
        return values.index_select(0, torch.from_numpy(order).to(values.device))

    def final(self, hidden: Tensor, *, reverse: bool) -> Tensor:
        """Gather the final state of each sequence."""
        rows = torch.from_numpy(self.final_rows(reverse=reverse)).to(hidden.device)
        return self.unsort_batch(hidden.index_select(0, rows))

    def from_kernel_rows(self, values: Tensor) -> Tensor:
        """Return the values: they have the kernel's shape."""
        return values

    def final_rows(self, *, reverse: bool) -> Integers:
        """Return the row of each sequence's last step, or first for the reverse direction."""
        times = np.zeros_like(self._sorted_lengths) if reverse else self._sorted_lengths - 1
        rows: Integers = self._starts[times] + np.arange(len(times))
        return rows
