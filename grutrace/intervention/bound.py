"""Settings of one call: the rows of each step that they apply to.

B sequences in a batch, n sequences at one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from grutrace.errors import OptionError
from grutrace.intervention.settings import Setting
from grutrace.intervention.step_counter import Progress
from grutrace.intervention.values import Values


class Rows(NamedTuple):
    """The rows of one step that a setting applies to.

    Attributes:
        step: Number of the step within their sequences.
        rows: (n,) their indices, in the order of `positions`; None if they are all rows in order.
        positions: (n,) position of each sequence in the batch in which it started, ascending.
    """

    step: int
    rows: tuple[int, ...] | None
    positions: tuple[int, ...]


class BoundSetting:
    """A setting of one call.

    Args:
        setting: The setting.
        progress: How far the sequences have come before the call; None if it does not matter.
        sizes: (T,) number of sequences at each time.
    """

    def __init__(self, setting: Setting, progress: Progress | None, sizes: Sequence[int]) -> None:
        self.setting, self._progress, self._sizes = setting, progress, sizes
        self._rows: dict[int, list[Rows]] = {}
        # The step before the call, if all sequences have the same, are all set and are in order.
        self._first: int | None = None
        self._positions: tuple[int, ...] = ()
        if progress is not None and len(progress.steps) and setting.sequences is None:
            steps, positions = progress.steps, progress.positions
            is_uniform = bool((steps == steps[0]).all())
            if is_uniform and bool((positions[1:] > positions[:-1]).all()):
                self._first, self._positions = int(steps[0]), tuple(positions.tolist())

    @property
    def is_for_all_sequences(self) -> bool:
        """Whether it applies to all sequences wherever it applies to one."""
        return self._progress is None or self._first is not None

    def covers_all(self, time: int) -> bool:
        """Whether it applies to all sequences at a time."""
        if self._progress is None:
            return True
        return sum(len(rows.positions) for rows in self.rows(time)) == self._sizes[time]

    def first(self, times: range) -> int | None:
        """Return the index of the first of these times at which it applies; None without one."""
        if self._progress is None:
            return 0 if times else None
        return next((index for index, time in enumerate(times) if self.rows(time)), None)

    def rows(self, time: int) -> list[Rows]:
        """Return the rows at a time that it applies to, by step."""
        rows = self._rows.get(time)
        if rows is None:
            rows = self._rows[time] = self._find_rows(time)
        return rows

    def _find_rows(self, time: int) -> list[Rows]:
        size = self._sizes[time]
        if self._first is not None:
            step = self._first + time
            if self.setting.steps is not None and step not in self.setting.steps:
                return []
            positions = self._positions
            return [Rows(step, None, positions if size == len(positions) else positions[:size])]
        progress, setting = self._progress, self.setting
        if progress is None:
            return [Rows(0, None, ())]
        steps, places = progress.steps[:size] + time, progress.positions[:size]
        chosen = np.ones(size, bool)
        if setting.sequences is not None:
            chosen &= np.isin(places, setting.sequences)
        groups = []
        for step in np.unique(steps[chosen]).tolist():
            if setting.steps is not None and step not in setting.steps:
                continue
            rows = np.flatnonzero(chosen & (steps == step))
            rows = rows[np.argsort(places[rows], kind="stable")]
            ordered = len(rows) == size and bool((rows == np.arange(size)).all())
            index = None if ordered else tuple(rows.tolist())
            groups.append(Rows(step, index, tuple(places[rows].tolist())))
        return groups

    def check(self) -> None:
        """Require the values to fit the batch, before the model runs.

        Raises:
            OptionError: They do not.
        """
        value, progress = self.setting.value, self._progress
        if isinstance(value, Values) and progress is not None and not progress.steps.any():
            batch = len(progress.positions)
            sequences = self.setting.sequences
            expected = batch if sequences is None else len(sequences)
            value.require(None, expected, len(self.setting.unit_numbers))
        if self.setting.sequences is not None and progress is not None:
            beyond = max(self.setting.sequences)
            if not progress.steps.any() and beyond >= len(progress.positions):
                raise OptionError(
                    f"{self.setting.what}: expected positions in a batch of "
                    f"{len(progress.positions)} sequences, found {beyond}"
                )
