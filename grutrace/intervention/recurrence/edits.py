"""What the settings of a call do to a quantity at one step.

B sequences in a batch, H hidden size, b rows of a step, n of them that are set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from grutrace.errors import OptionError
from grutrace.intervention.bound import BoundSetting, Rows
from grutrace.intervention.settings import Setting
from grutrace.intervention.values import Constant, Context, Function


class Changes:
    """What the settings of one direction did.

    Attributes:
        any: Whether one returned other values than those it was given, or may have.
        results: What functions returned, with the setting and the step.
    """

    def __init__(self) -> None:
        self.any = False
        self.results: list[tuple[Tensor, Setting, int]] = []

    def require_numbers(self, output: Tensor, read: Sequence[Tensor | None]) -> None:
        """Require that no function has made the states NaN.

        Args:
            output: The states.
            read: What the layer read.

        Raises:
            OptionError: One has.
        """
        if not self.results or not output.detach().isnan().any():
            return
        if any(bool(values.detach().isnan().any()) for values in read if values is not None):
            return
        for result, setting, step in self.results:
            if result.detach().isnan().any():
                raise OptionError(
                    f"{setting.what}: expected a function that returns numbers, found NaN at step "
                    f"{step}"
                )


class Edit:
    """Sets some rows and units of a quantity at one step.

    Args:
        setting: The setting.
        rows: The rows.
        changes: Notes what it did.
    """

    def __init__(self, setting: Setting, rows: Rows, changes: Changes) -> None:
        self._setting, self._rows, self._changes = setting, rows, changes
        value = setting.value
        self._number = value.number if isinstance(value, Constant) else None

    @property
    def total(self) -> float | None:
        """The number that all rows and units are set to; None if there is none."""
        is_total = self._rows.rows is None and self._setting.units is None
        return self._number if is_total else None

    def __call__(self, values: Tensor) -> Tensor:
        """Return the values, (b, H), with those that are set."""
        if self._number is None:
            changed = self._set(values)
            # A copy, because the user may change it later.
            is_whole = self._rows.rows is None and self._setting.units is None
            return changed.clone() if is_whole and changed is not values else changed
        self._changes.any = True
        if self.total is not None:
            return torch.full_like(values, self._number)
        return values.masked_fill(self._mask(values), self._number)

    def in_place(self, values: Tensor) -> None:
        """Set the values in place."""
        if self._number is None:
            changed = self._set(values)
            if changed is not values:
                values.copy_(changed)
            return
        self._changes.any = True
        if self.total is not None:
            values.fill_(self._number)
        else:
            values.masked_fill_(self._mask(values), self._number)

    def _mask(self, values: Tensor) -> Tensor:
        """Return a mask that broadcasts to (b, H)."""
        setting, rows = self._setting, self._rows.rows
        key = values.device, rows, len(values) if rows is not None else None
        mask = setting.masks.get(key)
        if mask is None:
            with torch.inference_mode(False):
                units = torch.zeros(setting.hidden_size, dtype=torch.bool)
                units[list(setting.unit_numbers)] = True
                mask = units
                if rows is not None:
                    chosen = torch.zeros(len(values), 1, dtype=torch.bool)
                    chosen[list(rows)] = True
                    mask = chosen & units
                mask = mask.to(values.device)
            if len(setting.masks) >= MAX_MASKS:
                setting.masks.clear()
            setting.masks[key] = mask
        return mask

    def _set(self, values: Tensor) -> Tensor:
        setting, rows, device = self._setting, self._rows, values.device
        row_index = None if rows.rows is None else torch.tensor(rows.rows, device=device)
        units = setting.units
        unit_index = None if units is None else torch.tensor(units, device=device)
        given = values if row_index is None else values.index_select(0, row_index)
        given = given if unit_index is None else given.index_select(1, unit_index)
        index, positions = 0, rows.positions
        if setting.steps is not None:
            index = setting.steps.index(rows.step) or 0
        elif setting.depends_on_step:
            index = rows.step
        if setting.sequences is not None:
            order = {sequence: at for at, sequence in enumerate(setting.sequences)}
            positions = tuple(order[position] for position in positions)
        result: Tensor = setting.value.at(given, _context(setting, rows), index, positions)
        if result is given:
            return values
        self._changes.any = True
        if isinstance(setting.value, Function):
            self._changes.results.append((result, setting, rows.step))
        if result.shape != given.shape:
            result = result.expand(given.shape)
        if row_index is None and unit_index is None:
            return result
        all_rows = torch.arange(len(values), device=device) if row_index is None else row_index
        all_units = (
            torch.arange(values.shape[1], device=device) if unit_index is None else unit_index
        )
        changed: Tensor = values.index_put((all_rows.unsqueeze(1), all_units), result)
        return changed


#: Maximum number of masks that a setting keeps.
MAX_MASKS = 64

#: By quantity, what sets it at one step, in order.
Edits: TypeAlias = Mapping[str, Sequence[Edit]]

NO_EDITS: Edits = {}


class EditsByTime:
    """What is set at each time of a direction.

    Args:
        bound: The settings of the direction, in order.
        changes: Notes what they did.
    """

    def __init__(self, bound: Sequence[BoundSetting], changes: Changes) -> None:
        self.bound, self.changes = bound, changes

    def __call__(self, time: int) -> Edits:
        """Return what is set at a time, by quantity."""
        edits: dict[str, list[Edit]] = {}
        for one in self.bound:
            for rows in one.rows(time):
                edit = Edit(one.setting, rows, self.changes)
                edits.setdefault(one.setting.quantity, []).append(edit)
        return edits or NO_EDITS


def _context(setting: Setting, rows: Rows) -> Context:
    tokens = None
    if setting.tokens is not None:
        tokens = tuple(
            setting.tokens[position][rows.step]
            if position < len(setting.tokens) and rows.step < len(setting.tokens[position])
            else None
            for position in rows.positions
        )
    return Context(setting.site, rows.step, rows.positions, tokens, setting.unit_numbers)
