"""A measured figure and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.pairs import Spread


@dataclass(frozen=True)
class Target:
    """A target: an upper or a lower bound.

    Attributes:
        bound: In the unit of the figure.
        at_least: Whether it is a lower bound.
    """

    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a figure meets the target. NaN does not."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Figure:
    """One measurement, or the reason why there is none.

    Attributes:
        name: What was measured.
        value: The figure; None if there is none.
        unit: Of the figure and its target; empty for a ratio.
        target: The target, if there is one.
        spread: The measurements that the figure is the median of, if it is one.
        absent: The reason for a missing figure, as printed in the table.
        details: More data for the JSON.
    """

    name: str
    value: float | None
    unit: str = ""
    target: Target | None = None
    spread: Spread | None = None
    absent: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is no target or no figure."""
        if self.value is None or self.target is None:
            return None
        return self.target.met(self.value)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def measured(
    name: str, spread: Spread, target: Target | None = None, *, unit: str = "", **details: Any
) -> Figure:
    """A figure that is the median of measurements."""
    return Figure(name, spread.median, unit, target, spread, details=details)


def not_measured(name: str, why: str) -> Figure:
    """A figure that is missing, with the reason."""
    return Figure(name, None, absent=why)
