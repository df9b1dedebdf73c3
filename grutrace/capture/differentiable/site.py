"""A site, and a sequence at a site, whose quantities are tensors in the model's graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.differentiable.loss_gradient import loss_gradient
from grutrace.capture.differentiable.module_calls import PREACTIVATIONS, ModuleCalls
from grutrace.errors import NotRecordedError, require_one_of, suggest_name
from grutrace.gru.layout import Integers
from grutrace.records import FORWARD_QUANTITIES, GATES, Site
from grutrace.reprs import wrap_text
from grutrace.storage.read.sequence import QuantityAccess


class DifferentiableSite(QuantityAccess[Tensor]):
    """One site of a `grutrace.DifferentiableTrace`.

    Its quantities are tensors (N, H), or (N, I) for the input, in the graph of the model's forward.
    The rows are those of all calls that the trace holds, call by call. Within a call, the sequences
    of the batch follow each other, without padding, each in time order.

    Args:
        site: The site.
        calls: The calls of its module.
        read: Returns the rows of a quantity or pre-activation.
        require_calls: Raises an error if there are no calls.

    Attributes:
        site: Name, layer and direction of the site.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
        >>> with grutrace.trace(gru, differentiable=True) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))  # 5 steps, 4 sequences
        >>> site = trace["l0"]
        >>> site
        <site l0: 4 sequences, 20 steps, differentiable>
        >>> site.update.shape, site.update.requires_grad
        (torch.Size([20, 3]), True)
        >>> site.update.mean().backward()            # a loss on the gate itself
        >>> gru.weight_hh_l0.grad.shape
        torch.Size([9, 3])
    """

    def __init__(
        self,
        site: Site,
        calls: ModuleCalls,
        read: Callable[[str], Tensor],
        require_calls: Callable[[], None],
    ) -> None:
        self.site, self._calls = site, calls
        self._read, self._require_calls = read, require_calls

    @property
    def name(self) -> str:
        """Full name of the site."""
        return self.site.name

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._calls.sequences())

    def __iter__(self) -> Iterator[DifferentiableSequence]:
        return (DifferentiableSequence(self, number) for number in range(len(self)))

    def __repr__(self) -> str:
        steps = int(self.lengths.sum())
        return wrap_text(
            f"<site {self.name}: {len(self)} sequences, {steps} steps, differentiable>"
        )

    @property
    def lengths(self) -> Integers:
        """(sequences,) number of steps of each sequence."""
        pieces = self._calls.sequences()
        return np.array([sum(stop - start for start, stop in piece) for piece in pieces], np.int64)

    def rows(self, quantity: str) -> Tensor:
        """Return the rows of all sequences, (N, H), or (N, I) for the input.

        The same tensor is returned until there are more calls, so that gradients with respect to
        it can be asked for: ``torch.autograd.grad(loss, site.update)``.

        Raises:
            NotRecordedError: The quantity is unknown, or the trace holds no call of the module.
            StateError: The weights have changed since a call.
        """
        if quantity not in FORWARD_QUANTITIES:
            near = suggest_name(quantity, FORWARD_QUANTITIES) if isinstance(quantity, str) else ""
            raise NotRecordedError(
                f"there is no quantity {quantity!r} at {self.name!r}{near}; "
                f"expected one of {', '.join(FORWARD_QUANTITIES)}"
            )
        return self._read(quantity)

    def preactivation(self, gate: str) -> Tensor:
        """Return the pre-activation of a gate, the argument of its sigmoid or tanh, (N, H).

        Args:
            gate: reset, update or candidate.

        Raises:
            OptionError: The gate is unknown.
            NotRecordedError: The trace holds no call of the module.
            StateError: The weights have changed since a call.
        """
        require_one_of("gate", gate, GATES)
        name = next(name for name, of in PREACTIVATIONS.items() if of == gate)
        return self._read(name)

    def sequence(self, number: int) -> DifferentiableSequence:
        """Return one sequence by its number. Negative numbers count from the last sequence.

        Raises:
            NotRecordedError: There is no sequence of this number.
        """
        count = len(self)
        try:
            number = range(count)[operator.index(number)]
        except IndexError:
            raise NotRecordedError(
                f"there is no sequence {number} at {self.name!r}, which has {count}"
            ) from None
        return DifferentiableSequence(self, number)

    def padded(self, quantity: str) -> tuple[Tensor, Integers]:
        """Return all sequences of a quantity, padded with zeros, in the graph.

        Returns:
            A tensor (sequences, longest, H), with I in place of H for the input; and the lengths,
            (sequences,).

        Raises:
            NotRecordedError: The quantity is unknown, or the trace holds no call of the module.
        """
        sequences = [sequence.rows(quantity) for sequence in self]
        if not sequences:
            rows = self.rows(quantity)
            return rows.new_zeros(0, 0, rows.shape[-1]), self.lengths
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), self.lengths

    @property
    def residual(self) -> float:
        """The largest ``|h from the gates - kernel's h|`` of all calls that the trace holds.

        Raises:
            NotRecordedError: The trace holds no call of the module.
        """
        self._require_calls()
        return self._calls.residual(self.site).residual

    def gradient(self, quantity: str, *, of: Tensor, preactivation: bool = False) -> Tensor:
        """Return the gradient of a loss with respect to a quantity, (N, H), or (N, I).

        This answers what a gate did to a loss that was computed from the model's output. (The
        tensor ``site.update`` is a side branch, on which that loss does not depend.) The gradient
        of a gate is the one through the state of its own step; the gradient of ``hidden`` is the
        total one, through the output of the step and through all later steps. The gradients that
        arrive at the layer come from the graph, the rest is computed in closed form, without a
        second run. The graph is kept, so ``loss.backward()`` can follow.

        Args:
            quantity: reset, update, candidate, hidden or input.
            of: The loss, a tensor of one element.
            preactivation: Return the gradient of the gate's pre-activation instead.

        Returns:
            The rows, in the order of `rows`, without a graph. The type is float32, or float64 if
            the kernel computed in it. Rows of calls that the loss does not depend on are 0.

        Raises:
            OptionError: The loss is no tensor of one element, has no graph or does not depend on
                the site; or the quantity is unknown.
            NotRecordedError: The trace holds no call of the module.
            StateError: The weights have changed since a call, or the graph was freed.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
            >>> with grutrace.trace(gru, differentiable=True) as trace:
            ...     output, state = gru(torch.randn(5, 4, 2))
            >>> loss = state.square().sum()
            >>> gradient = trace["l0"].sequence(0).gradient("hidden", of=loss)
            >>> gradient.norm(dim=1).shape                   # one norm for each step
            torch.Size([5])
            >>> torch.allclose(gradient[-1], 2 * state[0, 0])
            True
        """
        self._require_calls()
        with self._calls.lock:
            calls = tuple(self._calls.calls)
        return loss_gradient(self.site, calls, of, quantity, preactivation=preactivation)


class DifferentiableSequence(QuantityAccess[Tensor]):
    """One sequence of a `DifferentiableSite`: tensors (T, H), or (T, I), in time order.

    Args:
        site: The site.
        number: Number of the sequence.

    Attributes:
        number: Number of the sequence within the module.
    """

    def __init__(self, site: DifferentiableSite, number: int) -> None:
        self._site, self.number = site, number

    def __len__(self) -> int:
        return int(self._site.lengths[self.number])

    def __repr__(self) -> str:
        return wrap_text(
            f"<sequence {self.number} of {self._site.name}: {len(self)} steps, differentiable>"
        )

    def rows(self, quantity: str) -> Tensor:
        """Return the rows of a quantity, (T, H), or (T, I) for the input."""
        return self._select(self._site.rows(quantity))

    def preactivation(self, gate: str) -> Tensor:
        """Return the pre-activation of a gate, (T, H)."""
        return self._select(self._site.preactivation(gate))

    def gradient(self, quantity: str, *, of: Tensor, preactivation: bool = False) -> Tensor:
        """Return the gradient of a loss, (T, H) or (T, I); see `DifferentiableSite.gradient`."""
        gradient = self._site.gradient(quantity, of=of, preactivation=preactivation)
        return self._select(gradient)

    def _select(self, rows: Tensor) -> Tensor:
        pieces = self._site._calls.sequences()[self.number]
        parts = [rows[start:stop] for start, stop in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
