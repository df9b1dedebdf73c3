"""The analyses by name, as `grutrace stats FILE NAME` and its help list them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module

from grutrace.analysis.engine.result import Result
from grutrace.errors import OptionError, require_options, short_repr


@dataclass(frozen=True)
class AnalysisSpec:
    """An analysis of one site, and the options that the command line passes to it.

    Attributes:
        name: Name of the function in `grutrace.analysis`.
        summary: One line for help texts.
        options: Names of the optional arguments that the command line can pass.
        required: Those of `options` that the analysis cannot run without.
    """

    name: str
    summary: str
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()

    def require(self, names: Collection[str]) -> None:
        """Check the names of the options that a user gave.

        Raises:
            OptionError: An option is not one of `options`, or one of `required` is missing.
        """
        require_options(self.name, names, self.options, self.required)

    def load(self) -> Callable[..., Result]:
        """Import the module of the function and return the function."""
        function: Callable[..., Result] = getattr(import_module("grutrace.analysis"), self.name)
        return function


ANALYSES = {
    spec.name: spec
    for spec in (
        AnalysisSpec("saturation", "share of steps with each gate near 0 or 1"),
        AnalysisSpec("stuck_units", "units that are stuck or constant in most sequences"),
        AnalysisSpec("quantization", "rounding error of a smaller storage type"),
        AnalysisSpec("moments", "mean, spread, skewness and kurtosis of each unit"),
        AnalysisSpec("quantiles", "quantiles and histogram of each unit"),
        AnalysisSpec("timescales", "number of steps that each unit keeps its state"),
        AnalysisSpec("autocorrelation", "correlation time of each unit's state"),
        AnalysisSpec("state_age", "mean age of the information in each state"),
        AnalysisSpec("gradients", "how fast the gradient of a loss vanishes through time"),
        AnalysisSpec("step_jacobians", "spectral radius and norm of step Jacobians"),
        AnalysisSpec("lyapunov", "Lyapunov exponents"),
        AnalysisSpec("fixed_points", "fixed and slow points at a constant input"),
        AnalysisSpec("gate_activation", "boundaries where a gate changes", ("label",)),
        AnalysisSpec("selectivity", "units that follow a label", ("label",), ("label",)),
        AnalysisSpec("probe", "linear probe of the states for a label", ("label",), ("label",)),
        AnalysisSpec("geometry", "principal components and dimension of the states"),
        AnalysisSpec("update_sparsity", "share of steps that hardly change a unit"),
        AnalysisSpec("stages", "how the units changed over the course of the recording"),
        AnalysisSpec(
            "change",
            "differences between two traces, unit by unit",
            ("against", "paired"),
            ("against",),
        ),
    )
}


def get_analysis(name: str) -> AnalysisSpec:
    """Return the analysis of this name.

    Raises:
        OptionError: There is none; the message lists the names.
    """
    if name not in ANALYSES:
        raise OptionError(
            f"analysis: expected one of {', '.join(ANALYSES)}; found {short_repr(name)}"
        )
    return ANALYSES[name]
