"""Recompute the gates of recorded steps: arrays in, arrays out.

A gate is a function of the weights, the input and the state before the step. If all three are
recorded, gates of any steps can be computed at any time, to the rounding of one step: no step
depends on another, and no recurrence is run. docs/equations.md explains why this matters.

The calls of a stepwise decoder are small, and the overhead of each costs many times its arithmetic.
Because rows are independent, rows of any number of calls with the same weights are computed
together.

n steps, N rows of all calls, I input size, H hidden size, U requested units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grutrace.gru import cell
from grutrace.gru.compiled_replay import Grouping, replay_products
from grutrace.gru.layout import copy_cast
from grutrace.gru.replay import block_rows
from grutrace.gru.tolerance import (
    abs_sum_bounds,
    machine_epsilon,
    storage_rounding,
    tolerance,
    zero_where_equal,
)
from grutrace.records import GATES, WEIGHTS, Array
from grutrace.torch_internals import without_torch_functions

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Floating-point types by machine epsilon.
_BY_PRECISION = {machine_epsilon(dtype): dtype for dtype in _TYPES}

#: Machine epsilon of float64, in which checks are computed.
FLOAT64_EPS = machine_epsilon(torch.float64)


@contextmanager
def isolated_context() -> Iterator[None]:
    """Run without function modes, autograd and autocast, which may be active around the reader."""
    with without_torch_functions(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def dtype_from_eps(precision: float, otherwise: torch.dtype) -> torch.dtype:
    """Return the floating-point type with this machine epsilon; `otherwise` if there is none."""
    return _BY_PRECISION.get(precision, otherwise)


class StepRecomputation:
    """Recomputes gates and states of some steps from their inputs and previous states.

    Args:
        input: (n, I)
        previous: (n, H) the state before each step.
        weights: The weights that all these steps used, by name in `WEIGHTS`.
        precision: Machine epsilon of the type to compute in; if no type has it, the type of the
            arrays. In the kernel's type, the gates equal the kernel's up to rounding.
        units: The units to compute.
    """

    @isolated_context()
    def __init__(
        self,
        input: Array,
        previous: Array,
        weights: Mapping[str, Array],
        precision: float,
        units: slice = slice(None),
    ) -> None:
        self._previous = _tensor(previous)
        self._units = units
        dtype = dtype_from_eps(precision, self._previous.dtype)
        arrays = [_of_units(weights[name], units) for name in WEIGHTS if name in weights]
        tensors = [_tensor(array).to(dtype) for array in (input, previous, *arrays)]
        self._factors = tensors[:4]
        self._products = cell.products(*tensors)
        self._preactivations = cell.preactivations(self._products)
        self._set: dict[str, tuple[Tensor, Tensor]] = {}

    def set_gates(self, values: Mapping[str, tuple[Array, Array]]) -> None:
        """Replace gates by others. To be called before gates or states are read.

        Args:
            values: By gate, which of its values to replace, and the values, (n, U) each.
        """
        for name, (mask, gate) in values.items():
            self._set[name] = torch.from_numpy(mask), _tensor(gate)

    @isolated_context()
    def preactivation(self, name: str) -> Array:
        """Return (n, U) the argument of the gate's sigmoid or tanh."""
        return _array(getattr(self._preactivations, name))

    @isolated_context()
    def gate(self, name: str) -> Array:
        """Return the gate, (n, U)."""
        return _array(getattr(self._gates, name))

    @cached_property
    @isolated_context()
    def hidden(self) -> Array:
        """(n, U) the state after each step."""
        return _array(cell.step(self._gates, self._previous[:, self._units]))

    @cached_property
    @isolated_context()
    def product_maxima(self) -> tuple[Array, Array]:
        """(n,) largest finite element of each step's products, and (n,) of the recurrent one.

        They are arguments of `tolerances`.
        """
        input, hidden = (_finite_magnitudes(product) for product in self._products)
        recurrent = hidden.chunk(3, -1)[2]
        return _largest(torch.cat([input, hidden], -1)), _largest(recurrent)

    @cached_property
    @isolated_context()
    def abs_sum_bounds(self) -> Array:
        """(n,) a bound on the sums of the absolute terms of each step's products.

        It is an argument of `tolerances`, used if rows are stored in a smaller type.
        """
        array: Array = abs_sum_bounds(*self._factors).double().numpy()
        return array

    @cached_property
    def _gates(self) -> cell.Gates:
        if not self._set:
            return cell.activate(self._preactivations)
        reset, update, _ = cell.activate(self._preactivations)
        reset, update = self._as_set("reset", reset), self._as_set("update", update)
        input, hidden = (product.chunk(3, -1)[2] for product in self._products)
        candidate = self._as_set("candidate", (input + reset * hidden).tanh())
        return cell.Gates(reset, update, candidate)

    def _as_set(self, name: str, gate: Tensor) -> Tensor:
        if name not in self._set:
            return gate
        mask, values = self._set[name]
        return torch.where(mask, values.to(gate.dtype), gate)


def tolerances(
    precisions: Array,
    terms: int,
    states: Array,
    products: Array,
    recurrents: Array,
    stored: np.dtype[Any],
    abs_sum_bounds: Array,
) -> Array:
    """Return the tolerance of each call, (calls,); see `grutrace.gru.tolerance.tolerance`.

    Args:
        precisions: (calls,) machine epsilon of the type in which the kernel computed.
        terms: Number of terms of the sums: I + H.
        states: (calls,) largest ``|h|`` before a step.
        products: (calls,) largest element, in absolute value, of the products.
        recurrents: (calls,) largest element of the product that the reset gate is applied to.
        stored: The type in which the rows are stored.
        abs_sum_bounds: (calls,) a bound on the sums of the absolute terms of the products.
    """
    stored_dtype: torch.dtype = getattr(torch, stored.name)
    columns = (
        array.tolist() for array in (precisions, states, products, recurrents, abs_sum_bounds)
    )
    allowed = np.zeros(len(precisions))
    for call, (precision, state, product, recurrent, bound) in enumerate(
        zip(*columns, strict=True)
    ):
        if precision not in _BY_PRECISION:
            continue
        max_state = max(1.0, state)
        allowed[call] = tolerance(_BY_PRECISION[precision], terms, max_state, product, recurrent)
        if machine_epsilon(stored_dtype) > precision:
            allowed[call] += storage_rounding(stored_dtype, max_state, bound, recurrent)
    return allowed


def _of_units(weight: Array, units: slice) -> Array:
    """Return the rows of a stacked weight that belong to these units, (3U, ...) of (3H, ...)."""
    if units == slice(None):
        return weight
    by_gate = weight.reshape(3, -1, *weight.shape[1:])[:, units]
    return by_gate.reshape(-1, *weight.shape[1:])


def _tensor(array: Array) -> Tensor:
    # torch requires writable arrays, although nothing here writes to them.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _array(tensor: Tensor) -> Array:
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _finite_magnitudes(product: Tensor) -> Tensor:
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.to(wide).abs().nan_to_num_(nan=0.0, posinf=0.0)


def _largest(sizes: Tensor) -> Array:
    array: Array = sizes.amax(-1).double().numpy()
    return array


class RecomputedGates(NamedTuple):
    """Recomputed gates, with the residual of each row and the terms of its tolerance.

    Attributes:
        gates: By name, (N, H).
        residual: (N,) largest ``|h from the gates - recorded h|`` of each row; infinite if one of
            the two is NaN.
        product: (N,) largest element, in absolute value, of each row's products; 0 if not finite.
        recurrent: (N,) largest element of the hidden product that the reset gate is applied to.
        abs_sum_bounds: (N,) a bound on the sums of the absolute terms of both products; 0 unless
            the rows are stored in a smaller type than the kernel computed in.
    """

    gates: Mapping[str, Array]
    residual: Array
    product: Array
    recurrent: Array
    abs_sum_bounds: Array


@isolated_context()
def recompute(
    input: Array,
    previous: Array,
    hidden: Array,
    weights: Mapping[str, Array],
    precision: float,
    dtype: np.dtype[Any],
) -> RecomputedGates:
    """Compute the gates of rows, and the residual of each row.

    Args:
        input: (N, I)
        previous: (N, H) the state before each step.
        hidden: (N, H) the state after each step, as the kernel returned it.
        weights: The weights that all these rows used, by name in `WEIGHTS`.
        precision: Machine epsilon of the type in which the kernel computed. The gates are
            computed in the same type.
        dtype: NumPy type of the gates.
    """
    x, h_before, h_after = map(torch.from_numpy, (input, previous, hidden))
    kernel_dtype = dtype_from_eps(precision, h_before.dtype)
    tensors = [
        torch.from_numpy(weights[name]).to(kernel_dtype) for name in WEIGHTS if name in weights
    ]
    count, size = hidden.shape
    gates = {name: np.empty((count, size), dtype) for name in GATES}
    buffers = {name: torch.from_numpy(rows) for name, rows in gates.items()}
    dtype_of_checks = torch.promote_types(h_after.dtype, torch.float32)
    residual, product, recurrent = (torch.empty(count, dtype=dtype_of_checks) for _ in range(3))
    rows = block_rows(size)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        states = h_before[block].to(kernel_dtype)
        products = cell.products(x[block].to(kernel_dtype), states, *tensors)
        targets = {name: buffer[block] for name, buffer in buffers.items()}
        checks = replay_products(products, states, h_after[block], targets, Grouping.ROW)
        if checks is not None and np.isfinite(checks.residual).all():
            residual[block], product[block], recurrent[block] = map(torch.from_numpy, checks)
            continue
        product[block], recurrent[block] = _product_maxima(products)
        block_gates = cell.gates_in_place(products)
        for name, target in targets.items():
            copy_cast(target, getattr(block_gates, name))
        residual[block] = _residual_per_row(cell.step(block_gates, states), h_after[block])
    bounds = np.zeros(count)
    if float(np.finfo(dtype).eps) > precision:
        bounds = abs_sum_bounds(x, h_before, *tensors[:2]).double().numpy()
    return RecomputedGates(gates, residual.numpy(), product.numpy(), recurrent.numpy(), bounds)


def states_match(
    input: Array,
    previous: Array,
    hidden: Array,
    weights: Mapping[str, Array],
    precision: float,
) -> Array:
    """Return whether the weights lead to the recorded state of each row, up to rounding, (N,).

    Args:
        input: (N, I)
        previous: (N, H) the state before each step.
        hidden: (N, H) the state after each step.
        weights: Weights by name in `WEIGHTS`.
        precision: Machine epsilon of the type in which the kernel computed.
    """
    x, h_before, h_after = map(_as_writable, (input, previous, hidden))
    arrays = {name: _as_writable(array) for name, array in weights.items()}
    recomputed = recompute(x, h_before, h_after, arrays, precision, hidden.dtype)
    states = np.nan_to_num(np.abs(previous), nan=0.0, posinf=0.0).max(1, initial=0.0)
    count, terms = len(hidden), input.shape[1] + hidden.shape[1]
    allowed = tolerances(
        np.full(count, precision),
        terms,
        states,
        recomputed.product,
        recomputed.recurrent,
        hidden.dtype,
        recomputed.abs_sum_bounds,
    )
    return np.asarray(recomputed.residual <= allowed)


@isolated_context()
def row_residuals(update: Array, candidate: Array, previous: Array, hidden: Array) -> Array:
    """Return the residual of each row, (N,); see `RecomputedGates.residual`.

    Args:
        update: (N, U)
        candidate: (N, U)
        previous: (N, U) the state before each step.
        hidden: (N, U) the state after each step, as the kernel returned it.
    """
    z, n, h_before, h_after = map(torch.from_numpy, (update, candidate, previous, hidden))
    count, size = hidden.shape
    residual = torch.empty(count, dtype=torch.promote_types(h_after.dtype, torch.float32))
    rows = block_rows(size)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        # `step` does not use the reset gate, so the update gate stands in for it.
        expected = cell.step(cell.Gates(z[block], z[block], n[block]), h_before[block])
        residual[block] = _residual_per_row(expected, h_after[block])
    array: Array = residual.numpy()
    return array


def _product_maxima(products: cell.Products) -> tuple[Tensor, Tensor]:
    """Return the largest element of each row's products, (n,), and of the recurrent one, (n,)."""
    size = products.hidden.shape[-1] // 3
    gates, candidate = products.hidden[:, : 2 * size], products.hidden[:, 2 * size :]
    maxima = [_max_abs_per_row(product) for product in (products.input, gates, candidate)]
    return torch.stack(maxima).amax(0), maxima[2]


def _max_abs_per_row(values: Tensor) -> Tensor:
    least, most = torch.aminmax(values, dim=-1)
    return torch.maximum(-least, most).float().nan_to_num_(nan=0.0, posinf=0.0)


def _residual_per_row(expected: Tensor, hidden: Tensor) -> Tensor:
    differences = (expected - hidden).abs_()
    residual = differences.amax(-1)
    if bool(residual.isfinite().all()):
        return residual
    return zero_where_equal(differences, expected, hidden).amax(-1)


def _as_writable(array: Array) -> Array:
    # torch requires writable arrays, although nothing here writes to them.
    return np.require(array, requirements=["C", "W"])
