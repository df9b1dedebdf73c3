"""Rows that are not stored: derived, when they are asked for, from what is.

This is the one place where reading a trace needs torch: the equations stand in `gru`, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from grutrace.record import Array
from grutrace.storage.index import Integers
from grutrace.storage.ingredients import Ingredients, SiteIngredients
from grutrace.storage.rows import LazyRows

if TYPE_CHECKING:
    from grutrace.gru.derive import Derivation

_ALL = slice(None)


class DerivedRows(LazyRows):
    """Gates, or their pre-activations, of the rows of a site, (rows, H). Indexing derives them.

    Args:
        ingredients: Of the site.
        quantity: Which gate.
        shape: (rows, H)
        dtype: Type in which they would have been stored.
        preactivation: Whether to stop before the sigmoid or tanh.
    """

    _where = "derived when they are read"

    def __init__(
        self,
        ingredients: SiteIngredients,
        quantity: str,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        *,
        preactivation: bool = False,
    ) -> None:
        super().__init__(shape, dtype)
        self._ingredients, self._quantity = ingredients, quantity
        self._preactivation = preactivation

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._pick(np.arange(*rows.indices(len(self))), columns)

    def _pick(self, rows: Array, columns: slice) -> Array:
        width = len(range(self.shape[1])[columns])
        found = np.empty((len(rows), width), self.dtype)
        for each, derivation in derivations(self._ingredients, rows, columns):
            value = derivation.preactivation if self._preactivation else derivation.gate
            found[each.part] = value(self._quantity)
        return found


class DerivedInput(LazyRows):
    """What a layer above the first read, (rows, I), put together from the states of that below.

    Args:
        ingredients: Of the site.
        shape: (rows, I)
        dtype: Type of the states.
    """

    _where = "read as the states of the layer below"

    def __init__(
        self, ingredients: SiteIngredients, shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        super().__init__(shape, dtype)
        self._ingredients = ingredients

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._pick(np.arange(*rows.indices(len(self))), columns)

    def _pick(self, rows: Array, columns: slice) -> Array:
        return self._ingredients.input(rows, columns)


def derivations(
    ingredients: SiteIngredients, rows: Integers, units: slice = _ALL
) -> Iterator[tuple[Ingredients, Derivation]]:
    """Derive rows of a site in the precision of the kernel, some at a time.

    Raises:
        NotRecordedError: Something needed was not recorded.
    """
    from grutrace.gru.derive import Derivation

    for each in ingredients.of(rows):
        yield each, Derivation(each.input, each.previous, each.weights, each.precision, units)
