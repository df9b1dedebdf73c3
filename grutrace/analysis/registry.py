"""The analyses by name, as `grutrace stats FILE NAME` and its help list them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module

from grutrace.analysis.engine.result import Result
from grutrace.errors import OptionError, brief


@dataclass(frozen=True)
class Measure:
    """An analysis of one site.

    Attributes:
        module: Where it is, within `grutrace.analysis`.
        function: Its name there.
        says: What it is, in a line.
        takes: What else it can be told, by the names of its arguments.
        needs: Those of them without which it cannot be.
    """

    module: str
    function: str
    says: str
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def require(self, given: Collection[str]) -> None:
        """Refuse what it cannot be told, and the lack of what it must be told.

        Raises:
            OptionError: As it says.
        """
        for name in given:
            if name not in self.takes:
                raise OptionError(f"{self.function} takes no --{name}")
        for name in self.needs:
            if name not in given:
                raise OptionError(f"{self.function} needs --{name}")

    def load(self) -> Callable[..., Result]:
        """The function. What it needs is imported now, and not before."""
        found: Callable[..., Result]
        found = getattr(import_module(f"grutrace.analysis.{self.module}"), self.function)
        return found


MEASURES = {
    "saturation": Measure("saturation", "saturation", "how often gates are shut or open"),
    "rounding": Measure("rounding", "rounding", "by how much a smaller type has rounded"),
    "moments": Measure(
        "moments", "moments", "mean, spread, skewness and tails of gates and states"
    ),
    "quantiles": Measure("quantiles", "quantiles", "which values gates and states take how often"),
    "timescales": Measure("timescales", "timescales", "for how many steps each unit remembers"),
    "autocorrelation": Measure(
        "autocorrelation", "autocorrelation", "how long each state resembles itself"
    ),
    "memory": Measure("memory", "memory", "how old what the states hold is"),
    "jacobian": Measure(
        "jacobian", "step_jacobians", "by how much single steps shrink or grow differences"
    ),
    "lyapunov": Measure("lyapunov", "lyapunov", "whether a network is chaotic"),
    "fixed_points": Measure("fixed_points", "fixed_points", "where the state would stay"),
    "gate_activation": Measure(
        "gate_activation", "gate_activation", "boundaries where a gate changes", ("label",)
    ),
    "selectivity": Measure(
        "selectivity", "selectivity", "which unit follows a label", ("label",), ("label",)
    ),
    "probe": Measure("probes", "probe", "what can be read from states", ("label",), ("label",)),
    "geometry": Measure("geometry", "geometry", "in how many directions states move"),
    "writes": Measure("writes", "writes", "how much of the update is used"),
    "change": Measure(
        "change", "change", "what moved between two traces", ("against", "paired"), ("against",)
    ),
}


def measure(name: str) -> Measure:
    """The analysis of this name.

    Raises:
        OptionError: There is none; the message says which there are.
    """
    if name not in MEASURES:
        raise OptionError(f"measure: expected one of {', '.join(MEASURES)}; found {brief(name)}")
    return MEASURES[name]
