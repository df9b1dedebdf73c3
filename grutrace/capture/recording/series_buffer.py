"""Collect alike calls of one step in shared memory, so that they are recorded together.

A decoder calls its layer once per token. To handle such a call on its own takes longer than to run
it. So calls that differ in nothing but their values are copied one after another into the same
arrays, and are recorded from there as one series. A call that is not like the one before it is
copied on its own (see `journal`).

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

#: Number of calls that the first series of alike calls has room for. Later ones grow.
MIN_SERIES_CALLS = 4

# Initial states are compared with these.
_ZEROS = np.zeros(4096, np.uint8)
_ZEROS_ADDRESS = _ZEROS.ctypes.data

#: By number, as the compiled library returns it.
_KINDS = tuple(InitialState)


class SeriesBuffer:
    """Memory for calls of one module that are alike.

    Args:
        module: Index of the module in the header.
        run: The first call.
        version: The version of the weights that was known when they ran.
        versions: The tracker that numbered it.
        tag: The user's name for this part of the run.
        batches: The batches of their recording block; None without one.
        capacity: Maximum number of calls.
        buffer: Where the copies lie.
        shares_input: Whether the copies of the input can be rows of the trace.
        shares_output: Whether the copies of the output can be rows of the trace.
        shares_gates: Whether the copies of the gates can.

    Attributes:
        count: Number of calls in it.
        gates: By name, the kernel's own gates of each call, (capacity, B, H); None if they were
            not kept.
        residuals: (capacity,) of each call with gates, the largest difference of the states that
            they lead to from the kernel's; NaN if a value is not finite.
        kinds: What is known of the initial states of each call.
        times: When each ran, in seconds since 1970.
        are_certain: Of each, whether every byte of the weights was compared.
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
        shares_input: bool,
        shares_output: bool,
        shares_gates: bool,
    ) -> None:
        self.module, self.version, self.versions = module, version, versions
        self.tag, self.batches, self.training = tag, batches, run.training
        self.capacity, self.count = capacity, 0
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
        # The addresses in it are those of the tensors above.
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
        """Bytes of its calls."""
        return self.count * self.call_nbytes

    @property
    def inputs(self) -> Tensor:
        """(n, B, I), the input of each call."""
        return self._inputs[: self.count]

    @property
    def final(self) -> Tensor:
        """(n, B, H), the output of each call."""
        return self._final[: self.count]

    def takes(
        self, run: KernelRun, version: Version, tag: str | None, batches: RecordedBatches | None
    ) -> bool:
        """Whether a call is like those in it, and there is room."""
        # The output has the shape and the type that follow from these.
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
        """Copy a call that `takes` has just accepted."""
        copy = self._copy_call if self._add_compiled is None else self._copy_compiled
        number = self.count
        self.kinds[number], self.times[number] = copy(run, number), time
        # Last: an interruption before this leaves the call out.
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
        """Return (B, H), the states that a call started from."""
        kind = self.kinds[call]
        if kind is InitialState.CHAINED:
            return self._final[call - 1]
        return self._initial[call].zero_() if kind is InitialState.ZEROS else self._initial[call]

    def state_sizes(self) -> npt.NDArray[np.float64]:
        """Return (n,), the largest ``|h|`` that each call started from; 1 if that is larger."""
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
        """Return one of the calls, with the copies in place of the model's tensors."""
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
    """Calls that are worked out, and not appended yet.

    Attributes:
        record: The calls.
        assignments: The sequences of each series.
    """

    record: CallBatch
    assignments: list[SeriesAssignment]


class SeriesGroup:
    """Series of several modules whose calls take turns, such as the cells of a decoder.

    Attributes:
        series: One per module, by its index in the header.
        order: The series of each call, in the order of the calls.
        commitment: Whether the calls are appended to the sink.
        prepared: What is to be appended, once it is worked out.
        is_divided: Whether its calls are recorded one by one.
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
        # First: an interruption can leave an entry without a call here, never a call without one.
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
    """How many calls of a module were alike, and so for how many the next series has room.

    Of calls that differ from one another, each is copied on its own.
    """

    def __init__(self) -> None:
        self._expected = 0
        self._shape: torch.Size | None = None

    def capacity(self, run: KernelRun) -> int:
        """Return for how many calls a series that begins with this one has room; 0 for none."""
        shape, self._shape = self._shape, run.arguments[0].shape
        if shape != self._shape:
            return 0
        size = max(MIN_SERIES_CALLS, self._expected)
        most: int = SEGMENT_BYTES // max(run.arguments[0].nbytes, run.output.nbytes)
        return min(size, MAX_SERIES_CALLS, most)

    def end(self, series: SeriesBuffer) -> None:
        """Note that a series takes no more calls."""
        is_full = series.count == series.capacity
        self._expected = 2 * series.count if is_full else series.count
        if series.count < 2:
            self._shape = None


def _allocate(
    buffer: CopyBuffer, shape: tuple[int, int, int], dtype: torch.dtype, *, is_shared: bool
) -> Tensor:
    pool = buffer.lasting if is_shared else buffer.passing
    return pool.allocate(math.prod(shape), dtype).view(shape)


def _are_zero(address: int, size: int) -> bool:
    """Whether all bytes are 0: the first ones, and then each the one before it."""
    first = min(size, len(_ZEROS))
    return not compare_small(address, _ZEROS_ADDRESS, first) and not compare_small(
        address, address + first, size - first
    )


def _is_plain(values: Tensor) -> bool:
    """Whether the bytes in memory are the values, in order."""
    return values.is_contiguous() and not (values.is_neg() or values._is_zerotensor())
