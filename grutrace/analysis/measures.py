"""The analyses by name, as `grutrace stats FILE NAME` and its help list them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from grutrace.analysis.result import Result
from grutrace.errors import OptionError


@dataclass(frozen=True)
class Measure:
    """An analysis of one site that needs to be told nothing else.

    Attributes:
        module: Where it is, within `grutrace.analysis`.
        function: Its name there.
        says: What it is, in a line.
    """

    module: str
    function: str
    says: str

    def load(self) -> Callable[[Any], Result]:
        """The function. What it needs is imported now, and not before."""
        found: Callable[[Any], Result]
        found = getattr(import_module(f"grutrace.analysis.{self.module}"), self.function)
        return found


MEASURES = {
    "saturation": Measure("saturation", "saturation", "how often gates are shut or open"),
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
}


def measure(name: str) -> Measure:
    """The analysis of this name.

    Raises:
        OptionError: There is none; the message says which there are.
    """
    if name not in MEASURES:
        raise OptionError(f"measure: expected one of {', '.join(MEASURES)}; found {name!r}")
    return MEASURES[name]
