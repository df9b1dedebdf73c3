"""One sequence at one site, as arrays in time order.

The recorded quantities by name, for a site and for a sequence alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np

from grutrace.records import Array, Site
from grutrace.reprs import wrapped
from grutrace.storage.read.snapshot import TraceSnapshot

R = TypeVar("R", covariant=True)


class QuantityAccess(ABC, Generic[R]):
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


class Sequence(QuantityAccess[Array]):
    """What one batch row went through at one site, over all calls that it went through.

    Its quantities are NumPy arrays, (T, H) or (T, I), in time order for both directions.

    Attributes:
        number: Its number within the module.
        site: Where it was recorded.
    """

    def __init__(self, snapshot: TraceSnapshot, module: int, site: Site, number: int) -> None:
        self.number = number
        self.site = site
        self._snapshot = snapshot
        self._module = module
        self._index = snapshot.index(module)

    def __len__(self) -> int:
        return int(self._index.lengths[self.number])

    def __repr__(self) -> str:
        return wrapped(f"<sequence {self.number} of {self.site.name}: {len(self)} steps>")

    def rows(self, quantity: str) -> Array:
        """(T, H), or (T, I) for the input.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        rows = self._snapshot.rows(self._module, self.site, quantity)
        # A copy, so that it can be written to, and torch.from_numpy takes it without a warning.
        return np.array(rows[self._index.rows(self.number)])

    def preactivation(self, gate: str) -> Array:
        """(T, H) what the sigmoid or tanh of a gate was applied to; as for `SiteTrace`."""
        rows = self._snapshot.preactivation(self._module, self.site, gate)
        return np.array(rows[self._index.rows(self.number)])

    @property
    def initial(self) -> Array:
        """(H,) the state that it began from: before its first step, or, reversed, its last."""
        return np.array(self._snapshot.initial(self._module, self.site)[self.number])

    @property
    def previous(self) -> Array:
        """(T, H) the state that each step started from.

        That is the state before it, unless the sequence was named by the user and the state was
        changed in between.

        Raises:
            NotRecordedError: The hidden states were not recorded.
        """
        if self._index.segments is not self._index.sequences:
            rows = self._index.rows(self.number)
            if isinstance(rows, slice):
                rows = np.arange(rows.start, rows.stop)
            return self._snapshot.gate_inputs(self._module, self.site).previous(rows)
        initial, hidden = self.initial[np.newaxis], self.hidden
        if not len(hidden):
            return hidden
        parts = [hidden[1:], initial] if self.site.reverse else [initial, hidden[:-1]]
        return np.concatenate(parts)

    @property
    def tokens(self) -> list[str | float | None] | None:
        """The token of each step, None for a step without; None where it has no tokens at all.

        Token ids are whole numbers.
        """
        tokens = self._annotations().get("tokens")
        if isinstance(tokens, np.ndarray):
            return [
                None if np.isnan(token) else int(token) if token.is_integer() else token
                for token in tokens.tolist()
            ]
        return tokens

    @property
    def labels(self) -> dict[str, Array | list[str | float | None]]:
        """By name, the label of each step: (T,) float64 with nan for none, or a list of texts."""
        labels = self._annotations()
        labels.pop("tokens", None)
        return labels

    @property
    def calls(self) -> Array:
        """The calls that it went through, as rows of `Trace.calls`."""
        return np.array(self._index.calls[self._index.pieces(self.number)])

    @property
    def place(self) -> int:
        """Its place in the batch of its first call."""
        return int(self._index.batch_indices[self._index.pieces(self.number)[0]])

    @property
    def tag(self) -> str | None:
        """The tag of its first call."""
        tag: str | None = self._snapshot.tags[self.calls[0]]
        return tag

    @property
    def parent(self) -> int | None:
        """The sequence from whose middle it began, if it did."""
        parent = int(self._index.parents[0][self.number])
        return None if parent < 0 else parent

    @property
    def parent_steps(self) -> int | None:
        """How many steps its parent had made by then."""
        steps = int(self._index.parents[1][self.number])
        return None if steps < 0 else steps

    @property
    def origin(self) -> str:
        """How it began: ``new``, ``fork``, ``ambiguous`` or ``dropped``.

        Ambiguous: it started from a state that several sequences had ended with. Dropped: it
        started from a state, or has a name, that was no longer remembered.
        """
        mark = self._snapshot.mark(self._module, self.number)
        return mark or ("new" if self.parent is None else "fork")

    def _annotations(self) -> dict[str, Array | list[str | float | None]]:
        return self._snapshot.annotations(self._module).of(self.number, len(self))
