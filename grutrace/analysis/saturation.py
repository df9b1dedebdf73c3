"""How often the gates are nearly shut or nearly open; which units are stuck, and which are dead.

Karpathy, Johnson and Li (2015), "Visualizing and understanding recurrent networks", section 4.2:
a gate is *left-saturated* at a step where it is below 0.1, *right-saturated* where it is above 0.9;
their figure plots, unit by unit, the share of the one against the share of the other.

N steps, H units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from grutrace.analysis.fold import fold_rows
from grutrace.analysis.material import Analysed, material
from grutrace.analysis.result import Result
from grutrace.errors import NotRecordedError
from grutrace.record import GATES, Array
from grutrace.statistics.units import describe, join, no_values
from grutrace.storage.index import Integers

#: A gate that is on one side in at least this share of the steps is stuck there.
STUCK = 0.99

#: A unit whose state stays within a range of this size is dead. Hidden states lie in (-1, 1).
STILL = 1e-3


@dataclass(frozen=True, eq=False)
class Saturation(Result):
    """Of a site. Not a number where there are no steps.

    Attributes:
        steps: N, of all sequences together.
        units: (H,) numbers of the units.
        left: By gate (reset, update, candidate as recorded), (H,) share of the steps with
            the gate below 0.1; for the candidate, of those with ``|n|`` below 0.1.
        right: Likewise above 0.9.
        stuck: By gate, (H,) -1 where it is left-saturated in at least `STUCK` of the steps, 1
            where it is right-saturated in as many, else 0.
        dead: (H,) whether the state of a unit stays within a range of `STILL` all the
            time; None where the hidden states were not recorded.
    """

    steps: int
    units: Integers
    left: Mapping[str, Array]
    right: Mapping[str, Array]
    stuck: Mapping[str, Array]
    dead: Array | None


def saturation(site: Analysed) -> Saturation:
    """Count how often each gate of each unit is nearly shut or nearly open.

    Args:
        site: With at least one of reset, update and candidate; with hidden, dead units are told.

    Raises:
        NotRecordedError: No gate was recorded.
    """
    of = material(site)
    gates = [name for name in GATES if name in of.quantities]
    if not gates:
        raise NotRecordedError(f"{of.name!r} has no gates; it has {', '.join(of.quantities)}")
    asked = [*gates, *(["hidden"] if "hidden" in of.quantities else [])]
    counted = fold_rows(of, asked, partial(_Counted, tuple(asked), len(of.units)))
    left = {gate: _share(counted.units[gate], "below") for gate in gates}
    right = {gate: _share(counted.units[gate], "above") for gate in gates}
    return Saturation(
        site=of.name,
        steps=of.steps,
        units=of.units,
        left=left,
        right=right,
        stuck={
            gate: (right[gate] >= STUCK).astype(np.int8) - (left[gate] >= STUCK) for gate in gates
        },
        dead=_still(counted.units["hidden"]) if "hidden" in asked else None,
    )


class _Counted:
    """What is counted of each unit, by quantity; see `statistics.units`."""

    def __init__(self, quantities: Sequence[str], width: int) -> None:
        self.units = {name: no_values(width) for name in quantities}

    def add(self, rows: Mapping[str, Array]) -> None:
        for name, block in rows.items():
            with np.errstate(over="ignore", invalid="ignore"):
                join(self.units[name], describe(np.ascontiguousarray(block), moments=False)[0])

    def merge(self, later: _Counted) -> None:
        for name, units in later.units.items():
            with np.errstate(over="ignore", invalid="ignore"):
                join(self.units[name], units)


def _share(units: Array, name: str) -> Array:
    count = units["count"]
    shares = np.full(len(units), np.nan)
    return np.asarray(np.divide(units[name], count, out=shares, where=count > 0))


def _still(units: Array) -> Array:
    # Where there are no values, the extremes are infinities the other way round.
    return np.asarray((units["count"] > 0) & (units["maximum"] - units["minimum"] <= STILL))
