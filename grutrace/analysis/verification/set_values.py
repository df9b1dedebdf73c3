"""What interventions have set at a site, from the labels of its rows."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from grutrace.records import GATES, SET_PREFIX
from grutrace.storage.read.site import SiteTrace

Mask = npt.NDArray[np.bool_]


class SetValues:
    """Which values of a site an intervention has set.

    Args:
        site: The site.
    """

    def __init__(self, site: SiteTrace) -> None:
        module, own = site.module, site.site
        columns = range(module.hidden_size) if own.units is None else own.units
        self._columns = {unit: column for column, unit in enumerate(columns)}
        name = f"{SET_PREFIX}{own.suffix}"
        self._labels = site.row_labels(name) if name in site.label_names else None
        self._units: list[dict[str, list[int]]] = []
        if self._labels is not None:
            self._units = [self._parse(str(text)) for text in self._labels.values]

    def __bool__(self) -> bool:
        """Whether anything was set."""
        return self._labels is not None

    def mask(self, quantity: str, rows: slice) -> Mask:
        """Return whether values were set, (n, U). A gate is set if its pre-activation is.

        Args:
            quantity: A gate, or ``hidden``.
            rows: The rows.
        """
        count = len(range(*rows.indices(0 if self._labels is None else len(self._labels))))
        mask = np.zeros((count, len(self._columns)), bool)
        if self._labels is not None:
            codes = self._labels.codes[rows]
            for code, units in enumerate(self._units):
                chosen = np.flatnonzero(codes == code)
                if len(chosen) and quantity in units:
                    mask[np.ix_(chosen, np.array(units[quantity], np.int64))] = True
        return mask

    def any(self, rows: slice) -> Mask:
        """Return whether a gate or the state of a unit was set, (n, U)."""
        names = ("reset", "update", "candidate", "hidden")
        return np.asarray(np.logical_or.reduce([self.mask(name, rows) for name in names]))

    def _parse(self, text: str) -> dict[str, list[int]]:
        """Return the columns that a label names, by quantity."""
        result: dict[str, list[int]] = {}
        for name, listed in re.findall(r"(\w+)(?:\[([\d,]*)\])?", text):
            units = map(int, listed.split(",")) if listed else list(self._columns)
            columns = [self._columns[unit] for unit in units if unit in self._columns]
            result.setdefault(name.removesuffix("_preactivation"), []).extend(columns)
        return result


def unknown_states(site: SiteTrace, set_values: SetValues, rows: slice) -> Mask | None:
    """Return which states do not follow from states, input and weights, (n, U); None if all do.

    Args:
        site: The site.
        set_values: What was set at the site.
        rows: The rows.
    """
    if not set_values:
        return None
    # Where gates are recomputed, the values of those that were set are stored.
    is_deferred = bool({*GATES} & {*site.site.derived})
    return set_values.mask("hidden", rows) if is_deferred else set_values.any(rows)
