"""Trajectories of the hidden state in its principal components, with fixed points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from grutrace.analysis.descriptive.geometry import Geometry
from grutrace.analysis.dynamics.fixed_points import FixedPoints
from grutrace.errors import NotRecordedError, OptionError
from grutrace.records import Array
from grutrace.storage.read.annotations import encode_labels
from grutrace.storage.read.site import SiteTrace
from grutrace.view.plots.axes import (
    COLORS,
    GREY,
    make_axes,
    plain,
    printable,
    set_title,
    strip_spines,
)

#: Number of sequences that are drawn by default.
DEFAULT_SEQUENCES = 8

#: Kinds of points: label, marker, whether it is filled.
POINT_KINDS = (("stable", "o", True), ("unstable", "o", False), ("slow", "X", True))


def plot_trajectories(
    site: SiteTrace,
    geometry: Geometry,
    points: FixedPoints | None = None,
    sequences: Sequence[int] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the states of some sequences in the first two principal components.

    Args:
        site: The site.
        geometry: The principal components of its states.
        points: Fixed points to draw.
        sequences: Numbers of the sequences; None for the first ones.
        label: A label, or tokens, whose values colour the states.
        ax: The axes to draw in.

    Raises:
        OptionError: The components are of other units, or there are fewer than two.
        NotRecordedError: There is no sequence with the label.
    """
    if len(geometry.components) < 2 or not np.isfinite(geometry.share[:2]).all():
        raise OptionError(f"{site.name!r}: expected states that vary in at least two units")
    numbers = list(range(min(DEFAULT_SEQUENCES, len(site)))) if sequences is None else sequences
    ax = make_axes(ax, 7.0, 5.5)
    paths, labels = [], []
    for number, color in zip(numbers, cycle(COLORS), strict=False):
        sequence = site.sequence(number)
        start = sequence.initial[np.newaxis]
        states = [sequence.hidden, start] if site.site.reverse else [start, sequence.hidden]
        path = geometry.project(np.concatenate(states))
        if label is None:
            ax.plot(*path.T, "-", color=color, linewidth=1, alpha=0.8, label=f"sequence {number}")
            ax.plot(*path[1:].T, ".", color=color, markersize=4, alpha=0.8)
        else:
            ax.plot(*path.T, "-", color=GREY, linewidth=0.6, alpha=0.5, zorder=1)
            values = {"tokens": sequence.tokens, **sequence.labels}.get(label)
            labels += [None] * len(sequence) if values is None else list(values)
            paths.append(geometry.project(sequence.hidden))
        begin, end = (path[-1], path[0]) if site.site.reverse else (path[0], path[-1])
        ax.plot(*begin, "s", color=GREY, markersize=4, zorder=3)
        ax.plot(*end, "s", color=GREY if label else color, markersize=7, zorder=3, fillstyle="none")
    if label is not None:
        _color_by_label(ax, site, label, np.concatenate(paths), labels)
    _draw_points(ax, geometry, points)
    for axis, share, name in ((ax.xaxis, geometry.share[0], 1), (ax.yaxis, geometry.share[1], 2)):
        axis.set_label_text(f"principal component {name} ({share:.0%} of the variance)")
    strip_spines(ax)
    legend = ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        plain(text)
    point_text = ""
    if points is not None:
        slow = len(points.points) - points.fixed_points
        point_text = (
            f"{points.fixed_points} fixed points, {points.stable_points} of them stable, "
            f"{slow} slow points"
        )
    set_title(
        ax,
        site.name,
        f"hidden states of {len(numbers)} sequences",
        ("squares: first states (filled) and last", point_text),
    )
    return ax


def _color_by_label(
    ax: Axes, site: SiteTrace, label: str, states: Array, labels: Sequence[str | float | None]
) -> None:
    """Draw the states in the colours of their labels; the rarest values share one colour."""
    column = encode_labels(label, labels)
    if not len(column.values):
        raise NotRecordedError(
            f"these sequences of {site.name!r} have no label {label!r}; "
            f"there are: {', '.join(site.label_names) or 'none'}"
        )
    codes = column.codes
    counts = np.bincount(codes[codes >= 0], minlength=len(column.values))
    shown = np.argsort(-counts, kind="stable")[: len(COLORS) - 1]
    for code, color in zip(np.sort(shown).tolist(), COLORS, strict=False):
        _scatter(ax, states[codes == code], 16, color=color, label=printable(column.values[code]))
    rest = ~np.isin(codes, shown)
    if rest.any():
        ax.scatter(
            states[rest, 0], states[rest, 1], s=10, color=COLORS[-1], label="others", zorder=2
        )


def _draw_points(ax: Axes, geometry: Geometry, points: FixedPoints | None) -> None:
    """Draw stable and unstable fixed points, and slow points."""
    if points is None:
        return
    if points.states.shape[1] != len(geometry.mean):
        raise OptionError(
            f"points: expected states of {len(geometry.mean)} units, found {points.states.shape[1]}"
        )
    where = geometry.project(points.states)
    kinds = (points.fixed & points.stable, points.fixed & ~points.stable, ~points.fixed)
    for chosen, (name, marker, filled) in zip(kinds, POINT_KINDS, strict=True):
        if chosen.any():
            _scatter(
                ax, where[chosen], 70, marker=marker, edgecolors="0.1", linewidths=1.6, zorder=4,
                facecolors="#f2d13c" if filled else "none",
                label=f"{name} {'' if name == 'slow' else 'fixed '}point",
            )  # fmt: skip


def _scatter(ax: Axes, points: Array, size: float, zorder: float = 2, **style: Any) -> None:
    """Draw points, (n, 2)."""
    ax.scatter(points[:, 0], points[:, 1], s=size, zorder=zorder, **style)
