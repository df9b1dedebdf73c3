"""Verify that a trace is consistent: the gates with the weights, the states with the gates.

Three checks, in float64, of every row, within the rounding tolerance of its call:

- *gates*: reset, update and candidate are recomputed from the stored weights, input and states, and
  compared with the recorded gates. Needs the hidden states and the input. Above the first layer the
  input is the states of the layer below, if no dropout was applied and both were recorded.
- *derived*: if no gates are stored, they are recomputed, and the states that they lead to are
  compared with the stored states.
- *states*: h = (1 - z) n + z h', from the recorded update, candidate and hidden states. It needs no
  other units, so it works where only some were recorded.

The tolerance of the gates is computed here; that of the states was recorded with the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from grutrace.analysis.verification.distance import abs_difference
from grutrace.analysis.verification.residuals import CallResiduals
from grutrace.analysis.verification.set_values import SetValues, unknown_states
from grutrace.gru.recompute import FLOAT64_EPS, StepRecomputation
from grutrace.records import GATES, Array
from grutrace.reprs import fields_repr
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.recomputed import GateInputs
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.trace import Trace

#: Size of a block in memory, in bytes.
BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class WorstValue:
    """The recorded value with the largest difference relative to its tolerance.

    Attributes:
        quantity: The quantity.
        sequence: Number of the sequence.
        step: Step of the sequence.
        unit: Number of the unit, among all H.
        recorded: The value in the trace.
        expected: The recomputed value.
        tolerance: Largest difference that rounding explains.
    """

    quantity: str
    sequence: int
    step: int
    unit: int
    recorded: float
    expected: float
    tolerance: float

    @property
    def difference(self) -> float:
        """``|recorded - expected|``; infinite where only one of them is NaN."""
        return float(abs_difference(np.array(self.recorded), np.array(self.expected)))

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance

    @property
    def of_tolerance(self) -> float:
        """The difference over the tolerance; 0 where both are 0."""
        return float(_excess(np.array(self.difference), np.array(self.tolerance)))


@dataclass(frozen=True)
class SiteVerification:
    """Result of the check of a site.

    Attributes:
        site: Name of the site.
        check: ``gates``, ``derived``, ``states``, or None if nothing could be checked.
        reason: Why not everything was checked; empty if it was.
        steps: Number of checked rows.
        worst: The value with the largest relative difference; None if there was nothing to check.
    """

    site: str
    check: Literal["gates", "derived", "states"] | None
    reason: str
    steps: int
    worst: WorstValue | None

    __repr__ = fields_repr

    @property
    def holds(self) -> bool:
        """Whether all checked values are within their tolerance."""
        return self.worst is None or self.worst.holds


def verify(trace: Trace) -> list[SiteVerification]:
    """Check every site of a trace against the equations of the GRU.

    Args:
        trace: A trace, in memory or in a file.

    Returns:
        One result for each site, in the model's order. The checks are those of the module.

    Examples:
        >>> import torch, grutrace
        >>> from grutrace.analysis import verify
        >>> layer = torch.nn.GRU(2, 3)
        >>> quantities = ("reset", "update", "candidate", "hidden", "input")
        >>> with grutrace.trace(layer, record=quantities) as trace:
        ...     _ = layer(torch.randn(4, 1, 2))
        >>> [(result.site, result.check, result.holds) for result in verify(trace)]
        [('l0', 'gates', True)]
    """
    return [verify_site(trace, name) for name in trace.sites]


# A file may contain values that are no gates, such as infinities. They are reported, not warned
# about.
@np.errstate(all="ignore")
def verify_site(trace: Trace, name: str) -> SiteVerification:
    """Check one site, a block of rows at a time."""
    site = trace[name]
    recorded = site.site.quantities
    steps = int(site.lengths.sum())
    missing_reason = site.gate_inputs.missing_reason
    if "hidden" not in recorded:
        return SiteVerification(name, None, missing_reason, 0, None)
    if not missing_reason and not set(GATES) & set(recorded):
        return SiteVerification(name, "derived", "", steps, _worst_derived(site))
    if not missing_reason:
        return SiteVerification(name, "gates", "", steps, _worst(_check_gates(site), site))
    reason = missing_reason
    if not {"update", "candidate"} <= set(recorded):
        reason += ", nor update and candidate together"
        return SiteVerification(name, None, reason, 0, None)
    return SiteVerification(name, "states", reason, steps, _worst(_check_states(site), site))


@dataclass(frozen=True)
class _Comparison:
    """Rows of one quantity, (n, H), with their expected values and tolerances, (n,)."""

    quantity: str
    first: int
    recorded: Array
    expected: Array
    tolerance: Array


def _blocks(site: SiteTrace) -> Iterator[slice]:
    rows = site.rows("hidden")
    width = 3 * rows.shape[1] + site.site.input_size
    return block_slices(len(rows), BLOCK_BYTES, 8 * width)


def _input_blocks(site: SiteTrace) -> Iterator[GateInputs]:
    for part in _blocks(site):
        yield from site.gate_inputs.iter_blocks(np.arange(part.start, part.stop))


def _check_gates(site: SiteTrace) -> Iterator[_Comparison]:
    quantities = [name for name in (*GATES, "hidden") if name in site.site.quantities]
    # The recorded tolerance covers the products that the call computed. It is 0 where the gates are
    # the kernel's own.
    computed = _call_residuals(site).tolerances(range(len(site.checks)))
    tolerances = np.fmax(computed, site.checks["tolerance"].astype(np.float64))
    set_values = SetValues(site)
    for inputs in _input_blocks(site):
        derived = _in_double(inputs)
        rows = slice(int(inputs.rows[0]), int(inputs.rows[-1]) + 1)
        if set_values:
            _use_set_gates(derived, site, set_values, rows)
        for name in quantities:
            recorded = np.asarray(site.rows(name)[rows])
            expected = derived.hidden if name == "hidden" else derived.gate(name)
            if set_values:
                unknown = _unknown(site, set_values, name, rows)
                expected = np.where(unknown, recorded, expected)
            yield _Comparison(name, rows.start, recorded, expected, tolerances[inputs.calls])


def _use_set_gates(
    derived: StepRecomputation, site: SiteTrace, set_values: SetValues, rows: slice
) -> None:
    """Replace gates that an intervention has set with the recorded ones."""
    values = {}
    for name in GATES:
        mask = set_values.mask(name, rows)
        if name in site.site.quantities and mask.any():
            values[name] = mask, _to_float64(site.rows(name)[rows])
    derived.set_gates(values)


def _unknown(site: SiteTrace, set_values: SetValues, name: str, rows: slice) -> Array:
    """Return which values follow from nothing that is recorded, (n, U)."""
    if name != "hidden":
        mask = set_values.mask(name, rows)
        if name == "candidate" and "reset" not in site.site.quantities:
            mask = mask | set_values.mask("reset", rows)
        return mask
    mask = set_values.mask("hidden", rows)
    for gate in GATES:
        if gate not in site.site.quantities:
            mask = mask | set_values.mask(gate, rows)
    return mask


def _worst_derived(site: SiteTrace) -> WorstValue | None:
    """Return the state with the largest difference, relative to its call's tolerance."""
    residuals, hidden = _call_residuals(site), site.rows("hidden")
    allowed = residuals.tolerances(range(len(residuals.residuals)))
    if not len(hidden):
        return None
    has_rows = residuals.worst_positions[:, 0] >= 0
    call = int(np.argmax(np.where(has_rows, _excess(residuals.residuals, allowed), -1)))
    row, unit = (int(number) for number in residuals.worst_positions[call])
    (inputs,) = site.gate_inputs.iter_blocks(np.array([row]))
    sequence, step = site.locate(row)
    derived, rows = _in_double(inputs), slice(row, row + 1)
    derived.set_gates(site.gate_inputs.set_gates.at(inputs.rows, slice(None)))
    recorded, expected = float(hidden[row][unit]), float(derived.hidden[0, unit])
    unknown = unknown_states(site, SetValues(site), rows)
    if unknown is not None and unknown[0, unit]:
        # All differences are 0: it is one of the states that are not checked.
        expected = recorded
    return WorstValue("hidden", sequence, step, unit, recorded, expected, float(allowed[call]))


def _call_residuals(site: SiteTrace) -> CallResiduals:
    """Derive all gates of a site and collect the residual of each call."""
    residuals, hidden, set_values = CallResiduals(site), site.rows("hidden"), SetValues(site)
    for inputs in _input_blocks(site):
        rows = slice(int(inputs.rows[0]), int(inputs.rows[-1]) + 1)
        derived = _in_double(inputs)
        derived.set_gates(site.gate_inputs.set_gates.at(inputs.rows, slice(None)))
        residuals.add(inputs, derived, hidden, unknown_states(site, set_values, rows))
    return residuals


def _in_double(inputs: GateInputs) -> StepRecomputation:
    weights = {name: _to_float64(array) for name, array in inputs.weights.items()}
    return StepRecomputation(
        _to_float64(inputs.input), _to_float64(inputs.previous), weights, FLOAT64_EPS
    )


def _check_states(site: SiteTrace) -> Iterator[_Comparison]:
    # The stored gates are rounded too.
    stored, set_values = 4 * float(np.finfo(site.rows("update").dtype).eps), SetValues(site)
    for part in _blocks(site):
        update, candidate = _to_float64(site.update[part]), _to_float64(site.candidate[part])
        previous = _to_float64(site.previous(part.start, part.stop))
        expected = (1 - update) * candidate + update * previous
        if set_values:
            expected = np.where(set_values.mask("hidden", part), site.hidden[part], expected)
        checks = site.row_checks(part.start, part.stop)
        allowed = checks["tolerance"].astype(np.float64) + stored
        yield _Comparison("hidden", part.start, _to_float64(site.hidden[part]), expected, allowed)


def _to_float64(values: Rows | Array) -> npt.NDArray[np.float64]:
    return np.asarray(values).astype(np.float64)


def _excess(difference: Array, allowed: Array) -> Array:
    """Return the differences in units of the tolerance.

    It is 0 where both are 0, and infinite where the tolerance is NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.nan_to_num(difference / allowed, nan=0.0, posinf=np.inf)
    return np.where(np.isnan(allowed), np.inf, excess)


def _worst(comparisons: Iterator[_Comparison], site: SiteTrace) -> WorstValue | None:
    """Return the value with the largest difference relative to its tolerance."""
    worst: tuple[float, _Comparison, tuple[int, int]] | None = None
    for comparison in comparisons:
        difference = abs_difference(comparison.recorded, comparison.expected)
        excess = _excess(difference, comparison.tolerance[:, np.newaxis])
        if excess.size and (worst is None or excess.max() > worst[0]):
            position = divmod(int(excess.argmax()), excess.shape[1])
            worst = float(excess.max()), comparison, position
    if worst is None:
        return None
    _, comparison, (row, unit) = worst
    sequence, step = site.locate(comparison.first + row)
    return WorstValue(
        comparison.quantity,
        sequence,
        step,
        unit if site.units is None else site.units[unit],
        float(comparison.recorded[row, unit]),
        float(comparison.expected[row, unit]),
        float(comparison.tolerance[row]),
    )
