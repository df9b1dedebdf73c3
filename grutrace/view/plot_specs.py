"""The pictures by name, as `grutrace plot FILE KIND` and its help list them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from grutrace.errors import OptionError, require_one_of


@dataclass(frozen=True)
class PlotSpec:
    """A picture of a site, and the options that the command line passes to it.

    Attributes:
        name: Name of the method of `SitePlots`.
        summary: One line for help texts.
        options: Names of the arguments that the command line can pass.
        required: Those of `options` that the picture cannot be drawn without.
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
        for name in names:
            if name not in self.options:
                raise OptionError(f"the plot {self.name} takes no --{name}")
        for name in self.required:
            if name not in names:
                raise OptionError(f"the plot {self.name} needs --{name}")


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
    )
}


def get_plot(name: str) -> PlotSpec:
    """Return the picture of this name.

    Raises:
        OptionError: There is none; the message lists the names.
    """
    require_one_of("plot", name, tuple(PLOTS))
    return PLOTS[name]
