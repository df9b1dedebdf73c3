"""What changed: between two traces, over the stages of a recording, and over checkpoints.

H units, K stages or checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.comparison.change import Change
from grutrace.analysis.comparison.stages import Stages
from grutrace.errors import NotRecordedError
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers
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
from grutrace.view.plots.colors import QUANTITY_NAMES, add_color_bar, change_scale

#: Normal quantile for 5 % on both sides.
NORMAL_95 = 1.96


def plot_change(found: Change, quantity: str = "update", ax: Axes | None = None) -> Axes:
    """Draw how the mean of each unit moved between two traces, with twice its standard error.

    Args:
        found: The change of a site.
        quantity: The quantity.
        ax: The axes to draw in.

    Raises:
        NotRecordedError: The quantity is not in both traces.
    """
    if quantity not in found.moved:
        raise NotRecordedError(
            f"both traces of {found.site!r} have {', '.join(found.moved)}, but not {quantity!r}"
        )
    ax = make_axes(ax)
    moved, error = found.moved[quantity], found.error[quantity]
    order = np.argsort(np.nan_to_num(moved, nan=np.inf), kind="stable")
    rank, moved, error = np.arange(len(order)), moved[order], error[order]
    with np.errstate(invalid="ignore"):
        apart = np.abs(moved) > NORMAL_95 * error
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.errorbar(
        rank, moved, yerr=np.nan_to_num(NORMAL_95 * error), fmt="none", ecolor=GREY, elinewidth=0.8
    )
    ax.scatter(rank[~apart], moved[~apart], s=12, facecolors="none", edgecolors=GREY)
    ax.scatter(rank[apart], moved[apart], s=14, color=COLORS[0])
    extremes = np.argsort(-np.abs(np.nan_to_num(moved)), kind="stable")[:6]
    number_points(ax, found.units[order][extremes], rank[extremes], moved[extremes])
    ax.set_xlabel("units, by their difference")
    ax.set_ylabel(f"difference of the mean {QUANTITY_NAMES[quantity]}")
    strip_spines(ax)
    set_title(
        ax,
        found.site,
        f"change of the {QUANTITY_NAMES[quantity]}",
        (
            f"{np.count_nonzero(apart)} of {len(moved)} units beyond their 95 % interval (filled; "
            f"{round(0.05 * len(moved))} expected by chance)",
        ),
    )
    return ax


def plot_stages(
    found: Stages,
    quantity: str = "update",
    calls: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how the mean of each unit differs from the first stage of a recording.

    Args:
        found: The stages of a site.
        quantity: The quantity.
        calls: (K,) the first call of each stage, for the axis; None for the first sequence.
        ax: The axes to draw in.

    Raises:
        NotRecordedError: The quantity was not recorded.
    """
    if quantity not in found.mean:
        raise NotRecordedError(f"{found.site!r} has {', '.join(found.mean)}, but not {quantity!r}")
    columns = [str(number) for number in (found.first.tolist() if calls is None else calls)]
    moving = int(np.count_nonzero(found.p[quantity] < 0.05))
    ax = _draw_means(ax, found.mean[quantity], quantity, columns, found.units)
    ax.set_xlabel(f"first {'sequence' if calls is None else 'call'} of each stage")
    set_title(
        ax,
        found.site,
        f"change of the mean {QUANTITY_NAMES[quantity]} since the first stage",
        (
            "units by their last change",
            f"{moving} of {len(found.units)} moved (p < 0.05, corrected)",
        ),
    )
    return ax


def plot_checkpoints(
    means: Array, quantity: str, names: Sequence[str], units: Integers, site: str, ax: Axes | None
) -> Axes:
    """Draw how the mean of each unit differs from the first of several traces.

    Args:
        means: (K, H) the means.
        quantity: The quantity.
        names: (K,) names of the traces; of paths only the ends that differ are drawn.
        units: (H,) numbers of the units.
        site: Name of the site.
        ax: The axes to draw in.
    """
    ax = _draw_means(ax, means, quantity, _short_names(names), units)
    set_title(
        ax,
        site,
        f"change of the mean {QUANTITY_NAMES[quantity]} since the first of {len(names)} traces",
        ("units by their last change",),
    )
    return ax


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the file names of paths, or their numbers where these are equal."""
    short = [printable(PurePath(name).name, 16) for name in names]
    if len(set(short)) < len(short):
        return [str(number) for number in range(len(short))]
    return short


def _draw_means(
    ax: Axes | None, means: Array, quantity: str, columns: Sequence[str], units: Integers
) -> Axes:
    """Draw (K, H) means, less the first of each unit, the units that fell most at the top."""
    ax = make_axes(ax, 7.0, 5.5)
    change = means - means[0]
    order = np.argsort(np.nan_to_num(change[-1], nan=0.0), kind="stable")
    scale = change_scale(quantity, change)
    image = ax.imshow(
        np.ma.masked_invalid(change.T[order]), aspect="auto", interpolation="nearest",
        cmap=scale.map, vmin=scale.low, vmax=scale.high,
    )  # fmt: skip
    add_color_bar(ax, image, scale)
    every = max(1, -(-len(columns) // 12))
    ax.set_xticks(range(0, len(columns), every), columns[::every])
    for text in ax.get_xticklabels():
        plain(text)
    if len(order) <= 40:
        ax.set_yticks(range(len(order)), [str(unit) for unit in units[order]], fontsize=7)
        ax.set_ylabel("unit")
    else:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(order)} units")
    return ax
