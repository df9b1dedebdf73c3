"""Steps that were recorded long ago, computed anew: arrays in, arrays out.

A gate is a function of the weights, the input and the state before the step. All three being kept,
it can be had at any time, for any steps on their own, to the rounding of one step: no step waits
for another, and no recurrence is run. docs/equations.md says why that matters.

n steps, I input size, H hidden size, U units that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grutrace.gru import cell
from grutrace.gru.rounding import largest_sums, rounded, spacing, tolerance
from grutrace.record import WEIGHTS, Array

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: The floating-point type that has this spacing at 1.
_BY_PRECISION = {spacing(dtype): dtype for dtype in _TYPES}

#: The spacing at 1 of the type for everything that judges.
DOUBLE = spacing(torch.float64)


@contextmanager
def apart() -> Iterator[None]:
    """Compute apart from what is in force around the reader, who may be within a model's run."""
    with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def type_of(precision: float, otherwise: torch.dtype) -> torch.dtype:
    """Return the floating-point type that has this spacing at 1, or another if there is none."""
    return _BY_PRECISION.get(precision, otherwise)


class Derivation:
    """Some steps, and what follows from what they read and started from.

    Args:
        input: (n, I)
        previous: (n, H) the state before each step.
        weights: By name in `WEIGHTS`, of one version: what all these steps used.
        precision: Spacing at 1 of the type to compute in; that of the arrays if it is no type's.
            In the type in which the kernel computed, its gates come out, to rounding.
        units: Which of the H units to compute.
    """

    @apart()
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
        dtype = type_of(precision, self._previous.dtype)
        arrays = [_of_units(weights[name], units) for name in WEIGHTS if name in weights]
        tensors = [_tensor(array).to(dtype) for array in (input, previous, *arrays)]
        self._factors = tensors[:4]
        self._products = cell.products(*tensors)
        self._preactivations = cell.preactivations(self._products)

    @apart()
    def preactivation(self, name: str) -> Array:
        """(n, U) what the sigmoid or tanh of this gate is applied to."""
        return _array(getattr(self._preactivations, name))

    @apart()
    def gate(self, name: str) -> Array:
        """(n, U)"""
        return _array(getattr(self._gates, name))

    @cached_property
    @apart()
    def hidden(self) -> Array:
        """(n, U) the state after each step."""
        return _array(cell.step(self._gates, self._previous[:, self._units]))

    @cached_property
    @apart()
    def sizes(self) -> tuple[Array, Array]:
        """(n,) largest finite element of each step's products, and (n,) of the recurrent one.

        They are what `tolerances` asks for.
        """
        input, hidden = (_sizes(product) for product in self._products)
        recurrent = hidden.chunk(3, -1)[2]
        return _largest(torch.cat([input, hidden], -1)), _largest(recurrent)

    @cached_property
    @apart()
    def sums(self) -> Array:
        """(n,) at least the sum of the sizes of the terms of each step's products.

        It is what `tolerances` asks for where rows are kept in a smaller type.
        """
        array: Array = largest_sums(*self._factors).double().numpy()
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
    sums: Array,
) -> Array:
    """(calls,) the difference that rounding explains in each call; see `rounding.tolerance`.

    Args:
        precisions: (calls,) spacing at 1 of the type in which the kernel computed.
        terms: I + H
        states: (calls,) largest ``|h|`` from which a step started.
        products: (calls,) largest element of the products.
        recurrents: (calls,) the same of the one that the reset gate is applied to.
        kept: The type in which the rows are kept.
        sums: (calls,) largest sum of the sizes of the terms of the products.
    """
    stored: torch.dtype = getattr(torch, kept.name)
    columns = (array.tolist() for array in (precisions, states, products, recurrents, sums))
    allowed = np.zeros(len(precisions))
    for call, (precision, state, product, recurrent, sum_) in enumerate(zip(*columns, strict=True)):
        if precision not in _BY_PRECISION:
            continue
        size = max(1.0, state)
        allowed[call] = tolerance(_BY_PRECISION[precision], terms, size, product, recurrent)
        if spacing(stored) > precision:
            allowed[call] += rounded(stored, size, sum_, recurrent)
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


def _sizes(product: Tensor) -> Tensor:
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.to(wide).abs().nan_to_num_(nan=0.0, posinf=0.0)


def _largest(sizes: Tensor) -> Array:
    array: Array = sizes.amax(-1).double().numpy()
    return array
