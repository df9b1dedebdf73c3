"""The recorded quantities by name, for a site and for a sequence alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

R = TypeVar("R", covariant=True)


class Quantities(ABC, Generic[R]):
    """Something that has rows of each recorded quantity.

    All raise `NotRecordedError` if the quantity was not recorded.
    """

    @abstractmethod
    def rows(self, quantity: str) -> R:
        """Rows of the quantity of this name."""

    @property
    def reset(self) -> R:
        """The reset gate r, (T, H)."""
        return self.rows("reset")

    @property
    def update(self) -> R:
        """The update gate z, (T, H). PyTorch's: where z is 1 the previous state is kept."""
        return self.rows("update")

    @property
    def candidate(self) -> R:
        """The candidate state n, (T, H). PyTorch calls it the new gate."""
        return self.rows("candidate")

    @property
    def hidden(self) -> R:
        """The hidden state h, (T, H)."""
        return self.rows("hidden")

    @property
    def input(self) -> R:
        """What the layer read, (T, I)."""
        return self.rows("input")
