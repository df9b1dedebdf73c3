"""The analyses by name, as `grutrace stats FILE NAME` and its help list them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module

from grutrace.analysis.engine.result import Result
from grutrace.errors import OptionError, short_repr


@dataclass(frozen=True)
class AnalysisSpec:
    """Where the analysis of one site is defined, and which options the command line passes.

    Attributes:
        module: Module that defines the function, relative to `grutrace.analysis`.
        function: Name of the function in that module.
        summary: One line for help texts.
        options: Names of the optional arguments that the command line can pass.
        required: Those of `options` that the analysis cannot run without.
    """

    module: str
    function: str
    summary: str
    options: tuple[str, ...] = ()
    required: tuple[str, ...] = ()

    def require(self, given: Collection[str]) -> None:
        """Check the names of the options that a user gave.

        Raises:
            OptionError: An option is not one of `options`, or one of `required` is missing.
        """
        for name in given:
            if name not in self.options:
                raise OptionError(f"{self.function} takes no --{name}")
        for name in self.required:
            if name not in given:
                raise OptionError(f"{self.function} needs --{name}")

    def load(self) -> Callable[..., Result]:
        """Import the module and return the function."""
        function: Callable[..., Result]
        function = getattr(import_module(f"grutrace.analysis.{self.module}"), self.function)
        return function


ANALYSES = {
    "saturation": AnalysisSpec(
        "descriptive.saturation", "saturation", "share of steps with each gate near 0 or 1"
    ),
    "quantization": AnalysisSpec(
        "descriptive.quantization", "quantization", "rounding error of a smaller storage type"
    ),
    "moments": AnalysisSpec(
        "descriptive.distribution", "moments", "mean, spread, skewness and kurtosis of each unit"
    ),
    "quantiles": AnalysisSpec(
        "descriptive.distribution", "quantiles", "quantiles and histogram of each unit"
    ),
    "timescales": AnalysisSpec(
        "memory.timescales", "timescales", "number of steps that each unit keeps its state"
    ),
    "autocorrelation": AnalysisSpec(
        "memory.autocorrelation", "autocorrelation", "correlation time of each unit's state"
    ),
    "state_age": AnalysisSpec(
        "memory.age", "state_age", "mean age of the information in each state"
    ),
    "step_jacobians": AnalysisSpec(
        "dynamics.jacobian", "step_jacobians", "spectral radius and norm of step Jacobians"
    ),
    "lyapunov": AnalysisSpec("dynamics.lyapunov", "lyapunov", "Lyapunov exponents"),
    "fixed_points": AnalysisSpec(
        "dynamics.fixed_points", "fixed_points", "fixed and slow points at a constant input"
    ),
    "gate_activation": AnalysisSpec(
        "labels.segmentation", "gate_activation", "boundaries where a gate changes", ("label",)
    ),
    "selectivity": AnalysisSpec(
        "labels.selectivity", "selectivity", "units that follow a label", ("label",), ("label",)
    ),
    "probe": AnalysisSpec(
        "labels.probe", "probe", "linear probe of the states for a label", ("label",), ("label",)
    ),
    "geometry": AnalysisSpec(
        "descriptive.geometry", "geometry", "principal components and dimension of the states"
    ),
    "update_sparsity": AnalysisSpec(
        "memory.update_sparsity", "update_sparsity", "share of steps that hardly change a unit"
    ),
    "change": AnalysisSpec(
        "comparison.change",
        "change",
        "differences between two traces, unit by unit",
        ("against", "paired"),
        ("against",),
    ),
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
