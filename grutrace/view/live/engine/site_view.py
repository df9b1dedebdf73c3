"""`SiteView`: one quantity of one site of a run, as a page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.trace import Trace
from grutrace.view.live.engine.link import Steps
from grutrace.view.live.engine.selection_text import selected_sequences
from grutrace.view.live.engine.step_axis import StepAxis, step_axis
from grutrace.view.live.engine.unit_order import unit_order

#: Longest text of a token or label in a picture. Characters.
MAX_TEXT = 16

#: Values that a quantity can have, by its name. Gates are between 0 and 1, states between -1 and 1.
RANGES = {
    "reset": (0.0, 1.0),
    "update": (0.0, 1.0),
    "candidate": (-1.0, 1.0),
    "hidden": (-1.0, 1.0),
}

#: The quantity that a page shows first, if it was recorded.
FIRST_QUANTITIES = ("hidden", "update")


@dataclass(frozen=True)
class StepTexts:
    """Tokens and labels of consecutive positions.

    Attributes:
        tokens: The token of each position; None if there are none.
        labels: The label of each position, by name.
    """

    tokens: list[str] | None
    labels: dict[str, list[str]]


class SiteView:
    """One quantity of one site of a trace: rows, axis of steps, order of the units, and texts.

    Args:
        trace: The trace.
        site: Name of the site.
        quantity: Name of the quantity.
        order: Order of the units; see `unit_order`.
        select: Which sequences are on the axis; see `parse_selection`.

    Attributes:
        site: The site, as of now.
        quantity: Name of the quantity.
        rows: (N, U) its rows.
        axis: The axis of steps.
        order: (U,) the units from bottom to top; None by number.

    Raises:
        OptionError: The order or the selection is invalid.
        NotRecordedError: The site or the quantity was not recorded, or no sequence is selected.
    """

    def __init__(
        self, trace: Trace, site: str, quantity: str, order: str = "number", select: str = ""
    ) -> None:
        self.site: SiteTrace = trace[site].frozen()
        self.quantity = quantity
        self.rows: Rows = self.site.rows(quantity)
        self.axis: StepAxis = step_axis(self.site, selected_sequences(self.site, select))
        self.order: Integers | None = unit_order(self.rows, self.axis, order)

    @property
    def units(self) -> int:
        """Number of units, U."""
        return self.rows.shape[1]

    def unit(self, place: int) -> int:
        """Return the unit at a place in the order, as a column of the rows."""
        return place if self.order is None else int(self.order[place])

    def unit_name(self, place: int) -> int:
        """Return the number of the unit at a place: its number in the layer."""
        return self.name_of(self.unit(place))

    def name_of(self, unit: int) -> int:
        """Return the number in the layer of a unit, which is given as a column of the rows."""
        recorded = self.site.units
        return unit if recorded is None or self.quantity == "input" else recorded[unit]

    def steps(self, start: int, stop: int) -> Steps:
        """Return positions as steps of sequences, cut to the axis, which is not empty."""
        last = len(self.axis) - 1
        first_step = self.axis.locate(min(max(0, start), last))
        last_step = self.axis.locate(min(max(0, stop - 1), last))
        return Steps(*first_step, last_step[0], last_step[1] + 1)

    def positions(self, steps: Steps) -> tuple[int, int] | None:
        """Return the first position of steps, and their last + 1; None if the axis lacks them."""
        start = self.axis.position(steps.first_sequence, steps.start)
        last = self.axis.position(steps.last_sequence, steps.stop - 1)
        return None if start is None or last is None else (start, last + 1)

    def describe(self, position: int, place: int) -> str:
        """Return the sequence, step, token, labels, unit and value at a point, as a line of text.

        It is empty outside of the axis of steps, and has no value outside of the units.
        """
        if not 0 <= position < len(self.axis):
            return ""
        sequence, step = self.axis.locate(position)
        texts = self.texts(position, position + 1)
        parts = [f"sequence {sequence}, step {step}"]
        parts += [f"token {token}" for token in texts.tokens or [] if token]
        parts += [f"{name} {values[0]}" for name, values in texts.labels.items() if values[0]]
        if 0 <= place < self.units:
            value = self.values(position, position + 1, [self.unit(place)])[0, 0]
            parts += [f"unit {self.unit_name(place)}", f"{self.quantity} {value:.4g}"]
        return " \N{MIDDLE DOT} ".join(parts)

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of the colour scale.

        They are those that the quantity can have. Of other quantities they are of a sample: if it
        has values of both signs, they are symmetric.
        """
        if self.quantity in RANGES:
            return RANGES[self.quantity]
        count = min(len(self.axis), 4096)
        starts = np.unique(np.linspace(0, len(self.axis) - count, 8).astype(int))
        values = [np.asarray(self.rows[self.axis.rows(s, s + count // 8 + 1)]) for s in starts]
        finite = np.concatenate([array[np.isfinite(array)] for array in values])
        if not len(finite):
            return -1.0, 1.0
        least, greatest = float(finite.min()), float(finite.max())
        if least < 0 < greatest:
            least, greatest = min(least, -greatest), max(greatest, -least)
        return (least, greatest) if least < greatest else (least - 1, greatest + 1)

    def values(self, start: int, stop: int, units: Sequence[int]) -> np.ndarray:
        """Return the values of some units at some positions, (stop - start, units)."""
        return np.asarray(self.rows[self.axis.rows(start, stop)])[:, list(units)]

    def texts(self, start: int, stop: int) -> StepTexts:
        """Return the tokens and labels of the positions from `start` to `stop`."""
        names = [name for name in self.site.label_names if name != "tokens"]
        tokens: list[str] = []
        labels: dict[str, list[str]] = {name: [] for name in names}
        has_tokens = False
        first, last = self.axis.places_between(start, stop)
        for place in range(first, last):
            bounds = self.axis.bounds[place : place + 2]
            steps = slice(
                max(start, int(bounds[0])) - int(bounds[0]),
                min(stop, int(bounds[1])) - int(bounds[0]),
            )
            count = steps.stop - steps.start
            sequence = self.site.sequence(int(self.axis.sequences[place]))
            found, all_labels = sequence.tokens, sequence.labels
            has_tokens |= found is not None
            tokens += [""] * count if found is None else map(value_text, found[steps])
            for name in names:
                values = all_labels.get(name)
                labels[name] += [""] * count if values is None else map(value_text, values[steps])
        return StepTexts(tokens if has_tokens else None, labels)


def first_quantity(site: SiteTrace) -> str:
    """Return the quantity that a page shows first.

    Raises:
        NotRecordedError: The site has no quantity.
    """
    available = site.site.available_quantities
    for quantity in (*FIRST_QUANTITIES, *available):
        if quantity in available:
            return quantity
    raise NotRecordedError(f"{site.name!r} has no rows to show")


def value_text(value: object) -> str:
    """Return the text of a token or label; empty for a missing one."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    # Control characters would break the line of a picture.
    text = "".join(
        char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value)
    )
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"
