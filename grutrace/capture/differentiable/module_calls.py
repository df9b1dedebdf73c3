"""The calls of one module that are kept with their graph, and the gates computed from them.

Gates are computed when they are read, those of many calls at once: a decoder that calls its cell
once a token takes two matrix products, not two a call. What was computed is kept, so that a tensor
that a loss was computed from is the same object when its gradient is asked for.

B sequences in a batch, I input size, H hidden size, N rows of all calls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from grutrace.capture.differentiable.graph_call import GraphCall
from grutrace.capture.sequences.assignment import Commitment
from grutrace.capture.sequences.tracker import SequenceTracker
from grutrace.gru import cell
from grutrace.gru.cell import Products
from grutrace.gru.residual import ResidualCheck, check_residual
from grutrace.gru.tolerance import compare, lowest_precision
from grutrace.records import Site

#: Names of what `ModuleCalls.rows` returns beside the quantities: the arguments of the sigmoids and
#: the tanh.
PREACTIVATIONS = {f"{name}_preactivation": name for name in ("reset", "update", "candidate")}


class ModuleCalls:
    """The kept calls of one module. Safe to use from any thread.

    Args:
        keeps_last: Whether a call replaces those before it.
        state_memory: Maximum bytes of final states, to find the sequence that a call continues.

    Attributes:
        lock: Held while calls are added and rows are computed.
        calls: The calls, in order.
    """

    def __init__(self, keeps_last: bool, state_memory: int) -> None:
        self.lock = threading.RLock()
        self._keeps_last, self._state_memory = keeps_last, state_memory
        self.clear()

    def clear(self) -> None:
        """Drop all calls and their graph."""
        with self.lock:
            self.calls: list[GraphCall] = []
            self._computed: dict[str, _ComputedSite] = {}
            self._tracker = SequenceTracker(self._state_memory)
            self._pieces: list[list[tuple[int, int]]] = []
            self._indexed = self._row_count = 0

    def add(self, call: GraphCall) -> None:
        """Keep a call.

        If the weights have changed, the calls before are dropped: no gate of theirs can be computed
        any more, and no gradient can flow through them.
        """
        with self.lock:
            if self._keeps_last or (self.calls and self.calls[-1].has_earlier_weights_than(call)):
                self.clear()
            self.calls.append(call)

    def rows(self, site: Site, quantity: str) -> Tensor:
        """Return the rows of all calls, (N, H), or (N, I) for the input.

        Args:
            site: A site of the module.
            quantity: A quantity, or one of `PREACTIVATIONS`.

        Raises:
            StateError: The weights have changed since a call.
        """
        with self.lock:
            return self._computed_site(site).rows(quantity, self.calls)

    def residual(self, site: Site) -> ResidualCheck:
        """Return the largest residual of the calls, with its tolerance."""
        with self.lock:
            return self._computed_site(site).residual(self.calls)

    def _computed_site(self, site: Site) -> _ComputedSite:
        return self._computed.setdefault(site.suffix, _ComputedSite(site))

    def sequences(self) -> Sequence[Sequence[tuple[int, int]]]:
        """Return for each sequence the ranges of its rows, in time order."""
        with self.lock:
            for call in self.calls[self._indexed :]:
                self._assign(call)
            self._indexed = len(self.calls)
            return self._pieces

    def _assign(self, call: GraphCall) -> None:
        steps, lengths = call.steps, call.steps.lengths
        initial = final = None
        if not call.call.bidirectional:
            # The reverse direction ends at the first step, so nothing continues from there.
            initial = torch.cat([steps.unsort_batch(each) for each in call.call.initial], -1)
            outputs = [steps.final(layer.output, reverse=False) for layer in call.layers]
            final = torch.cat(outputs, -1).detach()
            initial = initial.detach()
        sequences = self._tracker.assign(initial, final, lengths, is_owned=True).sequences
        self._tracker.commit(tuple, Commitment(is_done=True))
        for number, length in zip(sequences.tolist(), lengths.tolist(), strict=True):
            while len(self._pieces) <= number:
                self._pieces.append([])
            self._pieces[number].append((self._row_count, self._row_count + length))
            self._row_count += length


class _ComputedSite:
    """The rows of one site that were computed, group by group of calls.

    Args:
        site: The site.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._groups: list[_Group] = []
        self._joined: dict[str, tuple[int, Tensor]] = {}

    def rows(self, quantity: str, calls: Sequence[GraphCall]) -> Tensor:
        groups = self._update(calls)
        joined = self._joined.get(quantity)
        if joined is None or joined[0] != len(groups):
            parts = [group.rows(quantity) for group in groups]
            joined = len(groups), parts[0] if len(parts) == 1 else torch.cat(parts)
            self._joined[quantity] = joined
        return joined[1]

    def residual(self, calls: Sequence[GraphCall]) -> ResidualCheck:
        checks = [group.check() for group in self._update(calls)]
        return max(checks, key=lambda check: check.residual / max(check.tolerance, 1e-300))

    def _update(self, calls: Sequence[GraphCall]) -> list[_Group]:
        """Put the calls since the last time into groups that can be computed together."""
        known = sum(len(group.calls) for group in self._groups)
        start = known
        for index in range(known + 1, len(calls) + 1):
            if index == len(calls) or not calls[index].computes_like(calls[start]):
                self._groups.append(_Group(self._site, calls[start:index]))
                start = index
        return self._groups


class _Group:
    """Calls with the same weights, whose gates are computed together.

    Args:
        site: The site.
        calls: The calls.
    """

    def __init__(self, site: Site, calls: Sequence[GraphCall]) -> None:
        self.calls, self._site = calls, site
        self._products: Products | None = None
        self._check: ResidualCheck | None = None
        with calls[0].context():
            parts = [call.row_values(site.layer, site.reverse) for call in calls]
            joined = [
                part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
            ]
        self._input, self._hidden, self._previous = joined
        self._rows: dict[str, Tensor] = {"input": self._input, "hidden": self._hidden}

    def rows(self, quantity: str) -> Tensor:
        if quantity not in self._rows:
            self._compute()
        return self._rows[quantity]

    def _compute(self) -> None:
        """Compute the gates and their pre-activations, in the graph."""
        first = self.calls[0]
        first.require_same_weights(self._site.name)
        with first.context():
            products = cell.products(
                self._input,
                self._previous,
                *first.weights(self._site.layer, self._site.reverse),
            )
            before = cell.preactivations(products)
            gates = cell.activate(before)
        self._rows |= gates._asdict()
        self._rows |= {name: getattr(before, gate) for name, gate in PREACTIVATIONS.items()}
        self._products = Products(*(product.detach() for product in products))

    def check(self) -> ResidualCheck:
        if self._check is None:
            gates = cell.Gates(*(self.rows(name) for name in cell.Gates._fields))
            assert self._products is not None
            with torch.no_grad():
                hidden, previous = self._hidden.detach(), self._previous.detach()
                stepped = cell.step(cell.Gates(*(gate.detach() for gate in gates)), previous)
                error = compare(stepped, hidden, self._products)
                dtype = lowest_precision(hidden.dtype, self._products.input.dtype)
                weights = self.calls[0].weights(self._site.layer, self._site.reverse)
                self._check = check_residual(
                    error, dtype, self._input, hidden, previous[:1], weights, None
                )
        return self._check
