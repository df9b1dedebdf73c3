"""The pictures by name, as `grutrace plot FILE KIND` and its help list them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from grutrace.errors import require_one_of, require_options


@dataclass(frozen=True)
class PlotSpec:
    """A picture of a site, and the options that the command line passes to it.

    Attributes:
        name: Name of the method of `SitePlots`.
        summary: One line for help texts.
        options: Names of the arguments that the command line can pass.
        required: Those of `options` that the picture cannot be drawn without. ``against`` are
            other traces, which are passed first.
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
        require_options(f"the plot {self.name}", names, self.options, self.required)


#: Options of all pictures of one sequence.
_OF_A_SEQUENCE = ("quantity", "sequence", "steps", "units")

PLOTS = {
    spec.name: spec
    for spec in (
        PlotSpec(
            "heatmap",
            "a quantity of one sequence, units by steps",
            (*_OF_A_SEQUENCE, "order", "label"),
        ),
        PlotSpec("lines", "a quantity of some units of one sequence", _OF_A_SEQUENCE),
        PlotSpec("saturation", "share of steps with a gate near 0 and near 1", ("gate",)),
        PlotSpec("timescales", "how long units keep their state, and the fit"),
        PlotSpec("autocorrelation", "how long the hidden states stay the same", ("lags",)),
        PlotSpec("decompose", "what each past step wrote into a state", ("sequence", "step")),
        PlotSpec("memory_map", "what each past step wrote into every state", ("sequence",)),
        PlotSpec(
            "trajectories",
            "hidden states in principal components, with fixed points",
            ("points", "label"),
        ),
        PlotSpec("selectivity", "units that follow a label", ("label", "quantity"), ("label",)),
        PlotSpec("gradients", "gradient norms by distance from the loss"),
        PlotSpec("stages", "mean of each unit over the recording", ("quantity", "count")),
        PlotSpec(
            "change",
            "what moved between two traces",
            ("against", "quantity", "paired"),
            ("against",),
        ),
        PlotSpec(
            "checkpoints",
            "mean of each unit in several traces",
            ("against", "quantity"),
            ("against",),
        ),
    )
}


def get_plot(name: str) -> PlotSpec:
    """Return the picture of this name.

    Raises:
        OptionError: There is none; the message lists the names.
    """
    require_one_of("plot", name, tuple(PLOTS))
    return PLOTS[name]
