"""Gates and checks of steps from their products, in one compiled pass.

The result of an element depends neither on its position nor on the number of threads. So steps that
are replayed together have the same bits as on their own.

T steps, B sequences in a batch, H hidden size, n rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.gru.cell import Products
from grutrace.gru.layout import copy_cast
from grutrace.native.library import Integers2, ReplayBlock, ReplayTargets, load
from grutrace.records import GATES


class Grouping(IntEnum):
    """The rows that have a check together."""

    ALL = 0
    STEP = 1
    ROW = 2


class RowChecks(NamedTuple):
    """The checks of groups of rows, (groups,) each.

    Attributes:
        residual: Largest difference between the states that the gates lead to and the kernel's;
            NaN if a value is not finite, when the other two are not known.
        product: Largest element, in absolute value, of the products.
        recurrent: Largest element of the hidden product that the reset gate is applied to.
    """

    residual: npt.NDArray[np.float64]
    product: npt.NDArray[np.float64]
    recurrent: npt.NDArray[np.float64]


def replay_products(
    products: Products,
    previous: Tensor,
    states: Tensor,
    gates: Mapping[str, Tensor],
    grouping: Grouping,
) -> RowChecks | None:
    """Compute gates from products, and compare the states that they lead to with the kernel's.

    Args:
        products: (T, B, 3H) or (n, 3H) each.
        previous: (T, B, H) or (n, H), the state before each step.
        states: As `previous`, the state after each step.
        gates: Where to write, as `previous`, by name; some of the three, with the same strides.
            Values are rounded to another type.
        grouping: The rows that have a check together; `Grouping.STEP` those of a step.

    Returns:
        The checks; None if nothing was computed: without a compiled library, or for other types,
        devices or strides than it takes.
    """
    library = load()
    if library is None or not all(map(_is_plain, (*products, previous, states))):
        return None
    if not states.numel() or not all(product.is_contiguous() for product in products):
        return None
    if not all(map(_is_plain, gates.values())):
        values = {name: torch.empty(states.shape, dtype=torch.float32) for name in gates}
        checks = replay_products(products, previous, states, values, grouping)
        if checks is not None:
            for name, target in gates.items():
                copy_cast(target, values[name])
        return checks
    targets = list(gates.values())
    if any(target.stride() != targets[0].stride() for target in targets):
        return None
    steps, batch = (1, len(states)) if states.dim() == 2 else states.shape[:2]
    count = {Grouping.ALL: 1, Grouping.STEP: steps, Grouping.ROW: steps * batch}[grouping]
    found = np.empty((count, 3))
    block = ReplayBlock(
        products.input.data_ptr(),
        products.hidden.data_ptr(),
        previous.data_ptr(),
        states.data_ptr(),
        _strides(previous),
        _strides(states),
        ReplayTargets(*(gates[name].data_ptr() if name in gates else None for name in GATES)),
        _strides(targets[0] if targets else states),
        steps,
        batch,
        states.shape[-1],
        grouping,
        found.ctypes.data,
    )
    library.replay(ctypes.addressof(block))
    return RowChecks(*found.T)


def _is_plain(values: Tensor) -> bool:
    """Whether the library can read or write the values by their address."""
    return (
        values.dtype == torch.float32
        and values.device.type == "cpu"
        and (values.stride(-1) == 1 or values.shape[-1] == 1)
        and not (values.is_neg() or values._is_zerotensor())
    )


def _strides(values: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Return the strides over steps and batch; of (n, H) rows that over the rows."""
    if values.dim() == 2:
        return Integers2(0, values.stride(0))
    return Integers2(values.stride(0), values.stride(1))
