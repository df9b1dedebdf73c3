"""Recompute the gates of a call that has run, for one direction of one layer.

The replay is teacher-forced: the state before every step is known, because it is the layer's own
output shifted by one step. So all steps are computed at once, and rounding errors do not
accumulate. Running the recurrence again from the initial state could end anywhere, because trained
GRUs can be chaotic; see docs/equations.md.

`PartialReplay` recomputes some gates of some units. Each gate of each unit needs only its own rows
of the two weight matrices; the candidate also needs the reset gate of the same unit. If not all
three gates are computed, they are computed for a few more units, whose states are compared with the
kernel's. The residual is then over these units, and all steps.

T steps, B sequences in a batch, I input size, H hidden size, U requested units, R rows of the
weights that are needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from grutrace.gru import cell
from grutrace.gru.cell import Products
from grutrace.gru.kernel import CellWeights
from grutrace.gru.kernel_gates import CHECK_UNITS
from grutrace.gru.layout import OutputBuffer, SequenceLayout, copy_cast, numpy_type
from grutrace.gru.residual import ResidualCheck, check_residual
from grutrace.gru.tolerance import (
    compare,
    lowest_precision,
    product_maxima,
    summarize,
    to_floats,
)
from grutrace.records import GATES

#: Elements of the two products that are computed at once, so that they stay in the processor's
#: cache; and the minimum number of rows for fast products.
BLOCK, SMALLEST_BLOCK = 384 * 1024, 256


@dataclass(frozen=True)
class ReplayResult:
    """The gates of a call at one site, with the check of its states.

    Attributes:
        gates: By name, each in the kernel's order and shape, (T, B, H) or (N, H); of a partial
            replay (T, B, U) or (N, U).
        residual: Largest ``|replayed h - kernel's h|``, of a partial replay that of the checked
            units; see `grutrace.gru.tolerance.ReplayError`.
        tolerance: The largest residual that rounding can explain.
        precision: Machine epsilon of the least precise data type that the kernel used.
    """

    gates: Mapping[str, Tensor]
    residual: float
    tolerance: float
    precision: float

    @property
    def check(self) -> ResidualCheck:
        """The residual, the tolerance and the precision together."""
        return ResidualCheck(self.residual, self.tolerance, self.precision)


class GateReplay:
    """Replays the calls of one direction of one layer. It does not keep the module alive.

    Args:
        module: The nn.GRU or nn.GRUCell; None if every call passes weights.
        layer: Number of the layer, from 0.
        reverse: Whether it is the reverse direction.
        stored: The data type of stored rows, if it differs from the kernel's. Its rounding is part
            of the tolerance, but not of the residual.
    """

    def __init__(
        self,
        module: nn.GRU | nn.GRUCell | None,
        layer: int = 0,
        reverse: bool = False,
        stored: torch.dtype | None = None,
    ) -> None:
        self._reference = None if module is None else weakref.ref(module)
        self._layer, self._reverse = layer, reverse
        self._stored = stored

    @property
    def weights(self) -> CellWeights:
        """The current weights of the module."""
        module = None if self._reference is None else self._reference()
        if module is None:
            raise ValueError("expected weights, or a module that still exists")
        if isinstance(module, nn.GRUCell):
            return CellWeights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        each = 4 if module.bias else 2
        index = self._layer * (2 if module.bidirectional else 1) + self._reverse
        flat = cast("list[Tensor]", module._flat_weights)
        return CellWeights(*flat[index * each : (index + 1) * each])

    @torch.no_grad()
    def replay(
        self,
        input: Tensor,
        hidden: Tensor,
        initial: Tensor,
        steps: SequenceLayout,
        weights: CellWeights | None = None,
        buffers: Mapping[str, OutputBuffer] | None = None,
    ) -> ReplayResult:
        """Recompute the gates of a call, all steps at once, in the kernel's own precision.

        The precision is that of the input and weights, or of autocast: call it in the same autocast
        context as the kernel. The gates are the kernel's to rounding in that type; in half
        precision, a replay in float32 would differ from them by thousandths. On a CPU two replays
        of the same call, with as many threads, are the same bits: see `cell.product`.

        Args:
            input: (T, B, I) or (N, I), the input of the layer.
            hidden: (T, B, H) or (N, H), the kernel's output for this direction.
            initial: (B, H), in the kernel's batch order.
            steps: The layout of the two above.
            weights: What the kernel used, if not the module's present weights.
            buffers: By name of the gate, where to write those that are wanted; new memory if None.
        """
        weights = self.weights if weights is None else weights
        if buffers is None:
            kept = numpy_type(hidden.dtype)
            buffers = {name: steps.allocate(hidden.shape[-1], kept) for name in GATES}
        size = max(SMALLEST_BLOCK, BLOCK // (6 * hidden.shape[-1]))
        extremes, product = [], input.dtype
        blocks = steps.blocks(hidden, initial, size, reverse=self._reverse)
        for part, previous in blocks if hidden.numel() else ():
            products = cell.products(input[part], previous, *weights)
            bounds = product_maxima(products)
            gates = cell.gates_in_place(products)
            for name, buffer in buffers.items():
                copy_cast(buffer.values[part], getattr(gates, name))
            off = torch.aminmax(cell.step(gates, previous).sub_(hidden[part]))
            extremes.append(to_floats((*off, *bounds)))
            product = products.input.dtype
        found = summarize(extremes)
        if found is None:
            previous = steps.previous(hidden, initial, reverse=self._reverse)
            products = cell.products(input, previous, *weights)
            found = compare(cell.step(cell.gates(products), previous), hidden, products)
        written = {name: buffer.values for name, buffer in buffers.items()}
        dtype = lowest_precision(hidden.dtype, product)
        return ReplayResult(
            written, *check_residual(found, dtype, input, hidden, initial, weights, self._stored)
        )


class ColumnSelector:
    """Selects indices of the last axis, in the given order; a view if they are evenly spaced."""

    def __init__(self, indices: Sequence[int]) -> None:
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        even = range(indices[0], indices[0] + step * len(indices), step) if step > 0 else range(0)
        self._slice = slice(even.start, even.stop, step) if list(even) == list(indices) else None
        self._indices = torch.tensor(indices)

    def of(self, values: Tensor) -> Tensor:
        """(..., U) of (..., H). May share memory."""
        if self._slice is not None:
            return values[..., self._slice]
        return values.index_select(-1, self._indices.to(values.device))


class PartialReplay:
    """Recomputes some gates of some units from their rows of the weights.

    Args:
        hidden_size: H
        gates: Names of the requested gates.
        units: Indices of the requested units, in the order of the results.
        reverse: Whether it is the reverse direction.
        stored: The data type of stored rows.
    """

    def __init__(
        self,
        hidden_size: int,
        gates: Sequence[str],
        units: Sequence[int],
        reverse: bool,
        stored: torch.dtype,
    ) -> None:
        self._gates, self._reverse, self._stored = tuple(gates), reverse, stored
        self._computed = required_gates(gates)
        self._whole = whole = self._computed == set(GATES)
        indices = range(len(units)) if whole else evenly_spaced(len(units), CHECK_UNITS)
        self._proof_units = ColumnSelector([units[place] for place in indices])
        # Where among the columns of its products a gate has those of the proof.
        self._proof_columns = {
            name: ColumnSelector(indices if name in self._computed else range(len(indices)))
            for name in GATES
        }
        rows = {
            name: units if name in self._computed else [units[place] for place in indices]
            for name in GATES
        }
        self._widths = [len(rows[name]) for name in GATES]
        self._rows = torch.tensor(
            [gate * hidden_size + unit for gate, name in enumerate(GATES) for unit in rows[name]]
        )

    def rows(self, weights: CellWeights) -> CellWeights:
        """Return copies of the R rows of each weight that it needs."""
        present = (each.detach() for each in weights if each is not None)
        return CellWeights(*(each.index_select(0, self._rows.to(each.device)) for each in present))

    @torch.no_grad()
    def replay(
        self,
        input: Tensor,
        hidden: Tensor,
        initial: Tensor,
        steps: SequenceLayout,
        rows: CellWeights,
    ) -> ReplayResult:
        """Recompute the gates of a call, all steps at once. For the rest see `GateReplay.replay`.

        Args:
            input: (T, B, I) or (N, I), the input of the layer.
            hidden: (T, B, H) or (N, H), the kernel's output for this direction.
            initial: (B, H), in the kernel's batch order.
            steps: The layout of the two above.
            rows: As `rows` gave them.
        """
        products = Products(
            cell.product(input, rows.weight_ih, rows.bias_ih),
            steps.previous_product(
                lambda states: cell.product(states, rows.weight_hh, rows.bias_hh),
                hidden,
                initial,
                reverse=self._reverse,
            ),
        )
        of_gates = self._by_gate(products)
        gates = cell.partial_gates(
            {name: of_gates[name] for name in GATES if name in self._computed}
        )
        proof = gates if self._whole else cell.partial_gates(self._of_proof(of_gates))
        units = self._proof_units
        proven = units.of(hidden)
        previous = steps.previous(proven, units.of(initial), reverse=self._reverse)
        found = compare(
            cell.step(cell.Gates(**proof), previous),
            proven,
            products,
            of_gates["candidate"].hidden,
        )
        dtype = lowest_precision(hidden.dtype, products.input.dtype, products.hidden.dtype)
        return ReplayResult(
            {name: gates[name] for name in self._gates},
            *check_residual(found, dtype, input, hidden, initial, rows, self._stored),
        )

    def _of_proof(self, products: dict[str, Products]) -> dict[str, Products]:
        """The columns of each gate that belong to the units that prove the call."""
        return {
            name: Products(*(self._proof_columns[name].of(each) for each in product))
            for name, product in products.items()
        }

    def _by_gate(self, products: Products) -> dict[str, Products]:
        """The columns of each gate."""
        parts = zip(*(torch.split(each, self._widths, -1) for each in products), strict=True)
        return {name: Products(*part) for name, part in zip(GATES, parts, strict=True)}


def required_gates(gates: Sequence[str]) -> set[str]:
    """Return these gates and the gates from which they are computed."""
    return {*gates, "reset"} if "candidate" in gates else set(gates)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spaced."""
    few = min(count, most)
    return [place * count // few for place in range(few)]
