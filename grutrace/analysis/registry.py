"""The analyses by name, as `grutrace stats FILE NAME` and its help list them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module

from grutrace.analysis.engine.result import Result
from grutrace.errors import OptionError, short_repr


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
    "saturation": Measure(
        "descriptive.saturation", "saturation", "how often gates are shut or open"
    ),
    "rounding": Measure(
        "descriptive.quantization", "rounding", "by how much a smaller type has rounded"
    ),
    "moments": Measure(
        "descriptive.distribution",
        "moments",
        "mean, spread, skewness and tails of gates and states",
    ),
    "quantiles": Measure(
        "descriptive.distribution", "quantiles", "which values gates and states take how often"
    ),
    "timescales": Measure(
        "memory.timescales", "timescales", "for how many steps each unit remembers"
    ),
    "autocorrelation": Measure(
        "memory.autocorrelation", "autocorrelation", "how long each state resembles itself"
    ),
    "memory": Measure("memory.age", "memory", "how old what the states hold is"),
    "jacobian": Measure(
        "dynamics.jacobian", "step_jacobians", "by how much single steps shrink or grow differences"
    ),
    "lyapunov": Measure("dynamics.lyapunov", "lyapunov", "whether a network is chaotic"),
    "fixed_points": Measure("dynamics.fixed_points", "fixed_points", "where the state would stay"),
    "gate_activation": Measure(
        "labels.segmentation", "gate_activation", "boundaries where a gate changes", ("label",)
    ),
    "selectivity": Measure(
        "labels.selectivity", "selectivity", "which unit follows a label", ("label",), ("label",)
    ),
    "probe": Measure(
        "labels.probe", "probe", "what can be read from states", ("label",), ("label",)
    ),
    "geometry": Measure("descriptive.geometry", "geometry", "in how many directions states move"),
    "writes": Measure("memory.update_sparsity", "writes", "how much of the update is used"),
    "change": Measure(
        "compare.change",
        "change",
        "what moved between two traces",
        ("against", "paired"),
        ("against",),
    ),
}


def measure(name: str) -> Measure:
    """The analysis of this name.

    Raises:
        OptionError: There is none; the message says which there are.
    """
    if name not in MEASURES:
        raise OptionError(
            f"measure: expected one of {', '.join(MEASURES)}; found {short_repr(name)}"
        )
    return MEASURES[name]
