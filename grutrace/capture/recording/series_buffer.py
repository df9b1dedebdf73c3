"""Collect similar calls of one step in shared memory, so that they are recorded together.

A decoder calls its layer once per token. Recording each call separately takes longer than running
it. So calls that differ only in their values are copied one after another into the same arrays, and
are recorded as one series. A call that differs from the previous one in other ways is copied
separately (see `journal`).

B sequences in a batch, I input size, H hidden size.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.recording.annotations import RecordedBatches
from grutrace.capture.recording.tensor_copy import (
    SEGMENT_BYTES,
    CopyBuffer,
    compare_small,
    copy_small,
)
from grutrace.capture.recording.weight_versions import Version, WeightVersionTracker
from grutrace.capture.sequences.assignment import (
    Commitment,
    InitialState,
    SeriesAssignment,
)
from grutrace.gru.kernel_gates import KernelGates
from grutrace.native.library import CallSeries, ReplayTargets, load
from grutrace.records import GATES, CallBatch

#: Maximum number of calls of one series.
MAX_SERIES_CALLS = 256

#: Capacity of the first series of similar calls. Later series are larger.
MIN_SERIES_CALLS = 4

# Initial states are compared with these.
_ZEROS = np.zeros(4096, np.uint8)
_ZEROS_ADDRESS = _ZEROS.ctypes.data

#: Kinds of initial states, indexed by the number that the compiled library returns.
_KINDS = tuple(InitialState)


class SeriesBuffer:
    """Memory for similar calls of one module.

    Args:
        module: Index of the module in the header.
        run: The first call.
        version: The current version of the weights when the calls ran.
        versions: The tracker that numbered this version.
        tag: The user's name for this part of the run.
        batches: The batches of the calls' recording block; None without one.
        capacity: Maximum number of calls.
        buffer: Memory for the copies.
        new_nbytes: Bytes of the weights, if they are new with the first call.
        shares_input: Whether the copies of the input can be rows of the trace.
        shares_output: Whether the copies of the output can be rows of the trace.
        shares_gates: Whether the copies of the gates can be rows of the trace.

    Attributes:
        count: Number of calls in the buffer.
        gates: By name, the kernel's own gates of each call, (capacity, B, H); None if the gates
            are not copied.
        residuals: (capacity,) for each call with gates, the largest difference between the states
            computed from the gates and the kernel's states; NaN if a value is not finite.
        kinds: The kind of each call's initial states.
        times: Time of each call, in seconds since 1970.
        are_certain: For each call, whether every byte of the weights was compared.
        call_nbytes: Bytes of one call.
    """

    def __init__(
        self,
        module: int,
        run: KernelRun,
        version: Version,
        versions: WeightVersionTracker,
        tag: str | None,
        batches: RecordedBatches | None,
        capacity: int,
        buffer: CopyBuffer,
        *,
        new_nbytes: int,
        shares_input: bool,
        shares_output: bool,
        shares_gates: bool,
    ) -> None:
        self.module, self.version, self.versions = module, version, versions
        self.tag, self.batches, self.training = tag, batches, run.training
        self.capacity, self.count, self._new_nbytes = capacity, 0, new_nbytes
        # Without the model's own tensors, which it would keep alive.
        self._template = run.with_weights(version.weights).without_values()
        arguments, output = run.arguments, run.output
        state = arguments[run.kernel.state_index]
        self._options = run.options
        self._shapes = arguments[0].shape, state.shape, output.shape
        self._dtype = output.dtype
        self._sizes = arguments[0].nbytes, output.nbytes
        gates = run.step_gates
        names = () if gates is None else gates.columns
        self.call_nbytes: int = arguments[0].nbytes + (2 + len(names)) * output.nbytes
        inputs, states = (
            (capacity, run.batch, values.shape[-1]) for values in (arguments[0], output)
        )
        dtype = output.dtype
        self._inputs = _allocate(buffer, inputs, dtype, is_shared=shares_input)
        self._final = _allocate(buffer, states, dtype, is_shared=shares_output)
        self._initial = _allocate(buffer, states, dtype, is_shared=False)
        self.gates: dict[str, Tensor] | None = None
        if gates is not None:
            self.gates = {
                name: _allocate(buffer, states, dtype, is_shared=shares_gates) for name in names
            }
        self.residuals = np.empty(capacity)
        self._addresses = (
            self._inputs.data_ptr(),
            self._initial.data_ptr(),
            self._final.data_ptr(),
        )
        self.kinds: list[InitialState] = [InitialState.COPIED] * capacity
        self.times, self.are_certain = [0.0] * capacity, [False] * capacity
        library = load()
        self._add_compiled = None if library is None else library.add_call
        of_gate = self.gates or {}
        # It holds the addresses of the tensors above.
        self._compiled = CallSeries(
            *self._addresses,
            ReplayTargets(*(of_gate[n].data_ptr() if n in of_gate else None for n in GATES)),
            *self._sizes,
            run.batch,
            output.shape[-1],
            dtype.itemsize,
            self.residuals.ctypes.data,
        )
        self._compiled_address = ctypes.addressof(self._compiled)

    @property
    def nbytes(self) -> int:
        """Bytes of its calls, and of weights that are new with them."""
        return self.count * self.call_nbytes + self._new_nbytes

    @property
    def inputs(self) -> Tensor:
        """The input of each call, (n, B, I)."""
        return self._inputs[: self.count]

    @property
    def final(self) -> Tensor:
        """The output of each call, (n, B, H)."""
        return self._final[: self.count]

    def takes(
        self, run: KernelRun, version: Version, tag: str | None, batches: RecordedBatches | None
    ) -> bool:
        """Whether a call is similar to the calls in the buffer, and the buffer is not full."""
        # These determine the shape and type of the output.
        input, initial, _ = self._shapes
        arguments = run.arguments
        state = arguments[run.kernel.state_index]
        return (
            self.count < self.capacity
            and version is self.version
            and arguments[0].shape == input
            and state.shape == initial
            and state.dtype is self._dtype
            and tag == self.tag
            and batches is self.batches
            and run.training is self.training
            and run.options == self._options
            and (run.step_gates is None) is (self.gates is None)
        )

    def add(self, run: KernelRun, time: float, *, is_certain: bool) -> None:
        """Copy a call for which `takes` has just returned True."""
        copy = self._copy_call if self._add_compiled is None else self._copy_compiled
        number = self.count
        self.kinds[number], self.times[number] = copy(run, number), time
        # The count changes last, so that an interruption before it leaves the call out.
        self.are_certain[number], self.count = is_certain, number + 1

    def _copy_compiled(self, run: KernelRun, number: int) -> InitialState:
        input, state, output = run.arguments[0], run.arguments[run.kernel.state_index], run.output
        addresses: list[int | None] = [None] * 5
        if _is_plain(input):
            addresses[0] = input.data_ptr()
        else:
            self._inputs[number].copy_(input.reshape(self._inputs.shape[1:]))
        if _is_plain(state):
            addresses[1] = state.data_ptr()
        else:
            self._initial[number].copy_(state.reshape(self._initial.shape[1:]))
        if output.is_contiguous():
            addresses[2] = output.data_ptr()
        else:
            self._final[number].copy_(output.reshape(self._final.shape[1:]))
        gates = run.step_gates
        if gates is not None:
            addresses[3:] = gates.product.data_ptr(), gates.candidate.data_ptr()
        assert self._add_compiled is not None
        return _KINDS[self._add_compiled(self._compiled_address, number, *addresses)]

    def _copy_call(self, run: KernelRun, number: int) -> InitialState:
        size, width = self._sizes
        input, state, output = run.arguments[0], run.arguments[run.kernel.state_index], run.output
        inputs, initial, final = self._addresses
        at_input, at_state = number * size, number * width
        if _is_plain(input):
            copy_small(inputs + at_input, input.data_ptr(), size)
        else:
            self._inputs[number].copy_(input.reshape(self._inputs.shape[1:]))
        if output.is_contiguous():
            copy_small(final + at_state, output.data_ptr(), width)
        else:
            self._final[number].copy_(output.reshape(self._final.shape[1:]))
        kind = InitialState.COPIED
        if not _is_plain(state):
            self._initial[number].copy_(state.reshape(self._initial.shape[1:]))
        else:
            address = state.data_ptr()
            if number and not compare_small(address, final + at_state - width, width):
                kind = InitialState.CHAINED
            elif _are_zero(address, width):
                kind = InitialState.ZEROS
            else:
                copy_small(initial + at_state, address, width)
        return kind

    @property
    def starts_from_zeros(self) -> bool:
        """Whether every call started from zeros."""
        return all(kind is InitialState.ZEROS for kind in self.kinds[: self.count])

    def initial(self, call: int) -> Tensor:
        """Return the initial states of a call, (B, H)."""
        kind = self.kinds[call]
        if kind is InitialState.CHAINED:
            return self._final[call - 1]
        return self._initial[call].zero_() if kind is InitialState.ZEROS else self._initial[call]

    def state_sizes(self) -> npt.NDArray[np.float64]:
        """Return the largest ``|h|`` of each call's initial states, and at least 1, (n,)."""
        sizes = np.ones(self.count)
        kinds = np.array(self.kinds[: self.count])
        for values, calls in (
            (self._initial, np.flatnonzero(kinds == InitialState.COPIED)),
            (self._final, np.flatnonzero(kinds == InitialState.CHAINED) - 1),
        ):
            if len(calls):
                at = calls + (values is self._final)
                found = values[torch.from_numpy(calls)].abs().amax((1, 2))
                sizes[at] = np.maximum(1.0, found.double().numpy())
        return sizes

    def single_run(self, call: int) -> KernelRun:
        """Return one of the calls, with the copies instead of the model's tensors."""
        input, state, output = self._shapes
        initial = self.initial(call).reshape(state)
        run = self._template.replaced(
            self._inputs[call].reshape(input), initial, self._final[call].reshape(output)
        )
        if self.gates is not None:
            gates = {name: values[call : call + 1] for name, values in self.gates.items()}
            columns = dict.fromkeys(gates, range(self._shapes[2][-1]))
            run.gates = [[KernelGates(gates, columns, self._dtype)]]
        return run


class PreparedBatch(NamedTuple):
    """A batch of calls that is computed and not appended yet.

    Attributes:
        record: The calls.
        assignments: The sequences of each series.
    """

    record: CallBatch
    assignments: list[SeriesAssignment]


class SeriesGroup:
    """Series of several modules whose calls alternate, such as the cells of a decoder.

    Attributes:
        series: One per module, by its index in the header.
        order: The series of each call, in the order of the calls.
        commitment: Whether the calls are appended to the sink.
        prepared: The batch to append; None before it is computed.
        is_divided: Whether the calls are recorded one by one.
    """

    def __init__(self) -> None:
        self.series: dict[int, SeriesBuffer] = {}
        self.order: list[SeriesBuffer] = []
        self.commitment = Commitment()
        self.prepared: PreparedBatch | None = None
        self.is_divided = False

    def __len__(self) -> int:
        if self.is_divided:
            return 0
        count = 0
        for series in self.series.values():
            count += series.count
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of its calls."""
        return sum(series.nbytes for series in self.series.values())

    def add(self, series: SeriesBuffer, run: KernelRun, time: float, *, is_certain: bool) -> None:
        """Add a call to one of the series."""
        # An interruption can leave an entry of `order` without a call. Remove it first.
        del self.order[len(self) :]
        self.order.append(series)
        series.add(run, time, is_certain=is_certain)

    def filled(self) -> list[SeriesBuffer]:
        """Return the series that have calls."""
        return [series for series in self.series.values() if series.count]

    def uncertain_modules(self) -> set[int]:
        """Return the modules with calls whose weights were not compared."""
        return {
            series.module
            for series in self.series.values()
            if not all(series.are_certain[: series.count])
        }

    def calls(self) -> Iterator[tuple[SeriesBuffer, int]]:
        """Yield each call in order: its series, and its index there."""
        counts = dict.fromkeys(self.series.values(), 0)
        for series in self.order[: len(self)]:
            yield series, counts[series]
            counts[series] += 1


def can_join_series(run: KernelRun) -> bool:
    """Whether a call can be part of a series: one step of one layer, on the CPU."""
    output, input = run.output, run.arguments[0]
    state = run.arguments[run.kernel.state_index]
    if run.steps is not None or run.layers or run.gates is not None or run.device != "cpu":
        return False
    if run.gates_as_set is not None:
        return False
    if output.dim() == 3 and output.shape[0 if run.is_time_major else 1] != 1:
        return False
    # An empty batch has no values to compare.
    if not (input.dtype is output.dtype is state.dtype and output.numel() and input.numel()):
        return False
    return bool(MIN_SERIES_CALLS * max(input.nbytes, output.nbytes) <= SEGMENT_BYTES)


class Streak:
    """Counts similar calls of a module in a row, and chooses the capacity of the next series.

    Calls that differ from each other are copied separately.
    """

    def __init__(self) -> None:
        self._expected = 0
        # Calls of the full series since the last one that was not.
        self._in_full = 0
        self._shape: torch.Size | None = None

    def capacity(self, run: KernelRun) -> int:
        """Return the capacity of a series that starts with this call; 0 for no series."""
        shape, self._shape = self._shape, run.arguments[0].shape
        if shape != self._shape:
            return 0
        size = max(MIN_SERIES_CALLS, self._expected)
        most: int = SEGMENT_BYTES // max(run.arguments[0].nbytes, run.output.nbytes)
        return min(size, MAX_SERIES_CALLS, most)

    def end(self, series: SeriesBuffer) -> None:
        """Note that a series takes no more calls."""
        if series.count == series.capacity:
            self._expected = 2 * series.count
            self._in_full += series.count
            return
        # It may have continued the full ones, as at the end of a decoder's sequence.
        self._expected, self._in_full = series.count + self._in_full, 0
        if self._expected < 2:
            self._shape = None


def _allocate(
    buffer: CopyBuffer, shape: tuple[int, int, int], dtype: torch.dtype, *, is_shared: bool
) -> Tensor:
    pool = buffer.lasting if is_shared else buffer.passing
    return pool.allocate(math.prod(shape), dtype).view(shape)


def _are_zero(address: int, size: int) -> bool:
    """Whether all bytes are 0: the first are, and each later byte equals an earlier one."""
    first = min(size, len(_ZEROS))
    return not compare_small(address, _ZEROS_ADDRESS, first) and not compare_small(
        address, address + first, size - first
    )


def _is_plain(values: Tensor) -> bool:
    """Whether the bytes in memory are the values in order."""
    return values.is_contiguous() and not (values.is_neg() or values._is_zerotensor())
