"""The steps and units that a picture shows, from what users pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence import Sequence as TraceSequence
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace


def step_window(steps: slice | None, length: int, sequence: TraceSequence) -> range:
    """Return the steps that are shown, consecutive ones.

    Raises:
        OptionError: `steps` is not a slice of consecutive steps.
        NotRecordedError: It selects no step.
    """
    if steps is not None and (not isinstance(steps, slice) or steps.step not in (None, 1)):
        raise OptionError(
            "steps: expected a slice of consecutive steps, slice(10, 20); "
            f"found {short_repr(steps)}"
        )
    window = range(length)[slice(None) if steps is None else steps]
    if not len(window):
        raise NotRecordedError(
            f"sequence {sequence.number} of {sequence.site.name!r} has {length} steps: there is "
            "nothing to draw"
        )
    return window


def read_window(site: SiteTrace, sequence: int, quantity: str, window: range) -> Array:
    """Read some steps of a sequence, (n, H) or (n, I), without its other steps."""
    rows = site.rows_between(sequence, sequence + 1)
    first, last = window.start, window.stop
    if isinstance(rows, slice):
        part: slice | Integers = slice(rows.start + first, rows.start + last)
    else:
        part = rows[first:last]
    return np.asarray(site.rows(quantity)[part])


def as_columns(site: SiteTrace, units: Sequence[int] | slice | None) -> Integers:
    """Return the columns of these units; of all recorded units for None.

    Raises:
        OptionError: They are not different recorded units, or none.
    """
    recorded = range(site.module.hidden_size) if site.units is None else site.units
    if units is None:
        return np.arange(len(recorded))
    if isinstance(units, slice):
        units = [unit for unit in recorded if unit in range(site.module.hidden_size)[units]]
    columns = {unit: column for column, unit in enumerate(recorded)}
    try:
        chosen = [columns[operator.index(unit)] for unit in units]
    except (TypeError, KeyError):
        chosen = []
    if not chosen or len(set(chosen)) < len(chosen):
        raise OptionError(
            f"units: expected different units of the {len(recorded)} that were recorded at "
            f"{site.name!r}; found {short_repr(units)}"
        )
    return np.array(chosen, np.int64)
