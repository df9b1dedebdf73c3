"""Steps with gates that are held at constants, in the compiled library.

Per step there is one matrix product and one call of the library. The sigmoids and tanh differ from
those of PyTorch in the last digits.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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
    """

    masks: list[Tensor | None]
    values: list[Tensor | None]


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
    order, initial, bound = run.order, run.initial, run.edits.bound
    size, sizes = initial.shape[-1], list(order.sizes)
    inputs = run.input_product().contiguous()
    output = torch.empty((*run.input.shape[:-1], size))
    state, product = torch.empty_like(initial), torch.empty(len(initial), 3 * size)
    starts = _row_starts(sizes)
    _begin(state, run, starts)
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
    block.batch = len(state)
    varies = any(one.setting.steps is not None for one in bound)
    applied = (True,) * len(bound)
    from_zeros = not run.start and _is_large_product_of_zeros(state)
    for time in order.times[run.start :]:
        if sizes[time] != len(state_rows):
            state_rows, product_rows = state[: sizes[time]], product[: sizes[time]]
            block.batch = sizes[time]
        if varies:
            applied = tuple([bool(one.rows(time)) for one in bound])
        if applied != present:
            present = applied
            if applied not in held:
                held[applied] = _held_at(bound, applied, size)
            _point_to(block, held[applied])
        # Rows of zeros have the same product.
        rows = 1 if from_zeros else len(state_rows)
        if bias is None:
            torch.mm(state_rows[:rows], weight, out=product_rows[:rows])
        else:
            torch.addmm(bias, state_rows[:rows], weight, out=product_rows[:rows])
        if from_zeros:
            product_rows[1:] = product_rows[0]
            from_zeros = False
        previous = state_rows.clone() if run.keep_gates else None
        row = starts[time]
        library.held_step(
            address, input_address + 3 * row * row_bytes, output_address + row * row_bytes
        )
        if previous is not None:
            gates[time] = _step_gates(product_rows, previous)
    return DirectionResult(output, state, gates)


def _is_large_product_of_zeros(state: Tensor) -> bool:
    """Whether all states, (b, H), are 0, and their product takes much longer than that of one."""
    if len(state) == 1 or state.numel() * state.shape[-1] < MIN_PRODUCT:
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


def _begin(state: Tensor, run: DirectionRun, starts: Sequence[int]) -> None:
    """Fill in the states before the first step that is run.

    Sequences that are over have their final states, and those that begin later their initial ones.
    """
    state.copy_(run.initial)
    if not run.start:
        return
    order, (output, final) = run.order, run.kernel_states
    if not order.reverse:
        state.copy_(final)
    time = order.times[run.start - 1]
    rows = order.sizes[time]
    state[:rows] = output[time] if order.padded else output[starts[time] : starts[time] + rows]


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
    return _Held(masks, values)


def _point_to(block: HeldStep, held: _Held) -> None:
    for index, (mask, values) in enumerate(zip(*held, strict=True)):
        block.masks[index] = None if mask is None else mask.data_ptr()
        block.values[index] = None if values is None else values.data_ptr()


def _step_gates(product: Tensor, previous: Tensor) -> StepGates:
    """Return copies of the gates of a step, and the state that they lead to."""
    reset, update, candidate = (gate.clone() for gate in product.chunk(3, 1))
    computed = (previous - candidate).mul_(update).add_(candidate)
    return StepGates(reset, update, candidate, computed)
