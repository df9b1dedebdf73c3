"""The norm of a gradient by its distance from the loss."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.memory.gradients import Gradients
from grutrace.view.plots.axes import COLORS, make_axes, set_title, strip_spines


def plot_gradients(found: Gradients, ax: Axes | None = None) -> Axes:
    """Draw the gradient norm by distance from the loss, and the fitted factor a step.

    Args:
        found: The gradients of a site.
        ax: The axes to draw in.
    """
    ax = make_axes(ax)
    distance = np.arange(len(found.norms))
    drawn = np.isfinite(found.norms) & (found.norms > 0)
    ax.plot(distance[drawn], found.norms[drawn], "o-", color=COLORS[0], markersize=3, label="norm")
    if np.isfinite(found.factor) and drawn.any():
        # The fitted line goes through the weighted mean of the logarithms.
        weights = found.counts[drawn] / found.counts[drawn].sum()
        middle = weights @ distance[drawn]
        level = np.exp(weights @ np.log(found.norms[drawn]))
        ax.plot(
            distance, level * found.factor ** (distance - middle), "--", color=COLORS[1],
            label=f"factor {found.factor:.3g} a step",
        )  # fmt: skip
    if drawn.any():
        ax.set_yscale("log")
        ax.legend(frameon=False, fontsize=8)
    ax.set_xlabel("steps before the last one that has a gradient")
    ax.set_ylabel("|dL/dh|, root mean square over sequences")
    strip_spines(ax)
    if np.isnan(found.half_life):
        text = "too few steps for a half-life"
    elif np.isinf(found.half_life):
        text = "the norm does not fall"
    else:
        text = f"the norm halves every {found.half_life:.3g} steps"
    set_title(ax, found.site, "gradient through time", (text, f"{found.sequences} sequences"))
    return ax
