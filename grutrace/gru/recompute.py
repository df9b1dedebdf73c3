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
from grutrace.gru.layout import copy_cast
from grutrace.gru.replay import BLOCK, SMALLEST_BLOCK
from grutrace.gru.tolerance import abs_sum_bounds, machine_epsilon, storage_rounding, tolerance
from grutrace.records import GATES, WEIGHTS, Array

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: The floating-point type that has this spacing at 1.
_BY_PRECISION = {machine_epsilon(dtype): dtype for dtype in _TYPES}

#: Machine epsilon of float64, in which checks are computed.
FLOAT64_EPS = machine_epsilon(torch.float64)


@contextmanager
def isolated_context() -> Iterator[None]:
    """Run without function modes, autograd and autocast, which may be active around the reader."""
    with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast("cpu", enabled=False):
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

        They are what `tolerances` asks for.
        """
        input, hidden = (_finite_sizes(product) for product in self._products)
        recurrent = hidden.chunk(3, -1)[2]
        return _largest(torch.cat([input, hidden], -1)), _largest(recurrent)

    @cached_property
    @isolated_context()
    def abs_sum_bounds(self) -> Array:
        """(n,) at least the sum of the sizes of the terms of each step's products.

        It is what `tolerances` asks for where rows are kept in a smaller type.
        """
        array: Array = abs_sum_bounds(*self._factors).double().numpy()
        return array

    @cached_property
    def _gates(self) -> cell.Gates:
        return cell.activate(self._preactivations)


def tolerances(
    precisions: Array,
    terms: int,
    states: Array,
    products: Array,
    recurrents: Array,
    kept: np.dtype[Any],
    abs_sum_bounds: Array,
) -> Array:
    """Return (calls,) the tolerance of each call; see `grutrace.gru.tolerance.tolerance`.

    Args:
        precisions: (calls,) spacing at 1 of the type in which the kernel computed.
        terms: I + H
        states: (calls,) largest ``|h|`` from which a step started.
        products: (calls,) largest element of the products.
        recurrents: (calls,) the same of the one that the reset gate is applied to.
        kept: The type in which the rows are kept.
        abs_sum_bounds: (calls,) largest sum of the sizes of the terms of the products.
    """
    stored: torch.dtype = getattr(torch, kept.name)
    columns = (
        array.tolist() for array in (precisions, states, products, recurrents, abs_sum_bounds)
    )
    allowed = np.zeros(len(precisions))
    for call, (precision, state, product, recurrent, sum_) in enumerate(zip(*columns, strict=True)):
        if precision not in _BY_PRECISION:
            continue
        size = max(1.0, state)
        allowed[call] = tolerance(_BY_PRECISION[precision], terms, size, product, recurrent)
        if machine_epsilon(stored) > precision:
            allowed[call] += storage_rounding(stored, size, sum_, recurrent)
    return allowed


def _of_units(weight: Array, units: slice) -> Array:
    """The rows of a stacked weight that belong to these units, (3U, ...) of (3H, ...)."""
    if units == slice(None):
        return weight
    by_gate = weight.reshape(3, -1, *weight.shape[1:])[:, units]
    return by_gate.reshape(-1, *weight.shape[1:])


def _tensor(array: Array) -> Tensor:
    # torch takes no array that cannot be written to, though nothing here does.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _array(tensor: Tensor) -> Array:
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _finite_sizes(product: Tensor) -> Tensor:
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
        recurrent: (N,) the same of what the reset gate is applied to.
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
        hidden: (N, H) the state after it, as the kernel returned it.
        weights: By name in `WEIGHTS`, of one version: what all these rows used.
        precision: Spacing at 1 of the type in which the kernel computed, which is computed in.
        dtype: NumPy type of the gates.
    """
    x, before, after = (torch.from_numpy(each) for each in (input, previous, hidden))
    computed = dtype_from_eps(precision, before.dtype)
    own = [torch.from_numpy(weights[name]).to(computed) for name in WEIGHTS if name in weights]
    count, size = hidden.shape
    gates = {name: np.empty((count, size), dtype) for name in GATES}
    rooms = {name: torch.from_numpy(rows) for name, rows in gates.items()}
    found = torch.empty((3, count), dtype=torch.promote_types(after.dtype, torch.float32))
    rows = max(SMALLEST_BLOCK, BLOCK // (6 * size))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        states = before[part].to(computed)
        products = cell.products(x[part].to(computed), states, *own)
        found[1, part], found[2, part] = _product_maxima(products)
        made = cell.gates_in_place(products)
        for name, room in rooms.items():
            copy_cast(room[part], getattr(made, name))
        found[0, part] = _residual_per_row(cell.step(made, states), after[part])
    bounds = np.zeros(count)
    if float(np.finfo(dtype).eps) > precision:
        bounds = abs_sum_bounds(x, before, *own[:2]).double().numpy()
    residual, product, recurrent = found.numpy()
    return RecomputedGates(gates, residual, product, recurrent, bounds)


def states_match(
    input: Array,
    previous: Array,
    hidden: Array,
    weights: Mapping[str, Array],
    precision: float,
) -> Array:
    """Return (N,) whether the weights lead to the recorded state of each row, up to rounding.

    Args:
        input: (N, I)
        previous: (N, H) the state before each step.
        hidden: (N, H) the state after it.
        weights: By name in `WEIGHTS`.
        precision: Spacing at 1 of the type in which the kernel computed.
    """
    x, before, after = (_as_writable(each) for each in (input, previous, hidden))
    own = {name: _as_writable(each) for name, each in weights.items()}
    found = recompute(x, before, after, own, precision, hidden.dtype)
    states = np.nan_to_num(np.abs(previous), nan=0.0, posinf=0.0).max(1, initial=0.0)
    count, terms = len(hidden), input.shape[1] + hidden.shape[1]
    allowed = tolerances(
        np.full(count, precision),
        terms,
        states,
        found.product,
        found.recurrent,
        hidden.dtype,
        found.abs_sum_bounds,
    )
    return np.asarray(found.residual <= allowed)


@isolated_context()
def row_residuals(update: Array, candidate: Array, previous: Array, hidden: Array) -> Array:
    """Return (N,) the residual of each row; see `RecomputedGates.residual`.

    Args:
        update: (N, U)
        candidate: (N, U)
        previous: (N, U) the state before each step.
        hidden: (N, U) the state after it, as the kernel returned it.
    """
    z, n, before, after = map(torch.from_numpy, (update, candidate, previous, hidden))
    count, size = hidden.shape
    residual = torch.empty(count, dtype=torch.promote_types(after.dtype, torch.float32))
    rows = max(SMALLEST_BLOCK, BLOCK // (6 * max(1, size)))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        made = cell.step(cell.Gates(z[part], z[part], n[part]), before[part])
        residual[part] = _residual_per_row(made, after[part])
    array: Array = residual.numpy()
    return array


def _product_maxima(products: cell.Products) -> tuple[Tensor, Tensor]:
    """(n,) largest element of each row's products, and (n,) of the candidate's recurrent one."""
    size = products.hidden.shape[-1] // 3
    openings, candidate = products.hidden[:, : 2 * size], products.hidden[:, 2 * size :]
    maxima = [_max_abs_per_row(each) for each in (products.input, openings, candidate)]
    return torch.stack(maxima).amax(0), maxima[2]


def _max_abs_per_row(values: Tensor) -> Tensor:
    least, most = torch.aminmax(values, dim=-1)
    return torch.maximum(-least, most).float().nan_to_num_(nan=0.0, posinf=0.0)


def _residual_per_row(expected: Tensor, hidden: Tensor) -> Tensor:
    differences = (expected - hidden).abs_()
    residual = differences.amax(-1)
    if bool(residual.isfinite().all()):
        return residual
    same = (expected == hidden) | (expected.isnan() & hidden.isnan())
    return differences.masked_fill_(same, 0.0).nan_to_num_(nan=torch.inf).amax(-1)


def _as_writable(array: Array) -> Array:
    # torch takes no array that cannot be written to, though nothing here does.
    return np.require(array, requirements=["C", "W"])
