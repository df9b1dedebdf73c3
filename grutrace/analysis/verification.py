"""Does a trace hold together? The gates from the weights, the states from the gates.

Two checks, in float64, of every row, within the tolerance that was recorded with its call:

- *gates*: reset, update and candidate are computed anew from the stored weights, input and states,
  and compared with what was recorded. Needs the hidden states and the input; above the first layer
  the input is the states of the layer below, where no dropout was applied and both were recorded.
- *states*: h = (1 - z) n + z h', from the recorded update, candidate and hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from grutrace.gru import cell
from grutrace.record import GATES, Array
from grutrace.storage.site import SiteTrace
from grutrace.storage.source import Rows
from grutrace.storage.trace import Trace

#: How much is brought into memory at once. Bytes.
BLOCK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Place:
    """Where a recorded value differs most from what it should be, for its tolerance.

    Attributes:
        quantity: Which quantity.
        sequence: Number of the sequence.
        step: Step of the sequence.
        unit: Which unit.
        recorded: The value in the trace.
        expected: What it should be.
        tolerance: How much of the difference rounding explains.
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
        """``|recorded - expected|``; infinite where just one of them is no number."""
        return float(_differences(np.array(self.recorded), np.array(self.expected)))

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class SiteVerification:
    """What was found at a site.

    Attributes:
        site: Its name.
        check: ``gates``, ``states``, or None where nothing could be checked.
        reason: Why not more was checked; empty if the gates were.
        steps: Rows that were checked.
        worst: Where it holds least; None if there was nothing to check.
    """

    site: str
    check: Literal["gates", "states"] | None
    reason: str
    steps: int
    worst: Place | None

    @property
    def holds(self) -> bool:
        """Whether everything that was checked holds."""
        return self.worst is None or self.worst.holds


def verify(trace: Trace) -> list[SiteVerification]:
    """Check every site of a trace."""
    return [verify_site(trace, name) for name in trace.sites]


def verify_site(trace: Trace, name: str) -> SiteVerification:
    """Check one site, a block of rows at a time."""
    site = trace[name]
    recorded = site.site.quantities
    steps = int(site.lengths.sum())
    lower = _layer_below(trace, site)
    if "hidden" not in recorded:
        return SiteVerification(name, None, "the hidden states were not recorded", 0, None)
    if "input" in recorded or lower:
        worst = _worst(_check_gates(trace.calls, site, lower), site)
        return SiteVerification(name, "gates", "", steps, worst)
    reason = "the input was not recorded"
    if not {"update", "candidate"} <= set(recorded):
        reason += ", nor update and candidate together"
        return SiteVerification(name, None, reason, 0, None)
    return SiteVerification(name, "states", reason, steps, _worst(_check_states(site), site))


@dataclass(frozen=True)
class _Comparison:
    """Rows of one quantity beside what they should be, (n, H), and what rounding explains (n,)."""

    quantity: str
    first: int
    recorded: Array
    expected: Array
    tolerance: Array


def _layer_below(trace: Trace, site: SiteTrace) -> list[SiteTrace]:
    """The sites whose states the layer reads, if all are there and nothing was dropped between."""
    if not site.site.layer or (site.module.dropout and _was_trained(trace, site)):
        return []
    below = [each for each in site.module.sites if each.layer == site.site.layer - 1]
    complete = len(below) == (2 if site.module.bidirectional else 1)
    recorded = all("hidden" in each.quantities for each in below)
    return [trace[each.name] for each in below] if complete and recorded else []


def _was_trained(trace: Trace, site: SiteTrace) -> bool:
    calls = trace.calls
    return bool(calls["training"][calls["module"] == site.module.path].any())


def _blocks(site: SiteTrace) -> Iterator[tuple[int, int]]:
    rows = site.rows("hidden")
    width = 3 * rows.shape[1] + site.site.input_size
    each = max(1, BLOCK // (8 * width))
    for start in range(0, len(rows), each):
        yield start, min(start + each, len(rows))


def _check_gates(
    trace_calls: Array, site: SiteTrace, below: list[SiteTrace]
) -> Iterator[_Comparison]:
    quantities = [name for name in (*GATES, "hidden") if name in site.site.quantities]
    for start, stop in _blocks(site):
        input = _input(site, below, start, stop)
        previous = site.previous(start, stop)
        versions = trace_calls["weights"][site.row_calls(start, stop)]
        allowed = site.row_checks(start, stop)["tolerance"].astype(np.float64)
        for first, last in _runs(versions):
            part = slice(first, last)
            weights = site.weights(int(versions[first]))
            values = _recompute(weights, input[part], previous[part])
            for name in quantities:
                recorded = np.asarray(site.rows(name)[start + first : start + last])
                yield _Comparison(name, start + first, recorded, values[name], allowed[part])


def _input(site: SiteTrace, below: list[SiteTrace], start: int, stop: int) -> Array:
    if "input" in site.site.quantities:
        return np.asarray(site.input[start:stop])
    return np.concatenate([np.asarray(each.hidden[start:stop]) for each in below], axis=1)


def _runs(versions: Array) -> Iterator[tuple[int, int]]:
    """Yield where each run of the same version begins and ends."""
    changes = np.flatnonzero(np.diff(versions)) + 1
    return zip([0, *changes.tolist()], [*changes.tolist(), len(versions)], strict=True)


def _recompute(weights: dict[str, Array], input: Array, previous: Array) -> dict[str, Array]:
    """Return gates and states in float64, (n, H) by name."""
    tensors = {name: torch.from_numpy(_wide(array)) for name, array in weights.items()}
    before = torch.from_numpy(_wide(previous))
    gates = cell.gates(cell.products(torch.from_numpy(_wide(input)), before, **tensors))
    values = gates._asdict() | {"hidden": cell.step(gates, before)}
    return {name: value.numpy() for name, value in values.items()}


def _check_states(site: SiteTrace) -> Iterator[_Comparison]:
    # Beside the kernel's rounding, the stored gates are rounded themselves.
    stored = 4 * float(np.finfo(site.rows("update").dtype).eps)
    for start, stop in _blocks(site):
        update, candidate, hidden, previous = (
            _wide(each)
            for each in (
                site.update[start:stop],
                site.candidate[start:stop],
                site.hidden[start:stop],
                site.previous(start, stop),
            )
        )
        expected = (1 - update) * candidate + update * previous
        allowed = site.row_checks(start, stop)["tolerance"].astype(np.float64) + stored
        yield _Comparison("hidden", start, hidden, expected, allowed)


def _wide(values: Rows | Array) -> npt.NDArray[np.float64]:
    return np.asarray(values).astype(np.float64)


def _differences(recorded: Array, expected: Array) -> Array:
    same = (recorded == expected) | (np.isnan(recorded) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(recorded - expected))
    return np.where(np.isnan(off), np.inf, off)


def _worst(comparisons: Iterator[_Comparison], site: SiteTrace) -> Place | None:
    """Return the value whose difference is largest beside its tolerance."""
    worst: tuple[float, _Comparison, tuple[int, int]] | None = None
    for comparison in comparisons:
        off = _differences(comparison.recorded, comparison.expected)
        excess = off / comparison.tolerance[:, np.newaxis]
        if excess.size and (worst is None or excess.max() > worst[0]):
            place = divmod(int(excess.argmax()), excess.shape[1])
            worst = float(excess.max()), comparison, place
    if worst is None:
        return None
    _, comparison, (row, unit) = worst
    sequence, step = site.locate(comparison.first + row)
    return Place(
        comparison.quantity,
        sequence,
        step,
        unit,
        float(comparison.recorded[row, unit]),
        float(comparison.expected[row, unit]),
        float(comparison.tolerance[row]),
    )
