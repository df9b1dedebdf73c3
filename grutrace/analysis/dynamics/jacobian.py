"""The Jacobian of a step, dh(t) / dh(t - 1), in closed form from recorded gates and weights.

With h' the state before the step and g = W_hn h' + b_hn, the equations of `gru/cell.py` give

    J = diag(z) + diag((h' - n) z (1 - z)) W_hz
        + diag((1 - z) (1 - n^2) r) W_hn
        + diag((1 - z) (1 - n^2) g r (1 - r)) W_hr

with the input held fixed. (Can, Krishnamurthy and Schwab 2020, "Gating creates slow modes and
controls phase-space complexity in GRUs and LSTMs", have it for a GRU whose reset gate sits within
the product.)

H units, n steps. All in float64, whatever the rows are kept in.

The map from a state to the next at a constant input, and its Jacobian, in float64.

The equations are PyTorch's (docs/equations.md). K states, H units, I input size.
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
from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.records import GATES, Array
from grutrace.storage.read.sequence_index import Integers

#: Steps whose Jacobian is looked into unless asked otherwise.
STEPS = 64

#: What a Jacobian follows from, beside the weights.
REQUIRED = (*GATES, "hidden")


class Factors(NamedTuple):
    """What the rows of the recurrent weights are multiplied by: (n, H) each.

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
    """Return the factors of some steps.

    Args:
        gates: By name, reset, update and candidate, (n, H) each.
        previous: (n, H) the state before each step.
        weights: By PyTorch's names without suffix, of which weight_hh (3H, H) and bias_hh (3H,)
            matter; without biases the latter is not there.
    """
    r, z, n = (np.asarray(gates[name], np.float64) for name in GATES)
    before = np.asarray(previous, np.float64)
    size = before.shape[-1]
    product = before @ np.asarray(weights["weight_hh"][2 * size :], np.float64).T
    if "bias_hh" in weights:
        product = product + np.asarray(weights["bias_hh"][2 * size :], np.float64)
    slope = (1 - z) * (1 - n) * (1 + n)
    return Factors(z, slope * product * r * (1 - r), (before - n) * z * (1 - z), slope * r)


def jacobians(of: Factors, weights: Mapping[str, Array]) -> Array:
    """Return the Jacobians of some steps, (n, H, H): row i holds what moves unit i."""
    size = of.keep.shape[-1]
    by_gate = np.asarray(weights["weight_hh"], np.float64).reshape(3, size, size)
    found = np.einsum("nh,hk->nhk", of.reset, by_gate[0])
    found += of.update[:, :, np.newaxis] * by_gate[1]
    found += of.candidate[:, :, np.newaxis] * by_gate[2]
    found[:, np.arange(size), np.arange(size)] += of.keep
    return np.asarray(found)


def jacobian(site: SiteLike, sequence: int, step: int) -> Array:
    """Return the Jacobian of one step, (H, H): row i, column j is dh_i(t) / dh_j before it.

    Args:
        site: With reset, update, candidate, hidden and weights, of all units.
        sequence: Number of the sequence.
        step: Which of its steps, in time order; negative numbers count from the last.

    Raises:
        NotRecordedError: Something needed was not recorded, or there is no such step.
    """
    of = as_site_data(site)
    require_all_units(of)
    count, length = len(of.lengths), 0
    if -count <= sequence < count:
        length = int(of.lengths[sequence])
    if not -length <= step < length:
        raise NotRecordedError(
            f"{of.name!r} has no step {step} of sequence {sequence}; it has {count} sequences"
            + (f", and this one has {length} steps" if length else "")
        )
    return _at(of, sequence % count, step % length)


@dataclass(frozen=True, eq=False)
class StepJacobians(Result):
    """Of some steps of a site, n, evenly spread over all of them.

    Attributes:
        units: H, of which there are as many eigenvalues.
        steps: (n,) which step of its sequence each is, in time order.
        sequences: (n,) which sequence it is of.
        radius: (n,) the largest size of an eigenvalue. Below 1, the step repeated over and over
            would forget where it began; what a run of *different* steps does, `lyapunov` says.
        norm: (n,) the largest singular value: by how much the step lengthens a small difference
            between two states at most.
        shrinking: (n,) the mean over all directions of log of what the step multiplies lengths by
            (log |det J| / H), in nats.
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
    """Look into the Jacobians of steps that are spread evenly over a site.

    Eigenvalues of one Jacobian take about 1 ms for 64 units and 0.3 s for 512.

    Args:
        site: With reset, update, candidate, hidden and weights, of all units. Where a number is not
            finite, neither is what follows from it.
        most: How many steps, at most.

    Raises:
        NotRecordedError: Something needed was not recorded.
        OptionError: There cannot be so many steps.
    """
    if not isinstance(most, int) or most < 1:
        raise OptionError(f"most: expected a number of steps, 1 or more; found {short_repr(most)}")
    of = as_site_data(site)
    require_all_units(of)
    count = min(most, of.steps)
    numbers = (np.arange(count) * of.steps + of.steps // 2) // max(1, count)
    ends = np.cumsum(of.lengths)
    sequences = np.searchsorted(ends, numbers, "right")
    steps = numbers - (ends - of.lengths)[sequences]
    places = zip(sequences.tolist(), steps.tolist(), strict=True)
    found = np.array(
        list(run_tasks(of, [partial(_spectrum, of, *place) for place in places]))
    ).reshape(count, 3)
    return StepJacobians(
        site=of.name,
        units=len(of.units),
        steps=steps,
        sequences=sequences,
        radius=found[:, 0],
        norm=found[:, 1],
        shrinking=found[:, 2],
    )


def require_all_units(site: SiteData) -> None:
    """Refuse what has no Jacobian.

    Raises:
        NotRecordedError: A gate, the states, the weights or some units are not there.
    """
    site.require(*REQUIRED)
    if site.steps:
        size = site.weights(0)["weight_hh"].shape[1]
        if not np.array_equal(site.units, np.arange(size)):
            raise NotRecordedError(
                f"{site.name!r} has {len(site.units)} of {size} units, and this analysis needs all"
            )


def _at(site: SiteData, sequence: int, step: int) -> Array:
    rows = site.rows_between(sequence, sequence + 1)

    def row(quantity: str, at: int) -> Array:
        number = rows.start + at if isinstance(rows, slice) else int(rows[at])
        return np.asarray(site.rows(quantity)[number : number + 1])

    before = step + 1 if site.reverse else step - 1
    inside = 0 <= before < site.lengths[sequence]
    previous = row("hidden", before) if inside else site.initial(sequence, sequence + 1)
    restarts = site.restarts(sequence, sequence + 1)
    if step in restarts.steps:
        # The last of them, if segments between have no steps.
        previous = restarts.states[restarts.steps == step][-1:]
    part = (
        slice(rows.start + step, rows.start + step + 1)
        if isinstance(rows, slice)
        else rows[step : step + 1]
    )
    weights = site.weights(int(site.versions(part)[0]))
    of = factors({gate: row(gate, step) for gate in GATES}, previous, weights)
    return np.asarray(jacobians(of, weights)[0])


def _spectrum(site: SiteData, sequence: int, step: int) -> tuple[float, float, float]:
    found = _at(site, sequence, step)
    if not np.isfinite(found).all():
        return np.nan, np.nan, np.nan
    radius = float(np.abs(np.linalg.eigvals(found)).max())
    sizes = np.linalg.svd(found, compute_uv=False)
    with np.errstate(divide="ignore"):
        return radius, float(sizes[0]), float(np.log(sizes).mean())


class GRUMap:
    """F: (K, H) states to (K, H).

    Args:
        weights: By PyTorch's names without suffix.
        input: (I,) the constant input.
    """

    def __init__(self, weights: Mapping[str, Array], input: Array) -> None:
        self._weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
        self._from_input = self._weights["weight_ih"] @ input + self._weights.get("bias_ih", 0.0)

    def __call__(self, states: Array) -> Array:
        """The states after one step."""
        gates = self._gates(states)
        update, candidate = gates["update"], gates["candidate"]
        return np.asarray((states - candidate) * update + candidate)

    def jacobian(self, states: Array) -> Array:
        """(K, H, H) the derivative of each unit's next state, by row, by each state, by column."""
        return jacobians(factors(self._gates(states), states, self._weights), self._weights)

    def _gates(self, states: Array) -> dict[str, Array]:
        """(K, H) each."""
        from_h = states @ self._weights["weight_hh"].T + self._weights.get("bias_hh", 0.0)
        parts = np.split(from_h, 3, axis=1)
        x = np.split(self._from_input, 3)
        reset = _sigmoid(x[0] + parts[0])
        return {
            "reset": reset,
            "update": _sigmoid(x[1] + parts[1]),
            "candidate": np.tanh(x[2] + reset * parts[2]),
        }


def _sigmoid(values: Array) -> Array:
    # By the tanh, which overflows nowhere.
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * values))
