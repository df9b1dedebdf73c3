"""Steps with gates that are held at constants, in the compiled library.

Per step there is one matrix product and one call of the library. The sigmoids and tanh differ from
those of PyTorch in the last digits.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from grutrace.intervention.bound import BoundSetting
from grutrace.intervention.recurrence.steps import DirectionResult, DirectionRun, StepGates
from grutrace.intervention.values import Constant
from grutrace.native.library import HeldStep, load
from grutrace.records import DEFAULT_RECORD

#: Multiplications of a step, for each gate, from which it is worth looking for states of zeros.
MIN_PRODUCT = 1 << 17


class _Held(NamedTuple):
    """What is held at some steps.

    Attributes:
        masks: Of reset, update, candidate and hidden, (H,): -1 where it is held, else 0; None for
            one that is not held.
        values: The values, likewise.
        addresses: Those of the masks and of the values.
    """

    masks: list[Tensor | None]
    values: list[Tensor | None]
    addresses: tuple[Any, Any]


def can_hold(run: DirectionRun) -> bool:
    """Whether the library can run the steps of a direction without gradients."""
    return (
        load() is not None
        and run.input.device.type == "cpu"
        and run.input.dtype == run.initial.dtype == torch.float32
        and run.initial.numel() > 0
        and all(
            isinstance(one.setting.value, Constant)
            and one.setting.quantity in DEFAULT_RECORD
            and one.is_for_all_sequences
            for one in run.edits.bound
        )
    )


def run_held_steps(run: DirectionRun) -> DirectionResult:
    """Run the steps from the first one that is set, as `shadow.run_direction` does.

    Args:
        run: The steps, for which `can_hold` is True.
    """
    library = load()
    assert library is not None
    order, bound = run.order, run.edits.bound
    (rows, size), sizes = run.initial.shape, order.sizes
    inputs = run.input_product().contiguous()
    output = torch.empty((*run.input.shape[:-1], size))
    product = torch.empty(rows, 3 * size)
    starts = _row_starts(sizes)
    state = _first_state(run, starts)
    if run.start:
        untouched = run.untouched()
        output[untouched] = run.kernel_states[0][untouched]
    weight, bias = run.weights.weight_hh.t(), run.weights.bias_hh
    block = HeldStep(product.data_ptr(), state.data_ptr())
    block.units = size
    address = ctypes.addressof(block)
    input_address, output_address, row_bytes = inputs.data_ptr(), output.data_ptr(), 4 * size
    gates: dict[int, StepGates] = {}
    held: dict[tuple[bool, ...], _Held] = {}
    present: tuple[bool, ...] | None = None
    state_rows, product_rows = state, product
    block.batch = rows
    varies = any(one.setting.steps is not None for one in bound)
    applied = (True,) * len(bound)
    from_zeros = not run.start and _is_large_product_of_zeros(state)
    for time in order.times[run.start :]:
        # Operations of torch take as long as a small step, len() of a tensor included.
        if sizes[time] != rows:
            rows = block.batch = sizes[time]
            state_rows, product_rows = state[:rows], product[:rows]
        if varies:
            applied = tuple([bool(one.rows(time)) for one in bound])
        if applied != present:
            present = applied
            if applied not in held:
                held[applied] = _held_at(bound, applied, size)
            block.masks, block.values = held[applied].addresses
        if from_zeros:
            # Only the first step can start from zeros. Rows of zeros have the same product.
            from_zeros = False
            product_rows[:] = linear(state_rows[:1], weight.t(), bias)
        elif bias is None:
            torch.mm(state_rows, weight, out=product_rows)
        else:
            torch.addmm(bias, state_rows, weight, out=product_rows)
        previous = state_rows.clone() if run.keep_gates else None
        first = starts[time] * row_bytes
        library.held_step(address, input_address + 3 * first, output_address + first)
        if previous is not None:
            gates[time] = _step_gates(product_rows, previous)
    return DirectionResult(output, state, gates)


def _is_large_product_of_zeros(state: Tensor) -> bool:
    """Whether all states, (b, H), are 0, and their product takes much longer than that of one."""
    rows, size = state.shape
    if rows == 1 or rows * size * size < MIN_PRODUCT:
        return False
    # Read from memory, because operations of torch on single values take as long as the rest.
    first = ctypes.c_float.from_address(state.data_ptr()).value
    return first == 0.0 and float(state.abs().max()) == 0.0


def _row_starts(sizes: Sequence[int]) -> list[int]:
    """Return the row of each time's first sequence."""
    starts, row = [], 0
    for size in sizes:
        starts.append(row)
        row += size
    return starts


def _first_state(run: DirectionRun, starts: Sequence[int]) -> Tensor:
    """Return the states before the first step that is run, (B, H), in memory of its own.

    Sequences that are over have their final states, and those that begin later their initial ones.
    """
    order = run.order
    if not run.start:
        return run.initial.clone(memory_format=torch.contiguous_format)
    output, final = run.kernel_states
    state = (run.initial if order.reverse else final).clone(memory_format=torch.contiguous_format)
    time = order.times[run.start - 1]
    rows = order.sizes[time]
    state[:rows] = output[time] if order.padded else output[starts[time] : starts[time] + rows]
    return state


def _held_at(bound: Sequence[BoundSetting], applied: tuple[bool, ...], size: int) -> _Held:
    """Return what is held where these settings apply. It is kept for the next call."""
    settings = [one.setting for one in bound]
    kept = settings[0].held.get(applied)
    if kept is not None and _are_same(kept[0], settings):
        held: _Held = kept[1]
        return held
    made = _hold(bound, applied, size)
    settings[0].held[applied] = settings, made
    return made


def _are_same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


def _hold(bound: Sequence[BoundSetting], applied: Sequence[bool], size: int) -> _Held:
    """Return what is held where these settings apply, the last one taking effect."""
    masks: list[Tensor | None] = [None] * len(DEFAULT_RECORD)
    values: list[Tensor | None] = [None] * len(DEFAULT_RECORD)
    for one, is_applied in zip(bound, applied, strict=True):
        value = one.setting.value
        if not is_applied or not isinstance(value, Constant):
            continue
        index = DEFAULT_RECORD.index(one.setting.quantity)
        mask, own = masks[index], values[index]
        if mask is None or own is None:
            mask, own = torch.zeros(size, dtype=torch.int32), torch.zeros(size)
        units = list(one.setting.unit_numbers)
        mask[units], own[units] = -1, value.number
        masks[index], values[index] = mask, own
    return _Held(masks, values, (_addresses(masks), _addresses(values)))


def _addresses(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors]
    )


def _step_gates(product: Tensor, previous: Tensor) -> StepGates:
    """Return copies of the gates of a step, and the state that they lead to."""
    reset, update, candidate = (gate.clone() for gate in product.chunk(3, 1))
    computed = (previous - candidate).mul_(update).add_(candidate)
    return StepGates(reset, update, candidate, computed)
