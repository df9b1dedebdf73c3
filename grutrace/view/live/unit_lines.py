"""`UnitLines`: the values of some units over the visible steps, with the threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh import models, palettes, plotting

from grutrace.view.live.engine.site_view import SiteView

#: Most units whose lines are drawn, and most steps.
MAX_UNITS, MAX_STEPS = 24, 2000


class UnitLines:
    """Lines of units below the tokens.

    Args:
        x_range: Visible positions, shared with the picture.

    Attributes:
        figure: The figure of bokeh.
    """

    def __init__(self, x_range: models.Range1d) -> None:
        self._source = models.ColumnDataSource({"xs": [], "ys": [], "colour": []})
        self._y_range = models.Range1d(0, 1)
        self.figure = plotting.figure(
            x_range=x_range,
            y_range=self._y_range,
            height=130,
            sizing_mode="stretch_width",
            tools="xpan,xwheel_zoom",
            active_scroll="xwheel_zoom",
            toolbar_location=None,
            output_backend="canvas",
            min_border_left=64,
            visible=False,
            name="lines",
        )
        self.figure.xaxis.visible = False
        self.figure.xgrid.visible = False
        self.figure.yaxis.axis_label = "value"
        self.figure.multi_line(
            "xs", "ys", line_color="colour", line_width=1.5, line_alpha=0.85, source=self._source
        )
        self._threshold = models.Span(dimension="width", line_color="#444444", line_dash="dashed")
        self.figure.add_layout(self._threshold)
        self.mark = models.BoxAnnotation(
            left=0, right=0, fill_alpha=0.12, fill_color="#ff7f0e", line_color=None, visible=False
        )
        self.figure.add_layout(self.mark)

    def show(
        self, view: SiteView, start: int, stop: int, units: Sequence[int], threshold: float
    ) -> None:
        """Show some units over a window, if it is narrow enough; otherwise hide the figure."""
        self._threshold.location = threshold
        low, high = view.limits
        margin = 0.05 * (high - low)
        self._y_range.update(start=low - margin, end=high + margin)
        units = list(units[:MAX_UNITS])
        is_visible = bool(units) and 0 < stop - start <= MAX_STEPS
        if is_visible:
            values = view.values(start, stop, units)
            xs = np.arange(start, stop) + 0.5
            bounds = view.axis.bounds
            # A line ends with its sequence.
            inner = bounds[(bounds > start) & (bounds < stop)] - start
            parts = np.split(np.arange(stop - start), inner)
            self._source.data = {
                "xs": [xs[part] for _ in units for part in parts],
                "ys": [values[part, column] for column in range(len(units)) for part in parts],
                "colour": [
                    palettes.Colorblind8[column % len(palettes.Colorblind8)]
                    for column in range(len(units))
                    for _ in parts
                ],
            }
        self.figure.visible = is_visible
