"""The saturation of a gate, unit by unit: the figure of Karpathy, Johnson and Li (2015)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.descriptive.saturation import STUCK, Saturation
from grutrace.errors import NotRecordedError
from grutrace.view.plots.axes import COLORS, GREY, make_axes, number_points, set_title, strip_spines
from grutrace.view.plots.colors import QUANTITY_NAMES

#: What a gate does below 0.1 and above 0.9.
MEANINGS = {
    "update": ("overwrites", "keeps"),
    "reset": ("ignores the state", "uses the state"),
}


def plot_saturation(found: Saturation, gate: str = "update", ax: Axes | None = None) -> Axes:
    """Draw the share of steps with a nearly closed gate against that with a nearly open one.

    Args:
        found: The saturation of a site.
        gate: reset, update or candidate.
        ax: The axes to draw in.

    Raises:
        NotRecordedError: The gate was not recorded.
    """
    if gate not in found.left:
        raise NotRecordedError(f"{found.site!r} has no {gate!r}; it has {', '.join(found.left)}")
    ax = make_axes(ax, 5.6, 5.6)
    left, right, stuck = found.left[gate], found.right[gate], found.stuck[gate] != 0
    ax.plot([0, 1], [1, 0], color=GREY, linewidth=1, zorder=0)
    for chosen, color, marker in ((~stuck, COLORS[0], "o"), (stuck, COLORS[1], "D")):
        ax.scatter(left[chosen], right[chosen], s=20, color=color, marker=marker, alpha=0.7)
    number_points(ax, found.units[stuck], left[stuck], right[stuck])
    value = "|n|" if gate == "candidate" else QUANTITY_NAMES[gate][-1]
    below, above = MEANINGS.get(gate, ("", ""))
    ax.set_xlabel(f"share of steps with {value} < 0.1" + (f" ({below})" if below else ""))
    ax.set_ylabel(f"share of steps with {value} > 0.9" + (f" ({above})" if above else ""))
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.03)
    ax.set_aspect("equal")
    strip_spines(ax)
    missing = int(np.count_nonzero(np.isnan(left)))
    set_title(
        ax,
        found.site,
        f"saturation of the {QUANTITY_NAMES[gate]}",
        (
            f"each point a unit; {np.count_nonzero(stuck)} of {len(stuck)} stuck "
            f"(diamonds: one side in {100 * STUCK:.0f} % of the steps)",
            f"{missing} without values" if missing else "",
        ),
    )
    return ax
