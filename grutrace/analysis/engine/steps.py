"""Steps of one sequence, numbered in the order of computation.

For a reverse direction that is from the last step to the first. H units, n steps.
"""

from __future__ import annotations

import numpy as np

from grutrace.analysis.engine.site_data import SiteData
from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers


def locate_step(site: SiteData, sequence: int, step: int | None) -> tuple[int, int]:
    """Return the number of a sequence, and the number of a step in the order of computation.

    Args:
        site: The site.
        sequence: Number of the sequence; negative numbers count from the last.
        step: Step in time order, likewise; None for the step that is computed first.

    Raises:
        NotRecordedError: There is no such sequence or step.
    """
    count = len(site.lengths)
    if not -count <= sequence < count:
        raise NotRecordedError(f"{site.name!r} has no sequence {sequence}; it has {count}")
    sequence %= count
    length = int(site.lengths[sequence])
    if step is None:
        return sequence, 0
    if not -length <= step < length:
        raise NotRecordedError(
            f"sequence {sequence} of {site.name!r} has no step {step}; it has {length}"
        )
    return sequence, int(to_time_order(site, sequence, np.array(step % length)))


def to_time_order(site: SiteData, sequence: int, steps: Integers) -> Integers:
    """Convert step numbers between time order and the order of computation, in either direction."""
    return np.asarray(site.lengths[sequence] - 1 - steps if site.reverse else steps)


def row_numbers(site: SiteData, sequence: int, start: int, stop: int) -> slice | Integers:
    """Return the numbers of the rows of steps `start` to `stop` - 1, in time order."""
    if site.reverse:
        length = int(site.lengths[sequence])
        start, stop = length - stop, length - start
    rows = site.rows_between(sequence, sequence + 1)
    if isinstance(rows, slice):
        return slice(rows.start + start, rows.start + stop)
    return rows[start:stop]


def read_steps(site: SiteData, quantity: str, sequence: int, start: int, stop: int) -> Array:
    """Read steps `start` to `stop` - 1 in the order of computation: (n, H) float64."""
    rows = site.rows(quantity)[row_numbers(site, sequence, start, stop)]
    return np.asarray(rows, np.float64)[:: -1 if site.reverse else 1]


def state_before(site: SiteData, sequence: int, step: int) -> Array:
    """Return the state that a step started from: (H,) float64."""
    restarts = site.restarts(sequence, sequence + 1)
    if step in restarts.steps:
        # The last restart, if segments in between have no steps.
        return np.asarray(restarts.states[restarts.steps == step][-1], np.float64)
    if step:
        return np.asarray(read_steps(site, "hidden", sequence, step - 1, step)[0])
    return np.asarray(site.initial(sequence, sequence + 1)[0], np.float64)
