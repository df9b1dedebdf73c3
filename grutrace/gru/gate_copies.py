"""Which of the kernel's gates to copy, and the copies of one step after the other.

`CompiledCopies` does so in C, with one call per step; `TorchCopies` with PyTorch operations, where
there is no compiled library or the type of the copy differs.

T steps, B sequences in a batch, H hidden size, N rows, U units that are copied.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from grutrace.gru.layout import numpy_type
from grutrace.native.copy_template import GateStrides, make_template
from grutrace.native.library import CopyPlan, GateCopy, Library, load
from grutrace.records import GATES, Array

#: Alignment of the copies in bytes, for stores past the cache.
ALIGNMENT = 64


#: Number of units whose states check a call if not all gates are computed.
CHECK_UNITS = 8

#: Units to copy, by gate name.
UnitsByGate: TypeAlias = Mapping[str, range]


class GateRequest(NamedTuple):
    """A request for the kernel's own gates.

    Attributes:
        columns: Units to copy, by gate name.
        max_cost_ratio: Maximum cost of copying, relative to the cost of a replay.
        keeps_steps: Whether to keep the gates of calls of one step in the kernel's memory, until
            the call is copied. That costs less than any replay.
    """

    columns: UnitsByGate
    max_cost_ratio: float = 1.0
    keeps_steps: bool = False


#: A request for no gate.
NO_GATES = GateRequest(MappingProxyType({}))


class GateCopyPlan(NamedTuple):
    """The columns to copy from a layer: the requested gates, and those that check them.

    Attributes:
        columns: Units to copy, by gate name.
        check_units: Units whose states are compared with the states that the gates lead to.
    """

    columns: UnitsByGate
    check_units: range

    @classmethod
    def of(cls, gates: Sequence[str], units: Sequence[int]) -> GateCopyPlan | None:
        """Return the plan for these gates of these units; None if they cannot be copied.

        Args:
            gates: Names of the gates.
            units: Indices of the units. They must be evenly spaced.
        """
        request = range(units[0], units[-1] + 1, units[1] - units[0] if len(units) > 1 else 1)
        if list(request) != list(units):
            return None
        check_units = request
        if not {"update", "candidate"} <= set(gates):
            check_units = request[:: max(1, len(request) // CHECK_UNITS)][:CHECK_UNITS]
        columns = {name: request for name in GATES if name in gates}
        return cls({"update": check_units, "candidate": check_units} | columns, check_units)


def merge_requests(requests: Sequence[GateRequest], hidden_size: int) -> GateRequest:
    """Return one request for several. If the units of a gate differ, it has all units.

    Args:
        requests: Requests for one layer.
        hidden_size: H
    """
    merged: dict[str, range] = {}
    for request in requests:
        for name, columns in request.columns.items():
            is_same = merged.get(name, columns) == columns
            merged[name] = columns if is_same else range(hidden_size)
    ratios = [request.max_cost_ratio for request in requests if request.columns]
    return GateRequest(merged, min(ratios, default=1.0))


class CallShape(NamedTuple):
    """The shape of a call.

    Attributes:
        rows: (T,) number of sequences at each time.
        padded: Whether all sequences have all times.
        hidden_size: H
        dtype: Data type of the input.
    """

    rows: list[int]
    padded: bool
    hidden_size: int
    dtype: torch.dtype


class GateBuffer(NamedTuple):
    """A buffer for gates with the same columns that are adjacent in the kernel's memory.

    Attributes:
        names: Names of the gates.
        memory: (gates, T, B, U) or (gates, N, U), the memory to copy to.
        strides: Strides in the kernel's memory, for (gates, b, U) at each time.
        offset: Storage offset in the kernel's memory.
    """

    names: tuple[str, ...]
    memory: Tensor
    strides: tuple[int, int, int]
    offset: int


class GateBuffers:
    """Buffers for the gates of one direction of a layer in one call.

    Args:
        layout: Shape of the call.
        columns: Units to copy, by gate name.

    Attributes:
        product: Buffers for the hidden product (b, 3 H), which holds reset and update.
        candidate: Buffers for the candidate (b, H).
    """

    def __init__(self, layout: CallShape, columns: UnitsByGate) -> None:
        self._layout, size = layout, layout.hidden_size
        names = tuple(name for name in ("reset", "update") if name in columns)
        has_same_columns = len({columns[name] for name in names}) == 1
        groups = [names] if has_same_columns else [(name,) for name in names]
        self.product = [self._make_buffer(group, columns[group[0]], 3 * size) for group in groups]
        self.candidate = []
        if "candidate" in columns:
            self.candidate = [self._make_buffer(("candidate",), columns["candidate"], size)]

    def _make_buffer(self, names: tuple[str, ...], columns: range, width: int) -> GateBuffer:
        size = self._layout.hidden_size
        offset = columns.start + size * (names[0] == "update")
        memory = self._empty(len(names), len(columns))
        return GateBuffer(names, memory, (size, width, columns.step), offset)

    def _empty(self, gates: int, units: int) -> Tensor:
        # NumPy memory of the type of the rows, so that rows need no further copy.
        rows, dtype = self._layout.rows, numpy_type(self._layout.dtype)
        if not self._layout.padded:
            return torch.from_numpy(_empty_aligned((gates, sum(rows), units), dtype))
        # The rows of a sequence are adjacent, as in the trace.
        memory = _empty_aligned((gates, rows[0] if rows else 0, len(rows), units), dtype)
        return torch.from_numpy(memory).transpose(1, 2)

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates by name, in the kernel's order: (T, B, U) or (N, U)."""
        return {
            name: gate
            for buffer in (*self.product, *self.candidate)
            for name, gate in zip(buffer.names, buffer.memory, strict=True)
        }

    def by_time(self, buffer: GateBuffer) -> Sequence[Tensor]:
        """Return the memory of a buffer for each time, (gates, b, U)."""
        if self._layout.padded:
            return buffer.memory.unbind(1)
        views: tuple[Tensor, ...] = torch.split(buffer.memory, self._layout.rows, 1)
        return views


def _empty_aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """Return an array whose memory begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class GateCopies(Protocol):
    """Copies the gates of a call while it runs.

    Attributes:
        dtype: Data type in which the kernel computes.
    """

    dtype: torch.dtype

    def take(self, product: Tensor, total: Tensor) -> None:
        """Copy reset and update of the next step, and the candidate of the step before.

        Args:
            product: (b, H), the last third of the hidden product, in the kernel's memory.
            total: (b, H), which the kernel replaces by the candidate before the next step.
        """

    def finish(self) -> None:
        """Copy the candidate of the last step."""


def make_copies(
    buffers: Sequence[GateBuffers],
    directions: Sequence[bool],
    layout: CallShape,
    dtype: torch.dtype,
) -> GateCopies:
    """Return an object that copies the gates of a call.

    Args:
        buffers: Memory for each direction, in the order of execution.
        directions: For each direction, whether it is the reverse one.
        layout: Shape of the call.
        dtype: Data type in which the kernel computes.
    """
    library = load()
    memory = next(buffer.memory for buffer in (*buffers[0].product, *buffers[0].candidate))
    if library is not None and memory.dtype == dtype:
        return CompiledCopies(library, buffers, directions, layout, dtype)
    return TorchCopies(buffers, directions, dtype)


class CompiledCopies:
    """Copies gates in C. The arguments are those of `make_copies`."""

    def __init__(
        self,
        library: Library,
        buffers: Sequence[GateBuffers],
        directions: Sequence[bool],
        layout: CallShape,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self._copy_step = dtype, library.copy_step
        first = buffers[0]
        # The plan holds addresses in the template.
        self._template = template = make_template(
            tuple(layout.rows),
            layout.padded,
            layout.hidden_size,
            _gate_strides(first.product),
            _gate_strides(first.candidate),
            tuple(directions),
            dtype.itemsize,
        )
        self._product = _placed(template.product, [each.product for each in buffers])
        self._candidate = _placed(template.candidate, [each.candidate for each in buffers])
        self._plan = CopyPlan(
            self._product,
            self._candidate,
            len(self._product) // len(buffers),
            len(self._candidate) // len(buffers),
            template.rows.ctypes.data,
            len(layout.rows),
        )
        self._address = ctypes.addressof(self._plan)
        self._total: Tensor | None = None

    def take(self, product: Tensor, total: Tensor) -> None:
        """Copy reset and update of the next step, and the candidate of the step before."""
        self._copy_step(self._address, product.data_ptr(), total.data_ptr())
        # Its memory is read at the next step.
        self._total = total

    def finish(self) -> None:
        """Copy the candidate of the last step."""
        self._copy_step(self._address, None, None)
        self._total = None


def _gate_strides(buffers: Sequence[GateBuffer]) -> tuple[tuple[int, GateStrides], ...]:
    """Return U of each gate, and its strides in the kernel's memory."""
    return tuple(
        (
            buffer.memory.shape[-1],
            GateStrides(
                buffer.strides[1], buffer.strides[2], buffer.offset + gate * buffer.strides[0]
            ),
        )
        for buffer in buffers
        for gate in range(len(buffer.names))
    )


def _placed(
    template: ctypes.Array[GateCopy], buffers: Sequence[Sequence[GateBuffer]]
) -> ctypes.Array[GateCopy]:
    """Return the copies of a template, with the memory of a call for targets."""
    copies = type(template).from_buffer_copy(template)
    number = 0
    for of_direction in buffers:
        for buffer in of_direction:
            address, stride = buffer.memory.data_ptr(), buffer.memory.stride(0)
            for gate in range(len(buffer.names)):
                copies[number].target += address + gate * stride * buffer.memory.element_size()
                number += 1
    return copies


class TorchCopies:
    """Copies gates with PyTorch operations. The arguments are those of `make_copies`."""

    def __init__(
        self, buffers: Sequence[GateBuffers], directions: Sequence[bool], dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self._product = _in_order(buffers, directions, "product")
        self._candidate = _in_order(buffers, directions, "candidate")
        self._step = 0
        self._total: Tensor | None = None

    def take(self, product: Tensor, total: Tensor) -> None:
        """Copy reset and update of the next step, and the candidate of the step before."""
        self._copy_candidate()
        for copy in self._product:
            copy.run(self._step, product)
        self._step, self._total = self._step + 1, total

    def finish(self) -> None:
        """Copy the candidate of the last step."""
        with torch.no_grad():
            self._copy_candidate()
        self._total = None

    def _copy_candidate(self) -> None:
        if self._total is not None:
            for copy in self._candidate:
                copy.run(self._step - 1, self._total)


class _GateCopy(NamedTuple):
    """Copies some gates of each step from the kernel's memory.

    Attributes:
        views: Memory to copy to for each step, (gates, b, U), in the order of execution.
        strides: Strides in the kernel's memory.
        offset: Storage offset in the kernel's memory.
    """

    views: list[Tensor]
    strides: tuple[int, int, int]
    offset: int

    def run(self, step: int, source: Tensor) -> None:
        """Copy one step. `source` is a tensor in the kernel's memory."""
        view = self.views[step]
        view.copy_(source.as_strided(view.shape, self.strides, self.offset))


def _in_order(
    buffers: Sequence[GateBuffers], directions: Sequence[bool], source: str
) -> list[_GateCopy]:
    """Return the copies from one kernel tensor ("product" or "candidate")."""
    copies = []
    for same_gates in zip(*(getattr(buffer, source) for buffer in buffers), strict=True):
        views = [
            view
            for direction_buffers, buffer, reverse in zip(
                buffers, same_gates, directions, strict=True
            )
            for view in direction_buffers.by_time(buffer)[:: -1 if reverse else 1]
        ]
        copies.append(_GateCopy(views, same_gates[0].strides, same_gates[0].offset))
    return copies
