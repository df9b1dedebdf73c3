"""The Jacobian of a step, dh(t) / dh(t - 1), in closed form from recorded gates and weights.

With h' the state before the step and g = W_hn h' + b_hn, the equations of `gru/cell.py` give

    J = diag(z) + diag((h' - n) z (1 - z)) W_hz
        + diag((1 - z) (1 - n^2) r) W_hn
        + diag((1 - z) (1 - n^2) g r (1 - r)) W_hr

for a fixed input. (Can, Krishnamurthy and Schwab 2020, "Gating creates slow modes and controls
phase-space complexity in GRUs and LSTMs", give it for a GRU whose reset gate is applied before the
recurrent product.)

H units, n steps. All in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np

from grutrace.analysis.engine.map_reduce import run_tasks
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.analysis.engine.steps import locate_step, read_steps, row_numbers, state_before
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import GATES, Array
from grutrace.storage.read.sequence_index import Integers

#: Default number of steps.
STEPS = 64

#: Quantities that a Jacobian needs, besides the weights.
REQUIRED = (*GATES, "hidden")


class Factors(NamedTuple):
    """Factors of the rows of the recurrent weights in the Jacobian: (n, H) each.

    Attributes:
        keep: Of the identity.
        reset: Of W_hr.
        update: Of W_hz.
        candidate: Of W_hn.
    """

    keep: Array
    reset: Array
    update: Array
    candidate: Array


def factors(gates: Mapping[str, Array], previous: Array, weights: Mapping[str, Array]) -> Factors:
    """Compute the factors of some steps.

    Args:
        gates: Reset, update and candidate by name, (n, H) each.
        previous: (n, H) the state before each step.
        weights: By PyTorch's names without suffix. weight_hh (3H, H) is used, and bias_hh (3H,)
            where there is one.
    """
    r, z, n = (np.asarray(gates[name], np.float64) for name in GATES)
    before = np.asarray(previous, np.float64)
    size = before.shape[-1]
    product = before @ np.asarray(weights["weight_hh"][2 * size :], np.float64).T
    if "bias_hh" in weights:
        product = product + np.asarray(weights["bias_hh"][2 * size :], np.float64)
    slope = (1 - z) * (1 - n) * (1 + n)
    return Factors(z, slope * product * r * (1 - r), (before - n) * z * (1 - z), slope * r)


def jacobians(data: Factors, weights: Mapping[str, Array]) -> Array:
    """Compute the Jacobians of some steps: (n, H, H). Row i has the derivatives of unit i."""
    size = data.keep.shape[-1]
    by_gate = np.asarray(weights["weight_hh"], np.float64).reshape(3, size, size)
    matrices = np.einsum("nh,hk->nhk", data.reset, by_gate[0])
    matrices += data.update[:, :, np.newaxis] * by_gate[1]
    matrices += data.candidate[:, :, np.newaxis] * by_gate[2]
    matrices[:, np.arange(size), np.arange(size)] += data.keep
    return np.asarray(matrices)


def jacobian(site: SiteLike, sequence: int, step: int) -> Array:
    """Compute the Jacobian of one step.

    Args:
        site: A site with reset, update, candidate, hidden and weights, of all units.
        sequence: Number of the sequence.
        step: Step of the sequence, in time order; negative numbers count from the last.

    Returns:
        (H, H) float64; row i, column j is the derivative of h_i(t) by h_j before the step.

    Raises:
        NotRecordedError: A required quantity was not recorded, or there is no such step.

    Examples:
        It is the derivative that PyTorch computes.

        >>> import torch, grutrace
        >>> from grutrace.analysis import jacobian
        >>> cell = torch.nn.GRUCell(2, 3, dtype=torch.float64)
        >>> inputs, state = torch.randn(1, 2).double(), torch.randn(1, 3).double()
        >>> with grutrace.trace(cell) as trace:
        ...     _ = cell(inputs, state)
        >>> expected = torch.func.jacrev(lambda h: cell(inputs, h[None])[0])(state[0])
        >>> found = torch.from_numpy(jacobian(trace["cell"], sequence=0, step=0))
        >>> torch.allclose(found, expected)
        True
    """
    data = as_site_data(site)
    require_all_units(data)
    return _at(data, *locate_step(data, sequence, step))


@dataclass(frozen=True, eq=False)
class StepJacobians(Result):
    """Properties of the Jacobians of n steps, evenly spread over a site.

    Attributes:
        units: H, which is also the number of eigenvalues.
        steps: (n,) step of its sequence, in time order.
        sequences: (n,) number of its sequence.
        radius: (n,) spectral radius. Below 1, repeating the step would forget the initial state.
            `lyapunov` answers that for a run of different steps.
        norm: (n,) largest singular value: largest growth of a small difference between two states.
        shrinking: (n,) log |det J| / H, mean logarithmic growth over all directions, in nats.
    """

    index_field: ClassVar[str] = "steps"
    index_columns: ClassVar[tuple[str, ...]] = ("sequences",)

    units: int
    steps: Integers
    sequences: Integers
    radius: Array
    norm: Array
    shrinking: Array


def step_jacobians(site: SiteLike, most: int = STEPS) -> StepJacobians:
    """Compute spectral radius, norm and determinant of the Jacobians of some steps.

    The eigenvalues of one Jacobian take about 1 ms for 64 units and 0.3 s for 512.

    Args:
        site: A site with reset, update, candidate, hidden and weights, of all units. Results are
            NaN where a value is not finite.
        most: Largest number of steps.

    Returns:
        The properties of the Jacobian of each step.

    Raises:
        NotRecordedError: A required quantity was not recorded.
        OptionError: `most` is not an integer of 1 or more.

    Examples:
        >>> import torch, grutrace
        >>> from grutrace.analysis import step_jacobians
        >>> layer = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(layer) as trace:
        ...     _ = layer(torch.randn(10, 4, 2))
        >>> result = step_jacobians(trace["l0"], most=5)
        >>> bool((result.radius <= result.norm).all())
        True
    """
    if not isinstance(most, int) or most < 1:
        raise OptionError(f"most: expected a number of steps, 1 or more; found {short_repr(most)}")
    data = as_site_data(site)
    require_all_units(data)
    count = min(most, data.steps)
    numbers = (np.arange(count) * data.steps + data.steps // 2) // max(1, count)
    ends = np.cumsum(data.lengths)
    sequences = np.searchsorted(ends, numbers, "right")
    steps = numbers - (ends - data.lengths)[sequences]
    tasks = [
        partial(_spectrum, data, *locate_step(data, *position))
        for position in zip(sequences.tolist(), steps.tolist(), strict=True)
    ]
    radius, norm, shrinking = np.array(list(run_tasks(data, tasks))).reshape(count, 3).T
    return StepJacobians(
        site=data.name,
        units=len(data.units),
        steps=steps,
        sequences=sequences,
        radius=radius,
        norm=norm,
        shrinking=shrinking,
    )


def require_all_units(site: SiteData) -> None:
    """Check that the Jacobian of a site can be computed.

    Raises:
        NotRecordedError: A gate, the states, the weights or some units are missing.
    """
    site.require(*REQUIRED)
    if site.steps:
        size = site.weights(0)["weight_hh"].shape[1]
        if not np.array_equal(site.units, np.arange(size)):
            raise NotRecordedError(
                f"{site.name!r} has {len(site.units)} of {size} units, and this analysis needs all"
            )


def _at(site: SiteData, sequence: int, step: int) -> Array:
    """Compute the Jacobian of a step, numbered in the order of computation."""
    gates = {name: read_steps(site, name, sequence, step, step + 1) for name in GATES}
    previous = state_before(site, sequence, step)[np.newaxis]
    version = site.versions(row_numbers(site, sequence, step, step + 1))[0]
    weights = site.weights(int(version))
    return np.asarray(jacobians(factors(gates, previous, weights), weights)[0])


def _spectrum(site: SiteData, sequence: int, step: int) -> tuple[float, float, float]:
    matrix = _at(site, sequence, step)
    if not np.isfinite(matrix).all():
        return np.nan, np.nan, np.nan
    radius = float(np.abs(np.linalg.eigvals(matrix)).max())
    sizes = np.linalg.svd(matrix, compute_uv=False)
    with np.errstate(divide="ignore"):
        return radius, float(sizes[0]), float(np.log(sizes).mean())
