"""Residuals: how far the states that the gates lead to are from the recorded states.

`find_violations` yields the sites of a call whose residual exceeds the rounding tolerance.

N rows, one per step, sequence by sequence; B sequences, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.gru.cell import Gates, step
from grutrace.gru.kernel import CellWeights
from grutrace.gru.layout import has_dtype
from grutrace.gru.tolerance import (
    ReplayError,
    abs_sum_bound,
    machine_epsilon,
    max_abs,
    storage_rounding,
    tolerance,
    zero_where_equal,
)
from grutrace.native.library import load
from grutrace.records import Array, CallRecord, ModuleInfo, Site

#: Elements that are compared at once, so that they stay in the processor's cache.
BLOCK = 64 * 1024


class ResidualCheck(NamedTuple):
    """The check of a call at one site, as in `grutrace.records.SiteRows`.

    Attributes:
        residual: Largest ``|h from the gates - kernel's h|``.
        tolerance: The largest residual that rounding can explain.
        precision: Machine epsilon of the least precise data type that the kernel used.
    """

    residual: float
    tolerance: float
    precision: float


def check_residual(
    error: ReplayError,
    dtype: torch.dtype,
    input: Tensor,
    hidden: Tensor,
    initial: Tensor,
    weights: CellWeights,
    stored: torch.dtype | None,
) -> ResidualCheck:
    """Return the residual with its tolerance.

    Args:
        error: The residual, and the magnitudes that its tolerance depends on.
        dtype: The least precise data type that the kernel used.
        input: (T, B, I) or (N, I), the input of the layer.
        hidden: (T, B, H) or (N, H), the kernel's output for one direction.
        initial: (B, H), in the kernel's batch order.
        weights: The rows of the weights that were used.
        stored: The data type of stored rows, if it differs.
    """
    state = max(1.0, max_abs(initial))
    terms = input.shape[-1] + hidden.shape[-1]
    allowed = tolerance(dtype, terms, state, error.product, error.recurrent)
    if stored is not None and machine_epsilon(stored) > machine_epsilon(dtype):
        # The previous states of all steps are among the states and initial states.
        sums = abs_sum_bound([input], weights.weight_ih)
        sums += abs_sum_bound([hidden, initial], weights.weight_hh)
        allowed += storage_rounding(stored, state, sums, error.recurrent)
    return ResidualCheck(error.residual, allowed, machine_epsilon(dtype))


def copy_states(
    update: Array,
    candidate: Array,
    hidden: Tensor,
    initial: Tensor,
    rows: Array,
    *,
    reverse: bool,
) -> float | None:
    """Copy the states of a padded call to rows, and compare them with its gates, in one pass.

    Args:
        update: (B * T, H), sequence by sequence.
        candidate: (B * T, H)
        hidden: (T, B, H) the kernel's output.
        initial: (B, H) the initial state of each sequence.
        rows: (B * T, H), to which the states are copied.
        reverse: Whether the layer reads from the last step to the first.

    Returns:
        The residual, as from `max_residual`; None if nothing was copied, because there is no
        compiled library for it, or if a state is not finite, when the states were copied.
    """
    library = load()
    compare = None if library is None else library.states.get(rows.dtype.name)
    is_alike = has_dtype(hidden, rows.dtype) and initial.dtype == hidden.dtype
    if compare is None or not is_alike or hidden.stride(-1) != 1:
        return None
    arrays = update, candidate, rows
    if not all(each.flags.c_contiguous and each.dtype == rows.dtype for each in arrays):
        return None
    initial = initial.contiguous()
    steps, batch, units = hidden.shape
    residual = compare(
        update.ctypes.data,
        candidate.ctypes.data,
        hidden.data_ptr(),
        hidden.stride(0),
        hidden.stride(1),
        initial.data_ptr(),
        rows.ctypes.data,
        steps,
        batch,
        units,
        reverse,
    )
    return None if math.isnan(residual) else residual


def max_residual(
    update: Array,
    candidate: Array,
    hidden: Array,
    initial: Tensor,
    lengths: npt.NDArray[np.int64],
    *,
    reverse: bool,
) -> float:
    """Return the largest ``|h from the gates - recorded h|`` of a call.

    Equal infinities, and NaN in both states, count as no difference; NaN in one state counts as
    infinite.

    Args:
        update: (N, H)
        candidate: (N, H)
        hidden: (N, H)
        initial: (B, H) the initial state of each sequence.
        lengths: (B,) number of steps of each sequence, N together.
        reverse: Whether the layer reads from the last step to the first. Rows are in time order.
    """
    z, n, h = (torch.from_numpy(rows) for rows in (update, candidate, hidden))
    if not h.numel():
        return 0.0
    if len(h) == len(initial):
        return _difference(z, n, h, initial.to(h))
    stops = np.cumsum(lengths)
    is_empty = lengths == 0
    # The row of each sequence that is computed first, from its initial state.
    first_rows = torch.from_numpy((stops - 1 if reverse else stops - lengths)[~is_empty])
    previous = initial[torch.from_numpy(~is_empty)].to(h)
    residual = _difference(z[first_rows], n[first_rows], h[first_rows], previous)
    # All other rows: the previous state of a row is in the adjacent row. First rows are skipped,
    # because their adjacent row belongs to another sequence.
    offset, shift = (0, 1) if reverse else (1, -1)
    size = max(1, BLOCK // h.shape[1])
    for start in range(offset, offset + len(h) - 1, size):
        block = slice(start, min(start + size, offset + len(h) - 1))
        bounds = torch.searchsorted(first_rows, torch.tensor([block.start, block.stop]))
        skipped = first_rows[bounds[0] : bounds[1]] - block.start
        previous = h[block.start + shift : block.stop + shift]
        residual = max(residual, _difference(z[block], n[block], h[block], previous, skipped))
    return residual


def _difference(
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    previous: Tensor,
    skipped: Tensor | None = None,
) -> float:
    """Return the largest difference of the states that the gates lead to.

    Args:
        update: (n, H)
        candidate: (n, H)
        hidden: (n, H)
        previous: (n, H)
        skipped: Indices of rows that are not compared.
    """
    expected = step(Gates(update, update, candidate), previous)
    if skipped is not None and len(skipped):
        expected[skipped] = hidden[skipped]
    # The kernel's own gates give exactly its own states.
    if torch.equal(expected, hidden):
        return 0.0
    differences = (expected - hidden).abs_()
    if math.isfinite(differences.sum().item()):
        return differences.max().item()
    return zero_where_equal(differences, expected, hidden).max().item()


class ResidualViolation(NamedTuple):
    """A site of a call whose residual exceeds the tolerance.

    Attributes:
        site: The site.
        residual: Largest ``|h from the gates - kernel's h|``.
        tolerance: The largest residual that rounding can explain.
        call: Index of the call in the trace; None if it is not known yet.
    """

    site: Site
    residual: float
    tolerance: float
    call: int | None = None

    @property
    def message(self) -> str:
        """One line for a warning or an error."""
        call = "a call" if self.call is None else f"call {self.call}"
        return (
            f"{self.site.name}: the gates of {call} are unproven: the replayed states differ from "
            f"the kernel's by up to {self.residual:.2g}, where rounding explains "
            f"{self.tolerance:.2g}. The model used other weights than the trace knows (did they "
            "change while it ran?). weights='exact' compares them at each call"
        )


def find_violations(
    module: ModuleInfo, record: CallRecord, call: int | None = None
) -> Iterator[ResidualViolation]:
    """Yield the sites of a call whose residual exceeds the tolerance.

    Args:
        module: The module of the call.
        record: The call.
        call: Index of the call in the trace, if it is known.
    """
    for site in module.sites:
        rows = record.sites[site.suffix]
        if rows.residual > rows.tolerance:
            yield ResidualViolation(site, rows.residual, rows.tolerance, call)
