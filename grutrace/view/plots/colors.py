"""Colour maps of quantities, and colour bars that say what a value means.

Gates have a map whose lightness grows with the value, so it is read in grey and by colour-blind
people. Values of both signs have a map that is white at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap

from grutrace.records import Array
from grutrace.view.plots.axes import figure_of

#: Colour of values that are NaN.
BAD = "#6fa8a0"

#: Names of quantities in titles and on colour bars.
QUANTITY_NAMES = {
    "reset": "reset gate r",
    "update": "update gate z",
    "candidate": "candidate n",
    "hidden": "hidden state h",
    "input": "input x",
    "gradient": "gradient",
}


@dataclass(frozen=True)
class ColorScale:
    """The colours of the values of a quantity.

    Attributes:
        cmap: Name of matplotlib's colour map.
        low: The value of the first colour.
        high: The value of the last colour.
        label: What is shown.
        ticks: By value, a text on the colour bar.
    """

    cmap: str
    low: float
    high: float
    label: str
    ticks: dict[float, str]

    @property
    def map(self) -> Colormap:
        """The colour map, with its own colour for NaN."""
        return matplotlib.colormaps[self.cmap].with_extremes(bad=BAD)


def color_scale(quantity: str, values: Array) -> ColorScale:
    """Return the colours of a quantity.

    Gates reach from 0 to 1, the candidate from -1 to 1, and other quantities as far as the largest
    value on both sides of 0.

    Args:
        quantity: Name of the quantity.
        values: The values that are drawn.
    """
    name = QUANTITY_NAMES.get(quantity, quantity)
    if quantity == "update":
        ticks = {0.0: "0\noverwrites", 0.5: "0.5", 1.0: "1\nkeeps"}
        return ColorScale("magma", 0.0, 1.0, name, ticks)
    if quantity == "reset":
        ticks = {0.0: "0\nignores h", 0.5: "0.5", 1.0: "1\nuses h"}
        return ColorScale("magma", 0.0, 1.0, name, ticks)
    if quantity == "candidate":
        return ColorScale("RdBu_r", -1.0, 1.0, name, {-1.0: "-1", 0.0: "0", 1.0: "1"})
    limit = largest_magnitude(values)
    ticks = {-limit: f"{-limit:.2g}", 0.0: "0", limit: f"{limit:.2g}"}
    return ColorScale("RdBu_r", -limit, limit, name, ticks)


def change_scale(quantity: str, values: Array) -> ColorScale:
    """Return the colours of the change of a quantity, centred at no change."""
    limit = largest_magnitude(values)
    less, more = {
        "update": ("\noverwrites more", "\nkeeps more"),
        "reset": ("\nignores h more", "\nuses h more"),
    }.get(quantity, ("", ""))
    ticks = {-limit: f"{-limit:.2g}{less}", 0.0: "0", limit: f"+{limit:.2g}{more}"}
    name = f"change of the {QUANTITY_NAMES.get(quantity, quantity)}"
    return ColorScale("RdBu_r", -limit, limit, name, ticks)


def largest_magnitude(values: Array) -> float:
    """Return the largest finite magnitude; 1 where all values are 0 or not finite."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0)) or 1.0


def add_color_bar(ax: Axes, image: ScalarMappable, scale: ColorScale) -> None:
    """Add a colour bar with the meaning of the values."""
    bar = figure_of(ax).colorbar(image, ax=ax, aspect=30, pad=0.02)
    bar.set_ticks(list(scale.ticks), labels=list(scale.ticks.values()))
    bar.ax.tick_params(length=0)
    bar.set_label(scale.label)
