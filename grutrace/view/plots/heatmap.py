"""A quantity of one sequence as a heatmap: units along y, steps along x, tokens beneath.

T steps, H units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from grutrace.records import Array
from grutrace.storage.read.site import SiteTrace
from grutrace.view.plots.axes import label_steps, make_axes, set_title, step_texts
from grutrace.view.plots.colors import add_color_bar, color_scale
from grutrace.view.plots.unit_order import UnitOrder, order_units
from grutrace.view.plots.windows import as_columns, read_window, step_window

#: Largest number of columns of pixels. Longer sequences are averaged.
MAX_COLUMNS = 2000

#: Largest number of units that each have their number at the side.
MAX_NUMBERED = 40


def plot_heatmap(
    site: SiteTrace,
    quantity: str = "update",
    sequence: int = 0,
    *,
    steps: slice | None = None,
    units: Sequence[int] | slice | None = None,
    order: str = "similarity",
    label: str | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a heatmap; see `SitePlots.heatmap`."""
    shown = site.sequence(sequence)
    window = step_window(steps, len(shown), shown)
    values = read_window(site, shown.number, quantity, window)
    is_input = quantity == "input"
    if is_input:
        name, numbers = "feature", np.arange(values.shape[1])
        sorted_units = UnitOrder(numbers, "features by number")
    else:
        name, columns = "unit", as_columns(site, units)
        values, update = values[:, columns], None
        if "update" in site.site.available_quantities:
            update = read_window(site, shown.number, "update", window)[:, columns]
        sorted_units = order_units(site, quantity, columns, values, update, order, label)
        numbers = columns if site.units is None else np.array(site.units)[columns]
    values = values[:, sorted_units.positions]

    ax = make_axes(ax, width=min(14.0, max(7.0, 3 + 0.55 * len(values))), height=5.5)
    averaged, size = _averaged(values)
    scale = color_scale(quantity, averaged)
    image = ax.imshow(
        np.ma.masked_invalid(averaged.T),
        aspect="auto",
        interpolation="nearest",
        cmap=scale.map,
        vmin=scale.low,
        vmax=scale.high,
        extent=(window.start - 0.5, window.stop - 0.5, values.shape[1] - 0.5, -0.5),
    )
    add_color_bar(ax, image, scale)
    texts = step_texts(shown, labels, window.start, window.stop)
    label_steps(ax, np.arange(window.start, window.stop), texts)
    _number_units(ax, numbers[sorted_units.positions], name)
    missing = int(np.count_nonzero(~np.isfinite(values)))
    set_title(
        ax,
        site.name,
        f"{scale.label}, sequence {shown.number}",
        (
            sorted_units.text,
            f"each column the mean of {size} steps" if size > 1 else "",
            f"{missing} values are not finite" if missing else "",
        ),
    )
    return ax


def _averaged(values: Array) -> tuple[Array, int]:
    """Average (T, H) over steps, until at most `MAX_COLUMNS` are left; return how many a column."""
    size = max(1, -(-len(values) // MAX_COLUMNS))
    if size == 1:
        return values, 1
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))[:, np.newaxis]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.add.reduceat(values, starts, axis=0, dtype=np.float64) / counts, size


def _number_units(ax: Axes, numbers: Array, name: str) -> None:
    """Write the numbers of the units at the side, unless there are many."""
    if len(numbers) <= MAX_NUMBERED:
        ax.set_yticks(range(len(numbers)), [str(number) for number in numbers], fontsize=7)
        ax.set_ylabel(name)
    else:
        ax.set_yticks([])
        ax.set_ylabel(f"{len(numbers)} {name}s")
