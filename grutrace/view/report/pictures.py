"""Pictures in a page: SVG whose texts and axes take the colour of the page.

A page is light or dark, so black is replaced by `currentColor`. Pictures with very many points are
PNG on white.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grutrace.analysis.dynamics.lyapunov import Lyapunov
from grutrace.errors import GrutraceError
from grutrace.view.picture_files import picture_bytes
from grutrace.view.plots.axes import COLORS, GREY, printable, set_title, strip_spines

#: A colour that stands for that of the page's text. No picture uses it otherwise.
INK = "#010203"

#: An SVG above this size becomes a PNG. Bytes.
MAX_SVG = 120_000

#: Width and height, in inches.
SIZE = 6.6, 3.7


@dataclass(frozen=True)
class Picture:
    """A picture as markup.

    Attributes:
        markup: An ``svg`` or ``img`` element.
        alt: What it shows, in words.
    """

    markup: str
    alt: str

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return len(self.markup) + len(self.alt)


def draw(plot: Callable[[Axes], object], alt: str, height: float = SIZE[1]) -> Picture | None:
    """Draw a picture.

    Args:
        plot: Draws in axes.
        alt: What the picture shows, in words.
        height: Inches.

    Returns:
        The picture; None if there is nothing to draw.
    """
    alt = printable(alt, 300)
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inks, INK) | {
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "grutrace",
        "font.family": "sans-serif",
        "legend.labelcolor": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        try:
            plot(figure.subplots())
        except GrutraceError:
            return None
        svg = picture_bytes(figure, "svg").decode()
        if len(svg) > MAX_SVG:
            figure.set_facecolor("white")
            content = base64.b64encode(picture_bytes(figure, "png", 100)).decode()
            text = html.escape(alt, quote=True)
            return Picture(f'<img alt="{text}" src="data:image/png;base64,{content}">', alt)
    return Picture(_inline(svg, alt), alt)


def _inline(svg: str, alt: str) -> str:
    """Return an SVG document as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    # Ids of groups are the same in all pictures. Those that are referred to are hashes.
    svg = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", svg)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg[:600])[:2]
    start = svg.index(">") + 1
    label = html.escape(alt, quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[start:]
    )


def plot_exponents(found: Lyapunov, ax: Axes) -> None:
    """Draw Lyapunov exponents with twice their standard errors."""
    ax.axhline(0, color=GREY, linewidth=0.8)
    finite = np.isfinite(found.exponents)
    ax.errorbar(
        found.numbers[finite], found.exponents[finite], fmt="o", color=COLORS[0], markersize=4,
        yerr=2 * np.nan_to_num(found.errors[finite]), ecolor=GREY,
    )  # fmt: skip
    ax.set_xlabel("number of the exponent")
    ax.set_ylabel("nats a step")
    strip_spines(ax)
    set_title(ax, found.site, "Lyapunov exponents", ("bars: two standard errors",))
