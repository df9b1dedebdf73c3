"""Units that are on in a stretch of steps and off around it, as in LSTMVis.

The way of working is that of Strobelt et al. (2018), "LSTMVis: A Tool for Visual Analysis of Hidden
State Dynamics in Recurrent Neural Networks".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import block_slices, item_bytes
from grutrace.storage.read.sequence_index import Integers
from grutrace.view.live.engine.step_axis import StepAxis

#: Bytes of rows that are read at once.
BLOCK = 4 * 1024 * 1024


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one sequence, from `start` to `stop` - 1."""

    sequence: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Condition:
    """When a unit is on: at a value of at least the threshold, or of at most the threshold.

    NaN is off.

    Attributes:
        threshold: The threshold.
        above: Whether a unit is on above the threshold.
    """

    threshold: float
    above: bool = True

    def is_on(self, values: Array) -> npt.NDArray[np.bool_]:
        """Return which values are on."""
        on = values >= self.threshold if self.above else values <= self.threshold
        return np.asarray(on)


def units_on(
    rows: Rows,
    axis: StepAxis,
    stretch: Stretch,
    condition: Condition,
    *,
    before: int = 1,
    after: int = 1,
) -> Integers:
    """Return the units that are on at every step of a stretch and off around it.

    Steps before the start and after the end of the sequence do not exist, and are ignored.

    Args:
        rows: (N, U) rows of the quantity.
        axis: The axis of steps.
        stretch: The stretch.
        condition: When a unit is on.
        before: Number of steps before the stretch at which the units are off.
        after: Number of steps after the stretch at which the units are off.

    Returns:
        (k,) the units, by number.

    Raises:
        NotRecordedError: The axis does not have the stretch.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> import grutrace
        >>> from grutrace.view.live.engine.step_axis import step_axis
        >>> from grutrace.view.live.engine.stretches import Condition, Stretch, units_on
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> site = trace["l0"]
        >>> values = site.sequence(1).update
        >>> threshold = float(np.sort(values[2])[1])     # two of three units are on at step 2
        >>> stretch = Stretch(sequence=1, start=2, stop=3)
        >>> found = units_on(
        ...     site.update, step_axis(site), stretch, Condition(threshold), before=0, after=0
        ... )
        >>> len(found)
        2
    """
    extent = axis.extent(stretch.sequence)
    if extent is None or not 0 <= stretch.start < stretch.stop <= extent[1] - extent[0]:
        length = "no such sequence" if extent is None else f"{extent[1] - extent[0]} steps"
        raise NotRecordedError(
            f"expected steps of a sequence; found steps {stretch.start} to {stretch.stop - 1} of "
            f"sequence {stretch.sequence}, which has {length}"
        )
    start, stop = extent[0] + stretch.start, extent[0] + stretch.stop
    is_wanted = np.ones(rows.shape[1], bool)
    parts = (
        (max(extent[0], start - before), start, False),
        (start, stop, True),
        (stop, min(extent[1], stop + after), False),
    )
    for first, last, on in parts:
        for block in block_slices(last - first, BLOCK, item_bytes(rows)):
            values = np.asarray(rows[axis.rows(first + block.start, first + block.stop)])
            is_wanted &= (condition.is_on(values) == on).all(axis=0)
    return np.flatnonzero(is_wanted)
