"""Axes to draw in: new ones, their titles, and the tokens and labels of steps beneath them.

Texts of a trace are drawn as they are: no text is read as a formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from grutrace.errors import NotRecordedError, join_names, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence import Sequence as TraceSequence

#: Colours of lines and points. They differ for colour-blind people, in grey, and on white and black
#: alike (after Okabe and Ito 2008, "Color universal design").
COLORS = ("#3a87c8", "#e07b1f", "#1fa187", "#c45ba0", "#8c7a2e", "#7d7d7d")

#: Line styles, so that lines differ in print without colours too.
LINE_STYLES = ("-", "--", "-.", ":")

#: Grey of lines that are not data.
GREY = "0.55"

#: Longest token or label that is drawn whole, in characters.
MAX_TEXT = 14

#: Longest name in a title, in characters.
MAX_NAME = 60

#: Largest number of steps that all have their token beneath.
MAX_TICKS = 48


def make_axes(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    """Return the given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    _, new = pyplot.subplots(figsize=(width, height), layout="constrained")
    return new


def figure_of(ax: Axes) -> Figure:
    """Return the figure that the axes are part of."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def plain(text: Text) -> Text:
    """Draw a text as it is, not as a formula."""
    text.set_parse_math(False)
    return text


def printable(value: object, longest: int = MAX_TEXT) -> str:
    """Return a value of a trace as a short printable text."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = "".join(
            character if character.isprintable() else repr(character)[1:-1]
            for character in str(value)[: 4 * longest]
        )
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def set_title(ax: Axes, site: str, what: str, details: Iterable[str] = ()) -> None:
    """Set the title: the site and what is drawn, then a line of details.

    Args:
        ax: The axes.
        site: Name of the site.
        what: What is drawn.
        details: How it is sorted, chosen or averaged; empty texts are left out.
    """
    second = "; ".join(detail for detail in details if detail)
    title = f"{printable(site, MAX_NAME)}: {what}" + (f"\n{second}" if second else "")
    plain(ax.set_title(title, fontsize="medium"))


def strip_spines(ax: Axes) -> None:
    """Remove the upper and the right border."""
    ax.spines[["top", "right"]].set_visible(False)


def step_texts(
    sequence: TraceSequence, labels: Sequence[str] | None, start: int, stop: int
) -> list[list[str]]:
    """Return the texts beneath the steps: a list of the tokens, then one for each label.

    Args:
        sequence: The sequence.
        labels: Names of the labels; None for all.
        start: The first step.
        stop: The step after the last.

    Raises:
        NotRecordedError: The sequence has no label of this name.
    """
    rows: list[Any] = []
    tokens = sequence.tokens
    if tokens is not None:
        rows.append(tokens)
    recorded = sequence.labels
    for name in recorded if labels is None else labels:
        if name not in recorded:
            raise NotRecordedError(
                f"sequence {sequence.number} of {sequence.site.name!r} has no label "
                f"{short_repr(name)}; it has {join_names(recorded)}"
            )
        rows.append(recorded[name])
    return [
        ["" if _is_missing(value) else printable(value) for value in list(row[start:stop])]
        for row in rows
    ]


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and bool(np.isnan(value)))


def label_steps(ax: Axes, steps: Array, texts: Sequence[Sequence[str]], names: str = "") -> None:
    """Write tokens and labels beneath the steps, every k-th if they are many.

    Args:
        ax: The axes, with the steps along x.
        steps: (T,) the position of each step.
        texts: The rows of texts of `step_texts`. Without any, matplotlib chooses the ticks.
        names: The label of the axis.
    """
    ax.set_xlabel(names or "step")
    if not texts or not len(steps):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    every = -(-len(steps) // MAX_TICKS)
    longest = max(len(text) for row in texts for text in row)
    upright = longest > 3 and min(len(steps), MAX_TICKS) * longest > 80
    join = " · " if upright else "\n"
    ticks = [join.join(column) for column in zip(*(row[::every] for row in texts), strict=True)]
    size = 8 if len(steps) > 16 or upright else 11
    ax.set_xticks(steps[::every], ticks, rotation=90 if upright else 0, fontsize=size)
    for tick in ax.get_xticklabels():
        plain(tick)
    ax.tick_params(axis="x", length=0 if every == 1 else 3)


#: Largest number of points that have their unit beside them.
MAX_NUMBERED_POINTS = 12


def number_points(ax: Axes, units: Array, x: Array, y: Array) -> None:
    """Write the numbers of units beside their points, of the first ones if they are many."""
    for unit, across, up in list(zip(units, x, y, strict=True))[:MAX_NUMBERED_POINTS]:
        if np.isfinite([across, up]).all():
            ax.annotate(
                str(unit), (across, up), xytext=(4, 3), textcoords="offset points", fontsize=7
            )
