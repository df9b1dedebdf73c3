"""`Sequence`, one sequence at one site as arrays in time order.

`QuantityAccess` gives sequences and sites one attribute for each quantity.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.records import Array, Site
from grutrace.storage.read.display.html_reprs import sequence_html
from grutrace.storage.read.display.text_reprs import sequence_repr
from grutrace.storage.read.snapshot import TraceSnapshot

R = TypeVar("R", covariant=True)


class QuantityAccess(ABC, Generic[R]):
    """One attribute for each recorded quantity.

    Every attribute raises `NotRecordedError` if its quantity was not recorded.
    """

    @abstractmethod
    def rows(self, quantity: str) -> R:
        """Return the rows of the quantity of this name."""

    @property
    def reset(self) -> R:
        """The reset gate r, (T, H)."""
        return self.rows("reset")

    @property
    def update(self) -> R:
        """The update gate z, (T, H). As in PyTorch, z = 1 keeps the previous state."""
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
        """The input of the layer, (T, I)."""
        return self.rows("input")


class Sequence(QuantityAccess[Array]):
    """One sequence at one site, joined over all calls that have steps of it.

    Its quantities are NumPy arrays, (T, H) or (T, I), in time order for both directions.

    Attributes:
        number: Number of the sequence within the module.
        site: The site.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> sequence = trace["l0"].sequence(3)
        >>> sequence
        <sequence 3 of l0: 5 steps>
        >>> sequence.hidden.shape, sequence.initial
        ((5, 3), array([0., 0., 0.], dtype=float32))
        >>> bool((sequence.hidden == output[:, 3].detach().numpy()).all())
        True
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
        return sequence_repr(self.number, self.site, len(self), self.tag, self.tokens)

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        return sequence_html(
            self._snapshot,
            self._module,
            self.site,
            self.number,
            self.tag,
            self.origin,
            self.tokens,
        )

    def rows(self, quantity: str) -> Array:
        """Return the rows of a quantity, (T, H), or (T, I) for the input.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        rows = self._snapshot.rows(self._module, self.site, quantity)
        # The copy is writable: torch.from_numpy warns about arrays that are not.
        return np.array(rows[self._index.rows(self.number)])

    def preactivation(self, gate: str) -> Array:
        """Return the pre-activation of a gate, (T, H); see `SiteTrace.preactivation`."""
        rows = self._snapshot.preactivation(self._module, self.site, gate)
        return np.array(rows[self._index.rows(self.number)])

    def gradient(self, quantity: str, *, preactivation: bool = False) -> Array:
        """Return the gradient of a quantity, (T, H) or (T, I); see `SiteTrace.gradient`."""
        rows = self._snapshot.gradient(
            self._module, self.site, quantity, preactivation=preactivation
        )
        return np.array(rows[self._index.rows(self.number)])

    def gradient_sources(self, step: int) -> Array:
        """Return how much of the gradient of a state came from which step, (T, H).

        Row s is the part of dL/dh(`step`) that arrived at the state of step s from outside the
        layer's recurrence: from the loss, or through the layer above. Its sum over the steps is
        ``gradient("hidden")[step]``. Rows of steps that the state does not influence are 0: those
        before it and, in a decoder, those after a state was detached. (If a state was changed
        between two calls, or a call had no backward pass, what came through it belongs to the step
        before.)

        Args:
            step: The step whose state it is; negative numbers count from the last.

        Raises:
            NotRecordedError: The gradient was not recorded, or there is no such step.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, record=("hidden", "gradient")) as trace:
            ...     output, state = gru(torch.randn(5, 4, 2))
            ...     output[[1, 4]].square().sum().backward()
            >>> sequence = trace["l0"].sequence(0)
            >>> sources = sequence.gradient_sources(1)
            >>> abs(sources).sum(axis=1) > 0             # the loss was computed at two steps
            array([False,  True, False, False,  True])
            >>> np.allclose(sources.sum(axis=0), sequence.gradient("hidden")[1])
            True
        """
        try:
            step = range(len(self))[operator.index(step)]
        except IndexError:
            raise NotRecordedError(
                f"sequence {self.number} of {self.site.name!r} has no step {step}: it has "
                f"{len(self)} steps"
            ) from None
        return self._snapshot.gradient_sources(self._module, self.site, self.number, step)

    @property
    def initial(self) -> Array:
        """(H,) initial state: before the first step, or before the last in a reverse direction."""
        return np.array(self._snapshot.initial(self._module, self.site)[self.number])

    @property
    def previous(self) -> Array:
        """(T, H) previous state of each step.

        It is the hidden state of the step before, unless the user named the sequence and changed
        its state between two calls.

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
        if self.site.reverse:
            return np.concatenate([hidden[1:], initial])
        return np.concatenate([initial, hidden[:-1]])

    @property
    def tokens(self) -> list[str | float | None] | None:
        """The token of each step, with None for a step without one. None without any tokens.

        Token ids are ints.
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
        """Labels by name: (T,) float64 with NaN for a missing label, or a list of strings."""
        labels = self._annotations()
        labels.pop("tokens", None)
        return labels

    @property
    def original(self) -> int:
        """Number of the sequence in the trace from which it was selected; else `number`."""
        return int(self._snapshot.original_numbers(self._module)[self.number])

    @property
    def calls(self) -> Array:
        """The calls with steps of this sequence, as rows of `Trace.calls`."""
        return np.array(self._index.calls[self._index.pieces(self.number)])

    @property
    def place(self) -> int:
        """Batch index in the first call."""
        return int(self._index.batch_indices[self._index.pieces(self.number)[0]])

    @property
    def tag(self) -> str | None:
        """Tag of the first call, or None."""
        tag: str | None = self._snapshot.tags[self.calls[0]]
        return tag

    @property
    def parent(self) -> int | None:
        """The sequence that this one was forked from. None for none, or if it is not selected."""
        parent = int(self._index.parents[0][self.number])
        return None if parent < 0 else parent

    @property
    def parent_steps(self) -> int | None:
        """Number of steps that the parent had made at the fork, or None."""
        steps = int(self._index.parents[1][self.number])
        return None if steps < 0 else steps

    @property
    def origin(self) -> str:
        """How the sequence began: ``new``, ``fork``, ``ambiguous`` or ``dropped``.

        ``ambiguous``: its initial state is the final state of several sequences. ``dropped``: its
        initial state or its name was no longer stored in the tracer's state memory.
        """
        mark = self._snapshot.mark(self._module, self.number)
        is_fork = self._snapshot.is_fork(self._module)[self.number]
        return mark or ("fork" if is_fork else "new")

    def _annotations(self) -> dict[str, Array | list[str | float | None]]:
        return self._snapshot.annotations(self._module).values(self.number, len(self))
