"""A quantity of some units of one sequence as lines over steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from grutrace.storage.read.site import SiteTrace
from grutrace.view.plots.axes import (
    COLORS,
    GREY,
    LINE_STYLES,
    label_steps,
    make_axes,
    set_title,
    step_texts,
    strip_spines,
)
from grutrace.view.plots.colors import color_scale
from grutrace.view.plots.windows import as_columns, read_window, step_window

#: Number of units that are drawn by default.
DEFAULT_UNITS = 6


def plot_lines(
    site: SiteTrace,
    quantity: str = "hidden",
    sequence: int = 0,
    *,
    steps: slice | None = None,
    units: Sequence[int] | slice | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw lines; see `SitePlots.lines`."""
    shown = site.sequence(sequence)
    window = step_window(steps, len(shown), shown)
    every = read_window(site, shown.number, quantity, window)
    is_input = quantity == "input"
    columns = np.arange(every.shape[1]) if is_input else as_columns(site, units)
    text = ""
    if (units is None or is_input) and len(columns) > DEFAULT_UNITS:
        spread = np.nan_to_num(every.astype(np.float64).std(axis=0), nan=0.0)
        columns = np.argsort(-spread, kind="stable")[:DEFAULT_UNITS]
        text = f"the {DEFAULT_UNITS} of {every.shape[1]} that vary most in these steps"
    ax = make_axes(ax, width=min(14.0, max(7.0, 3 + 0.4 * len(every))), height=4.0)
    positions = np.arange(window.start, window.stop)
    scale = color_scale(quantity, every[:, columns])
    for number, (column, color) in enumerate(zip(columns.tolist(), cycle(COLORS), strict=False)):
        unit = column if is_input or site.units is None else site.units[column]
        style = LINE_STYLES[(number // len(COLORS) + number) % len(LINE_STYLES)]
        marker = "o" if len(positions) <= 40 else None
        ax.plot(
            positions, every[:, column], style, color=color, marker=marker, markersize=3.5,
            label=f"{'feature' if is_input else 'unit'} {unit}",
        )  # fmt: skip
    if scale.low < 0:
        ax.axhline(0, color=GREY, linewidth=0.7, zorder=0)
    margin = 0.04 * (scale.high - scale.low)
    ax.set_ylim(scale.low - margin, scale.high + margin)
    if quantity in ("update", "reset"):
        ax.set_yticks(list(scale.ticks), list(scale.ticks.values()))
    ax.set_ylabel(scale.label)
    label_steps(ax, positions, step_texts(shown, labels, window.start, window.stop))
    strip_spines(ax)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(ax, site.name, f"{scale.label}, sequence {shown.number}", (text,))
    return ax
