"""Requests for the gates that the kernel computes, and which units to copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from grutrace.records import GATES

#: Number of units whose states check a call if not all gates are computed.
CHECK_UNITS = 8

#: Units to copy, by gate name.
UnitsByGate: TypeAlias = Mapping[str, range]


class GateRequest(NamedTuple):
    """A request for the kernel's own gates.

    Attributes:
        columns: Units to copy, by gate name.
        max_cost_ratio: Maximum cost of copying, relative to the cost of a replay.
    """

    columns: UnitsByGate
    max_cost_ratio: float = 1.0


#: A request for no gate.
NO_GATES = GateRequest(MappingProxyType({}))


class GateCopyPlan(NamedTuple):
    """The columns to copy from a layer: the requested gates, and those that check them.

    Attributes:
        columns: Units to copy, by gate name.
        check_units: Units whose states are compared with the states that the gates lead to.
    """

    columns: UnitsByGate
    check_units: range

    @classmethod
    def of(cls, gates: Sequence[str], units: Sequence[int]) -> GateCopyPlan | None:
        """Return the plan for these gates of these units; None if they cannot be copied.

        Args:
            gates: Names of the gates.
            units: Indices of the units. They must be evenly spaced.
        """
        request = range(units[0], units[-1] + 1, units[1] - units[0] if len(units) > 1 else 1)
        if list(request) != list(units):
            return None
        check_units = request
        if not {"update", "candidate"} <= set(gates):
            check_units = request[:: max(1, len(request) // CHECK_UNITS)][:CHECK_UNITS]
        columns = {name: request for name in GATES if name in gates}
        return cls({"update": check_units, "candidate": check_units} | columns, check_units)


def merge_requests(requests: Sequence[GateRequest], hidden_size: int) -> GateRequest:
    """Return one request for several. If the units of a gate differ, it has all units.

    Args:
        requests: Requests for one layer.
        hidden_size: H
    """
    merged: dict[str, range] = {}
    for request in requests:
        for name, columns in request.columns.items():
            is_same = merged.get(name, columns) == columns
            merged[name] = columns if is_same else range(hidden_size)
    ratios = [request.max_cost_ratio for request in requests if request.columns]
    return GateRequest(merged, min(ratios, default=1.0))
