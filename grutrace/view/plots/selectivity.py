"""Units that follow a label: their information about it, against chance."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.labels.selectivity import Selectivity
from grutrace.view.plots.axes import (
    COLORS,
    GREY,
    make_axes,
    number_points,
    plain,
    printable,
    set_title,
    strip_spines,
)
from grutrace.view.plots.colors import QUANTITY_NAMES

#: Units with a corrected p-value below this follow the label.
SIGNIFICANT = 0.05


def plot_selectivity(found: Selectivity, ax: Axes | None = None) -> Axes:
    """Draw the information of each unit about a label, the largest first, and the chance level.

    Units that follow the label have the colour of the value that they separate best.

    Args:
        found: The selectivity of a site.
        ax: The axes to draw in.
    """
    ax = make_axes(ax)
    columns = np.argsort(np.argsort(found.units, kind="stable"), kind="stable")
    by_unit = dict(zip(found.units.tolist(), columns.tolist(), strict=True))
    order = np.array([by_unit[unit] for unit in found.ranking.tolist()], np.int64)
    rank = np.arange(len(order))
    information, p = found.information[order], found.p[order]
    follows = p < SIGNIFICANT
    ax.plot(rank, found.null_mean[order], color=GREY, linewidth=1.5, label="chance (permutations)")
    ax.scatter(
        rank[~follows], information[~follows], s=14, facecolors="none", edgecolors=GREY,
        label="other units",
    )  # fmt: skip
    best = found.best[order]
    values = [value for value in found.classes if (follows & (best == value)).any()]
    for number, value in enumerate(values):
        chosen = follows & (best == value)
        color = COLORS[number] if number < len(COLORS) - 1 else COLORS[-1]
        name = printable(value) if number < len(COLORS) - 1 else "_"
        ax.scatter(rank[chosen], information[chosen], s=18, color=color, label=name)
    number_points(ax, found.units[order][follows], rank[follows], information[follows])
    ax.set_xlabel("units, by information above chance")
    plain(ax.set_ylabel(f"information about {printable(found.label)} (bits)"))
    ax.set_ylim(bottom=0)
    legend = ax.legend(frameon=False, fontsize=8, title="separates best")
    for text in legend.get_texts():
        plain(text)
    strip_spines(ax)
    quantity = QUANTITY_NAMES.get(found.quantity, found.quantity)
    set_title(
        ax,
        found.site,
        f"{quantity} and {printable(found.label)}",
        (
            f"{found.selective} of {len(found.units)} units follow it (p < {SIGNIFICANT}, "
            f"corrected for all units; {found.permutations} permutations)",
        ),
    )
    return ax
