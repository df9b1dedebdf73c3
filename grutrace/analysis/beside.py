"""A site with rows of more beside its own, so that they come along wherever it is gone through."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grutrace.analysis.material import Material
from grutrace.errors import OptionError
from grutrace.record import Array
from grutrace.storage.index import Integers
from grutrace.storage.labels import RowLabels
from grutrace.storage.moment import Restarts
from grutrace.storage.source import Rows


class Beside(Material):
    """A site, and by name more that there is one row of for each of its rows.

    Args:
        site: The site.
        more: By a name that is no quantity of it, (N, any width); rows as the site stores them.
    """

    def __init__(self, site: Material, more: Mapping[str, Rows]) -> None:
        self._site, self._more = site, dict(more)
        self.name, self.reverse, self.lengths = site.name, site.reverse, site.lengths
        self.units, self.dask, self.advance = site.units, site.dask, site.advance
        for name, rows in self._more.items():
            if rows.shape[0] != site.steps:
                raise OptionError(f"{name}: expected {site.steps} rows, found {rows.shape[0]}")

    @property
    def other_processes(self) -> bool:
        """As the site's."""
        return self._site.other_processes

    @property
    def quantities(self) -> tuple[str, ...]:
        """What there are rows of."""
        return (*self._site.quantities, *self._more)

    def rows(self, quantity: str) -> Rows:
        """All rows of a quantity, of the site or beside it."""
        return self._more[quantity] if quantity in self._more else self._site.rows(quantity)

    def rows_between(self, first: int, last: int) -> slice | Integers:
        """As the site's."""
        return self._site.rows_between(first, last)

    def initial(self, first: int, last: int) -> Array:
        """As the site's."""
        return self._site.initial(first, last)

    def restarts(self, first: int, last: int) -> Restarts:
        """As the site's."""
        return self._site.restarts(first, last)

    def versions(self, rows: slice | Integers) -> Integers:
        """As the site's."""
        return self._site.versions(rows)

    def weights(self, version: int) -> Mapping[str, Array]:
        """As the site's."""
        return self._site.weights(version)

    @property
    def label_names(self) -> tuple[str, ...]:
        """As the site's."""
        return self._site.label_names

    def labels(self, name: str) -> RowLabels:
        """As the site's."""
        return self._site.labels(name)

    @property
    def parents(self) -> Integers:
        """As the site's."""
        return self._site.parents


def sequences_of(site: Material) -> Integers:
    """(N,) the sequence of each row, in the smallest type that holds it."""
    count = len(site.lengths)
    found = np.empty(site.steps, np.min_scalar_type(-max(1, count)))
    found[site.rows_between(0, count)] = np.repeat(
        np.arange(count, dtype=found.dtype), site.lengths
    )
    return found


def places_of(site: Material) -> Integers:
    """(N,) which step of its sequence each row is, in time order."""
    found = np.empty(site.steps, np.int64)
    starts = np.cumsum(site.lengths) - site.lengths
    in_order = np.arange(site.steps) - np.repeat(starts, site.lengths)
    found[site.rows_between(0, len(starts))] = in_order
    return found
