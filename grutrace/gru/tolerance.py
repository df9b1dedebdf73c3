"""Tolerance for the difference between two computations of a step in floating point.

Two correct computations of the same step sum the same products in different orders. For K terms
the difference of two such sums is, with random rounding, of the order of sqrt(K) units in the
last place of the largest partial sum (Higham & Mary 2019, "A new approach to probabilistic
rounding error analysis"). The sigmoid of the reset gate passes on at most 1/4 of this difference.
The candidate gets it multiplied by the hidden product that the gate is applied to. Of all gates the
candidate differs most, and the state is a mean of the candidate and the previous state. So one
tolerance holds for gates and states. docs/equations.md has the measurements.

T steps, B sequences in a batch, I input size, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from grutrace.gru.cell import Products

#: Units in the last place for a state of size 1: the few operations from the gates to the state.
_STATE_ULPS = 2.0

#: Units in the last place for a sum of K terms of size 1: one, plus this number times sqrt(K). In a
#: search over sizes and scales, the largest difference was 0.36 of the tolerance.
_SUM_ULPS = 0.5


class ReplayError(NamedTuple):
    """The residual of a replay, and the magnitudes that its tolerance depends on.

    Attributes:
        residual: Largest ``|replayed h - kernel's h|``. Equal infinities, and NaN in
            both, count as no difference; NaN in one counts as infinite.
        product: Largest finite element, in absolute value, of the matrix products.
        recurrent: Largest finite element, in absolute value, of the hidden product that the reset
            gate is applied to.
    """

    residual: float
    product: float
    recurrent: float


def tolerance(
    dtype: torch.dtype, terms: int, state: float, product: float, recurrent: float
) -> float:
    """Return the largest difference between two computations of a gate that rounding can explain.

    Args:
        dtype: The less precise type of the two computations. Sums of half types are in float32.
        terms: Number of terms of the sums: I + H.
        state: Largest ``|h|`` that can occur: 1, or the largest initial state if that is larger.
        product: Largest element, in absolute value, of the two matrix products.
        recurrent: Largest element of the hidden product that the reset gate is applied to.
    """
    eps = torch.finfo(dtype).eps
    sum_eps = min(eps, torch.finfo(torch.float32).eps)
    sums = (eps + sum_eps * _SUM_ULPS * math.sqrt(terms)) * product
    return eps * _STATE_ULPS * state + sums * (1 + recurrent / 4)


def storage_rounding(stored: torch.dtype, state: float, sums: float, recurrent: float) -> float:
    """Return a bound on the change of a gate or state if all its inputs are rounded for storage.

    It is added to `tolerance` if rows are stored in a less precise type than the kernel used. To
    first order it bounds every rounding: eps / 2 for each factor of each term of a sum, multiplied
    by a slope of at most 1/4 for the gates, and eps / 2 for the terms of the new state.

    Args:
        stored: The type in which the rows are stored.
        state: As for `tolerance`.
        sums: A bound on the sums of the absolute terms of both products together.
        recurrent: As for `tolerance`.
    """
    eps = torch.finfo(stored).eps
    return eps * sums * (1 + recurrent / 4 + (state + 1) / 4) + eps * (state + 1)


def abs_sum_bounds(input: Tensor, previous: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    """Return a bound on the sums of the absolute terms of both products, for each step, (...).

    The bound is the inequality of Cauchy and Schwarz: the norm of the input or state, times the
    largest norm of a row of the weight. It needs no matrix product. The biases are left out: they
    add little, and are not rounded.

    Args:
        input: (..., I)
        previous: (..., H)
        weight_ih: (R, I)
        weight_hh: (R, H)
    """
    return _row_abs_sums(input, weight_ih) + _row_abs_sums(previous, weight_hh)


def abs_sum_bound(values: Sequence[Tensor], weight: Tensor) -> float:
    """Return the bound of `abs_sum_bounds` for one weight, over all steps of some tensors."""
    return max(max_abs(_row_abs_sums(tensor, weight)) for tensor in values)


def _row_abs_sums(values: Tensor, weight: Tensor) -> Tensor:
    sums = _norms(values) * _norms(weight).amax()
    return sums.nan_to_num_(nan=0.0, posinf=0.0)


def _norms(values: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=wide)
    return norms


def lowest_precision(*dtypes: torch.dtype) -> torch.dtype:
    """Return the least precise of some data types."""
    return max(dtypes, key=machine_epsilon)


@cache
def machine_epsilon(dtype: torch.dtype) -> float:
    """Return the machine epsilon of a type. Cached, because every call needs it."""
    return torch.finfo(dtype).eps


def compute_eps(input: Tensor, hidden: Tensor, weight: Tensor) -> float:
    """Return the machine epsilon of the least precise type that the kernel used in a call.

    Call it in the same autocast context as the kernel: an empty product shows autocast's type.

    Args:
        input: (..., I)
        hidden: (..., H), the states that the kernel returned.
        weight: (3H, I)
    """
    if torch.is_autocast_enabled(weight.device.type):
        product = linear(input.new_empty(0, input.shape[-1]), weight[:0]).dtype
    else:
        product = weight.dtype
    return _max_epsilon(product, hidden.dtype)


@cache
def _max_epsilon(*dtypes: torch.dtype) -> float:
    return machine_epsilon(lowest_precision(*dtypes))


def product_maxima(products: Products) -> tuple[Tensor, ...]:
    """Return the smallest and largest elements of the products, those of the candidate last."""
    size = products.hidden.shape[-1] // 3
    gates, candidate = products.hidden[..., : 2 * size], products.hidden[..., 2 * size :]
    return (*torch.aminmax(products.input), *torch.aminmax(gates), *torch.aminmax(candidate))


def to_floats(values: Sequence[Tensor]) -> list[float]:
    """Return one-element tensors as floats, with a single transfer from a device."""
    if values[0].device.type == "cpu":
        return [value.item() for value in values]
    floats: list[float] = torch.stack(list(values)).tolist()
    return floats


def summarize(extremes: Sequence[Sequence[float]]) -> ReplayError | None:
    """Return the error of a call from those of its blocks; None if a value is not finite.

    Args:
        extremes: For each block, the smallest and largest ``replayed h - kernel's h``, then
            `product_maxima`.
    """
    if not extremes:
        return ReplayError(0.0, 0.0, 0.0)
    if not all(map(math.isfinite, (value for block in extremes for value in block))):
        return None
    maxima = [max(map(abs, column)) for column in zip(*extremes, strict=True)]
    return ReplayError(max(maxima[:2]), max(maxima[2:]), max(maxima[6:]))


def compare(
    replayed: Tensor, hidden: Tensor, products: Products, recurrent: Tensor | None = None
) -> ReplayError:
    """Compare replayed states with the kernel's, both (..., H), or (..., U) of some units.

    Args:
        replayed: The states that the gates lead to.
        hidden: The kernel's states.
        products: All products of the replay.
        recurrent: The hidden products that the reset gate is applied to; by default, the last
            third of the hidden products.
    """
    if not replayed.numel():
        return ReplayError(0.0, 0.0, 0.0)
    difference = (replayed - hidden).abs_()
    recurrent = products.hidden.chunk(3, -1)[2] if recurrent is None else recurrent
    extremes = [value for tensor in (*products, recurrent) for value in torch.aminmax(tensor)]
    maxima = torch.stack([difference.max(), *extremes]).tolist()
    if all(map(math.isfinite, maxima)):
        residual, *bounds = maxima
        return ReplayError(residual, max(map(abs, bounds)), max(map(abs, bounds[4:])))
    residual = zero_where_equal(difference, replayed, hidden).max().item()
    return ReplayError(residual, max(map(max_abs, products)), max_abs(recurrent))


def zero_where_equal(difference: Tensor, replayed: Tensor, hidden: Tensor) -> Tensor:
    """Correct ``|replayed - hidden|`` in place: 0 for equal values, infinity for one NaN."""
    is_same = (replayed == hidden) | (replayed.isnan() & hidden.isnan())
    return difference.masked_fill_(is_same, 0.0).nan_to_num_(nan=math.inf)


def max_abs(values: Tensor) -> float:
    """Return the largest finite ``|value|``; 0 if there is none."""
    if not values.numel():
        return 0.0
    least, most = to_floats(torch.aminmax(values))
    if math.isfinite(least) and math.isfinite(most):
        return max(-least, most)
    return values.abs().nan_to_num_(nan=0.0, posinf=0.0).max().item()
