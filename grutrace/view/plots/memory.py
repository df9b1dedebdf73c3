"""What each past step wrote into a state, and into every state of a sequence."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.memory.decomposition import Decomposition, MemoryMap
from grutrace.records import Array
from grutrace.storage.read.site import SiteTrace
from grutrace.view.plots.axes import (
    COLORS,
    GREY,
    label_steps,
    make_axes,
    plain,
    set_title,
    step_texts,
    strip_spines,
)
from grutrace.view.plots.colors import ColorScale, add_color_bar, largest_magnitude

#: Largest number of states that each have their token at the side.
MAX_STATES = 48


def plot_decomposition(site: SiteTrace, found: Decomposition, ax: Axes | None = None) -> Axes:
    """Draw the share of each past step in one state.

    Args:
        site: The site, for tokens and labels.
        found: The decomposition of a state of it.
        ax: The axes to draw in.
    """
    ax = make_axes(ax, width=min(14.0, max(6.0, 3 + 0.45 * len(found.steps))))
    steps = found.steps
    ax.bar(steps, found.share, color=COLORS[0], width=0.85)
    before = steps[-1] + 1 if site.site.reverse else steps[0] - 1
    ax.bar([before], [found.before_share], color=COLORS[1], width=0.85)
    ax.axhline(0, color=GREY, linewidth=0.7)
    texts = step_texts(site.sequence(found.sequence), None, int(steps[0]), int(steps[-1]) + 1)
    label_steps(ax, steps, texts)
    ax.set_ylabel(f"share of the state after step {found.step}")
    strip_spines(ax)
    set_title(
        ax,
        found.site,
        f"what wrote the state after step {found.step} of sequence {found.sequence}",
        (f"shares of {len(found.units)} units together; orange: the state before these steps",),
    )
    return ax


def plot_memory_map(site: SiteTrace, found: MemoryMap, ax: Axes | None = None) -> Axes:
    """Draw the share of each past step in every state of a sequence.

    Args:
        site: The site, for tokens and labels.
        found: The memory map of a sequence of it.
        ax: The axes to draw in.
    """
    ax = make_axes(ax, 7.0, 6.2)
    reverse = site.site.reverse
    sequence = site.sequence(found.sequence)
    values, first_written = _by_step(found, len(sequence), reverse)
    columns = np.arange(first_written, first_written + values.shape[1])
    first, last = int(found.steps[0]), int(found.steps[-1])
    limit = largest_magnitude(values)
    ticks = {-limit: f"{-limit:.2g}", 0.0: "0", limit: f"{limit:.2g}"}
    scale = ColorScale("RdBu_r", -limit, limit, "share of the state", ticks)
    image = ax.imshow(
        np.ma.masked_invalid(values), cmap=scale.map, vmin=-limit, vmax=limit, aspect="auto",
        interpolation="nearest",
        extent=(columns[0] - 0.5, columns[-1] + 0.5, last + 0.5, first - 0.5),
    )  # fmt: skip
    image.set_cmap(scale.map.with_extremes(bad="none"))
    add_color_bar(ax, image, scale)
    label_steps(ax, columns, step_texts(sequence, None, columns[0], columns[-1] + 1), "written at")
    tokens = step_texts(sequence, [], first, last + 1)
    if tokens and len(found.steps) <= MAX_STATES:
        ax.set_yticks(found.steps, tokens[0])
        for text in ax.get_yticklabels():
            plain(text)
    ax.set_ylabel("state after")
    before = float(np.nanmax(np.abs(found.before_share), initial=0.0))
    set_title(
        ax,
        found.site,
        f"what wrote each state of sequence {found.sequence}",
        (f"rows add up to 1 with the state before these steps (at most {before:.2g})",),
    )
    return ax


def _by_step(found: MemoryMap, length: int, reverse: bool) -> tuple[Array, int]:
    """Return the share of each step in each state, (states, steps), and the first of these steps.

    NaN where the step comes after the state.
    """
    lags = found.lags[np.newaxis, :]
    written = found.steps[:, np.newaxis] + (lags if reverse else -lags)
    exists = (written >= 0) & (written < length)
    first, last = int(written[exists].min()), int(written[exists].max())
    values = np.full((len(found.steps), last - first + 1), np.nan)
    rows = np.broadcast_to(np.arange(len(values))[:, np.newaxis], written.shape)
    values[rows[exists], written[exists] - first] = found.share[exists]
    return values, first
