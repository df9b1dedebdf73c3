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
from grutrace.gru.compiled_replay import Grouping, replay_products
from grutrace.gru.gate_copies import CHECK_UNITS
from grutrace.gru.kernel import CellWeights
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


def block_rows(size: int) -> int:
    """Return the number of rows whose products are computed at once, for H = `size`."""
    return max(SMALLEST_BLOCK, BLOCK // (6 * max(1, size)))


@dataclass(frozen=True)
class ReplayResult:
    """The gates of a call at one site, with the check of its states.

    Attributes:
        gates: By name, in the kernel's order and shape: (T, B, H) or (N, H); for a partial replay,
            (T, B, U) or (N, U).
        residual: Largest ``|replayed h - kernel's h|``, for a partial replay of the checked units
            only; see `grutrace.gru.tolerance.ReplayError`.
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
        count = 4 if module.bias else 2
        index = self._layer * (2 if module.bidirectional else 1) + self._reverse
        flat_weights = cast("list[Tensor]", module._flat_weights)
        return CellWeights(*flat_weights[index * count : (index + 1) * count])

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

        That is the precision of the input and weights, or of autocast. So call it in the same
        autocast context as the kernel. The gates equal the kernel's up to rounding in this type. (A
        replay in float32 would differ from a half-precision kernel by thousandths.) On a CPU, two
        replays of a call with the same number of threads give the same bits; see `cell.product`.

        Args:
            input: (T, B, I) or (N, I), the input of the layer.
            hidden: (T, B, H) or (N, H), the kernel's output for this direction.
            initial: (B, H), in the kernel's batch order.
            steps: Layout of the call.
            weights: The weights that the kernel used; by default the module's present weights.
            buffers: Memory to write to, by gate name. Gates without a buffer are not returned. By
                default, new memory for all gates.
        """
        weights = self.weights if weights is None else weights
        if buffers is None:
            stored = numpy_type(hidden.dtype)
            buffers = {name: steps.allocate(hidden.shape[-1], stored) for name in GATES}
        size = block_rows(hidden.shape[-1])
        extremes, product_dtype = [], input.dtype
        blocks = steps.blocks(hidden, initial, size, reverse=self._reverse)
        for block, previous in blocks if hidden.numel() else ():
            products = cell.products(input[block], previous, *weights)
            product_dtype = products.input.dtype
            targets = {name: buffer.values[block] for name, buffer in buffers.items()}
            checks = replay_products(products, previous, hidden[block], targets, Grouping.ALL)
            if checks is not None:
                residual, product, recurrent = (float(column[0]) for column in checks)
                extremes.append([residual] * 2 + [product] * 4 + [recurrent] * 2)
                continue
            bounds = product_maxima(products)
            gates = cell.gates_in_place(products)
            for name, target in targets.items():
                copy_cast(target, getattr(gates, name))
            difference = torch.aminmax(cell.step(gates, previous).sub_(hidden[block]))
            extremes.append(to_floats((*difference, *bounds)))
        error = summarize(extremes)
        if error is None:
            previous = steps.previous(hidden, initial, reverse=self._reverse)
            products = cell.products(input, previous, *weights)
            error = compare(cell.step(cell.gates(products), previous), hidden, products)
        gate_values = {name: buffer.values for name, buffer in buffers.items()}
        dtype = lowest_precision(hidden.dtype, product_dtype)
        check = check_residual(error, dtype, input, hidden, initial, weights, self._stored)
        return ReplayResult(gate_values, *check)


class ColumnSelector:
    """Selects indices of the last axis, in the given order; a view if they are evenly spaced."""

    def __init__(self, indices: Sequence[int]) -> None:
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        stop = indices[0] + step * len(indices)
        is_evenly_spaced = step > 0 and list(range(indices[0], stop, step)) == list(indices)
        self._slice = slice(indices[0], stop, step) if is_evenly_spaced else None
        self._indices = torch.tensor(indices)

    def of(self, values: Tensor) -> Tensor:
        """Return (..., U) from (..., H). May share memory."""
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
        self._has_all_gates = self._computed == set(GATES)
        indices: Sequence[int] = range(len(units))
        if not self._has_all_gates:
            indices = evenly_spaced(len(units), CHECK_UNITS)
        check_units = [units[index] for index in indices]
        self._check_units = ColumnSelector(check_units)
        # By gate, the checked units among the columns of its products.
        self._check_columns = {
            name: ColumnSelector(indices if name in self._computed else range(len(indices)))
            for name in GATES
        }
        # A gate that was not requested is computed for the checked units only.
        units_of_gate = {name: units if name in self._computed else check_units for name in GATES}
        self._widths = [len(units_of_gate[name]) for name in GATES]
        self._rows = torch.tensor(
            [
                gate * hidden_size + unit
                for gate, name in enumerate(GATES)
                for unit in units_of_gate[name]
            ]
        )

    def rows(self, weights: CellWeights) -> CellWeights:
        """Return copies of the R rows of each weight that the replay needs."""
        tensors = [weight.detach() for weight in weights if weight is not None]
        rows = self._rows
        return CellWeights(*(tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors))

    @torch.no_grad()
    def replay(
        self,
        input: Tensor,
        hidden: Tensor,
        initial: Tensor,
        steps: SequenceLayout,
        rows: CellWeights,
    ) -> ReplayResult:
        """Recompute the gates of a call, all steps at once, like `GateReplay.replay`.

        Args:
            input: (T, B, I) or (N, I), the input of the layer.
            hidden: (T, B, H) or (N, H), the kernel's output for this direction.
            initial: (B, H), in the kernel's batch order.
            steps: Layout of the call.
            rows: Rows of the weights, from `rows`.
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
        by_gate = self._split_by_gate(products)
        gates = cell.partial_gates(
            {name: by_gate[name] for name in GATES if name in self._computed}
        )
        check_gates = gates
        if not self._has_all_gates:
            check_gates = cell.partial_gates(self._select_check_columns(by_gate))
        units = self._check_units
        check_states = units.of(hidden)
        previous = steps.previous(check_states, units.of(initial), reverse=self._reverse)
        error = compare(
            cell.step(cell.Gates(**check_gates), previous),
            check_states,
            products,
            by_gate["candidate"].hidden,
        )
        dtype = lowest_precision(hidden.dtype, products.input.dtype, products.hidden.dtype)
        check = check_residual(error, dtype, input, hidden, initial, rows, self._stored)
        return ReplayResult({name: gates[name] for name in self._gates}, *check)

    def _select_check_columns(self, by_gate: dict[str, Products]) -> dict[str, Products]:
        """Return the columns of each gate that belong to the checked units."""
        return {
            name: Products(*(self._check_columns[name].of(product) for product in products))
            for name, products in by_gate.items()
        }

    def _split_by_gate(self, products: Products) -> dict[str, Products]:
        """Return the columns of each gate."""
        input, hidden = (torch.split(product, self._widths, -1) for product in products)
        pairs = zip(input, hidden, strict=True)
        return {name: Products(*pair) for name, pair in zip(GATES, pairs, strict=True)}


def required_gates(gates: Sequence[str]) -> set[str]:
    """Return these gates and the gates from which they are computed."""
    return {*gates, "reset"} if "candidate" in gates else set(gates)


def evenly_spaced(count: int, maximum: int) -> list[int]:
    """Return at most `maximum` of the numbers below `count`, evenly spaced."""
    size = min(count, maximum)
    return [index * count // size for index in range(size)]
