"""The gates of many recorded calls at once, from copies of what they follow from.

A stepwise decoder's calls are small: one by one, what surrounds their arithmetic costs many times
the arithmetic. Every row standing on its own, the rows of any number of calls that used the same
weights can be computed together.

N rows of all calls, I input size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grutrace.gru import cell
from grutrace.gru.derive import apart, tolerances, type_of
from grutrace.gru.rounding import largest_sums
from grutrace.gru.shadow import BLOCK, SMALLEST_BLOCK
from grutrace.gru.steps import copy_rounded
from grutrace.record import GATES, WEIGHTS, Array


class Recomputed(NamedTuple):
    """What follows from the copies.

    Attributes:
        gates: By name, (N, H).
        off: (N,) largest ``|h from the gates - recorded h|`` of each row; infinite where just one
            of the two is no number.
        product: (N,) largest element, in absolute value, of each row's products; 0 if not finite.
        recurrent: (N,) the same of what the reset gate is applied to.
        sums: (N,) a bound on the sums of the sizes of the terms of both products; only where the
            rows are kept in a smaller type than the kernel computed in, else 0.
    """

    gates: Mapping[str, Array]
    off: Array
    product: Array
    recurrent: Array
    sums: Array


@apart()
def recompute(
    input: Array,
    previous: Array,
    hidden: Array,
    weights: Mapping[str, Array],
    precision: float,
    dtype: np.dtype[Any],
) -> Recomputed:
    """Compute the gates of rows, and how far the states that they lead to are from the recorded.

    Args:
        input: (N, I)
        previous: (N, H) the state before each step.
        hidden: (N, H) the state after it, as the kernel returned it.
        weights: By name in `WEIGHTS`, of one version: what all these rows used.
        precision: Spacing at 1 of the type in which the kernel computed, which is computed in.
        dtype: NumPy type of the gates.
    """
    x, before, after = (torch.from_numpy(each) for each in (input, previous, hidden))
    computed = type_of(precision, before.dtype)
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
        found[1, part], found[2, part] = _sizes(products)
        made = cell.gates_in_place(products)
        for name, room in rooms.items():
            copy_rounded(room[part], getattr(made, name))
        found[0, part] = _off(cell.step(made, states), after[part])
    sums = np.zeros(count)
    if float(np.finfo(dtype).eps) > precision:
        sums = largest_sums(x, before, *own[:2]).double().numpy()
    off, product, recurrent = found.numpy()
    return Recomputed(gates, off, product, recurrent, sums)


def fit(
    input: Array,
    previous: Array,
    hidden: Array,
    weights: Mapping[str, Array],
    precision: float,
) -> Array:
    """(N,) whether weights lead to the states of rows, as far as rounding explains.

    Args:
        input: (N, I)
        previous: (N, H) the state before each step.
        hidden: (N, H) the state after it.
        weights: By name in `WEIGHTS`.
        precision: Spacing at 1 of the type in which the kernel computed.
    """
    x, before, after = (_writable(each) for each in (input, previous, hidden))
    own = {name: _writable(each) for name, each in weights.items()}
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
        found.sums,
    )
    return np.asarray(found.off <= allowed)


@apart()
def prove(update: Array, candidate: Array, previous: Array, hidden: Array) -> Array:
    """(N,) how far the states that gates lead to are from the recorded; see `Recomputed.off`.

    Args:
        update: (N, U)
        candidate: (N, U)
        previous: (N, U) the state before each step.
        hidden: (N, U) the state after it, as the kernel returned it.
    """
    z, n, before, after = map(torch.from_numpy, (update, candidate, previous, hidden))
    count, size = hidden.shape
    off = torch.empty(count, dtype=torch.promote_types(after.dtype, torch.float32))
    rows = max(SMALLEST_BLOCK, BLOCK // (6 * max(1, size)))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        made = cell.step(cell.Gates(z[part], z[part], n[part]), before[part])
        off[part] = _off(made, after[part])
    array: Array = off.numpy()
    return array


def _sizes(products: cell.Products) -> tuple[Tensor, Tensor]:
    """(n,) largest element of each row's products, and (n,) of the candidate's recurrent one."""
    size = products.hidden.shape[-1] // 3
    openings, candidate = products.hidden[:, : 2 * size], products.hidden[:, 2 * size :]
    largest = [_largest(each) for each in (products.input, openings, candidate)]
    return torch.stack(largest).amax(0), largest[2]


def _largest(values: Tensor) -> Tensor:
    least, most = torch.aminmax(values, dim=-1)
    return torch.maximum(-least, most).float().nan_to_num_(nan=0.0, posinf=0.0)


def _off(expected: Tensor, hidden: Tensor) -> Tensor:
    differences = (expected - hidden).abs_()
    off = differences.amax(-1)
    if bool(off.isfinite().all()):
        return off
    same = (expected == hidden) | (expected.isnan() & hidden.isnan())
    return differences.masked_fill_(same, 0.0).nan_to_num_(nan=torch.inf).amax(-1)


def _writable(array: Array) -> Array:
    # torch takes no array that cannot be written to, though nothing here does.
    return np.require(array, requirements=["C", "W"])
