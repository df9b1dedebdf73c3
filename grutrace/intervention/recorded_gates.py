"""The gates of a call as they were set, for a recording.

T steps, B sequences in a batch, I input size, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grutrace.capture.kernel_calls.replacement import GatesAsSet
from grutrace.gru import cell
from grutrace.gru.kernel import CellWeights
from grutrace.gru.tolerance import compare
from grutrace.intervention.bound import BoundSetting
from grutrace.intervention.recurrence.steps import StepGates, StepOrder
from grutrace.records import GATES


def gates_as_set(
    input: Tensor,
    hidden: Tensor,
    previous: Tensor,
    weights: CellWeights,
    order: StepOrder,
    run_gates: Mapping[int, StepGates],
    bound: Sequence[BoundSetting],
) -> GatesAsSet:
    """Return all gates of a direction: those of the steps that were run, and others recomputed.

    Args:
        input: (T, B, I) or (N, I)
        hidden: (T, B, H) or (N, H)
        previous: The state before each step, likewise.
        weights: Of the direction.
        order: The steps.
        run_gates: By time, the gates of the steps that were run.
        bound: The settings of the direction.
    """
    products = cell.products(input, previous, *weights)
    gates = cell.Gates(*(gate.clone() for gate in cell.gates(products)))
    # The states before they were set: those that the gates lead to.
    computed = hidden.clone()
    targets = [_by_time(values, order) for values in (*gates, computed)]
    codes = torch.zeros((*hidden.shape[:-1], 1), dtype=torch.int64, device=hidden.device)
    codes_by_time, numbers = _by_time(codes, order), dict[str, int]()
    units: list[dict[str, tuple[int, ...]]] = []
    touched: set[int] = set()
    for time in order.times:
        if time not in run_gates:
            continue
        set_rows, is_set_state = _set_rows(bound, time, order.sizes[time])
        # Sequences of which nothing has been set so far have the kernel's states. Their gates
        # follow from these.
        touched |= set(set_rows)
        kept = torch.tensor(sorted(touched), device=hidden.device, dtype=torch.int64)
        kept = kept[kept < order.sizes[time]]
        for target, values in zip(targets, run_gates[time], strict=True):
            if is_set_state or target is not targets[3]:
                target[time][kept] = values[kept].to(target[time].dtype)
        for row, quantities in set_rows.items():
            text = describe(quantities, hidden.shape[-1])
            if text not in numbers:
                numbers[text] = len(numbers)
                units.append(_units_of_gates(quantities))
            codes_by_time[time][row] = numbers[text] + 1
    error = compare(cell.step(gates, previous), computed, products)
    by_name = {name: getattr(gates, name) for name in GATES}
    return GatesAsSet(by_name, error, gates.update.dtype, codes, list(numbers), units)


def _by_time(values: Tensor, order: StepOrder) -> Sequence[Tensor]:
    """Return views of the values of each time."""
    return values.unbind(0) if order.padded else torch.split(values, list(order.sizes))


def _set_rows(
    bound: Sequence[BoundSetting], time: int, size: int
) -> tuple[dict[int, dict[str, set[int]]], bool]:
    """Return the units of each quantity that were set in each row, and whether states were."""
    units: dict[int, dict[str, set[int]]] = {}
    is_set_state = False
    for one in bound:
        for rows in one.rows(time):
            is_set_state = is_set_state or one.setting.quantity == "hidden"
            for row in range(size) if rows.rows is None else rows.rows:
                quantities = units.setdefault(row, {})
                quantities.setdefault(one.setting.quantity, set()).update(one.setting.unit_numbers)
    return units, is_set_state


def _units_of_gates(quantities: Mapping[str, set[int]]) -> dict[str, tuple[int, ...]]:
    """Return the units of each gate that were set, directly or by their pre-activation."""
    units = {
        name: sorted(quantities.get(name, set()) | quantities.get(f"{name}_preactivation", set()))
        for name in GATES
    }
    return {name: tuple(numbers) for name, numbers in units.items() if numbers}


def describe(quantities: Mapping[str, set[int]], size: int) -> str:
    """Return what was set as a text, such as ``update[3,7] hidden``."""
    parts = []
    for quantity, units in quantities.items():
        listed = "" if len(units) == size else f"[{','.join(map(str, sorted(units)))}]"
        parts.append(f"{quantity}{listed}")
    return " ".join(parts)
