"""`Picture`: the heatmap of a window of a site, with its ticks."""

from __future__ import annotations

import numpy as np
from bokeh import models, palettes, plotting
from bokeh.core.property.descriptors import UnsetValueError

from grutrace.view.live.engine.site_view import SiteView
from grutrace.view.live.engine.step_axis import StepAxis
from grutrace.view.live.engine.window import Span, Statistic, Window

#: Colours of values of both signs: blue below zero, red above.
DIVERGING = (
    *("#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7"),
    *("#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"),
)

#: Pixels without a finite value.
MISSING = "#bdbdbd"

#: What the ends of the scale of a quantity mean.
MEANINGS = {
    "update": "update gate z: 0 overwrites, 1 keeps",
    "reset": "reset gate r: 0 ignores the previous state, 1 uses it",
    "candidate": "candidate n",
    "hidden": "hidden state h",
}

#: Largest size of a picture. Pixels.
MAX_WIDTH, MAX_HEIGHT = 1400, 320

#: Width of a figure before the browser has told it. Pixels.
UNKNOWN_WIDTH = 1000

#: Most boundaries between sequences that are drawn.
MAX_BOUNDARIES = 60

#: Pixels of a tick with its text, and below the frame of a figure. Without a least height there the
#: frame grows while no tick is in view, and every moved window would be laid out and read twice.
TICK_WIDTH, BELOW = 90, 34


class Picture:
    """The heatmap of one run.

    Args:
        x_range: Visible positions.
        y_range: Visible places in the order of the units.
        name: Name of the figure in the document.

    Attributes:
        figure: The figure of bokeh.
        window: The window that is shown; None before the first.
    """

    def __init__(self, x_range: models.Range1d, y_range: models.Range1d, name: str) -> None:
        self._source = models.ColumnDataSource({"image": [], "x": [], "y": [], "dw": [], "dh": []})
        self._boundaries = models.ColumnDataSource({"x": []})
        self._mapper = models.LinearColorMapper(
            palettes.Cividis256, low=0, high=1, nan_color=MISSING
        )
        self.figure = plotting.figure(
            x_range=x_range,
            y_range=y_range,
            height=340,
            sizing_mode="stretch_width",
            tools="xpan,xwheel_zoom,ywheel_zoom,box_zoom,reset",
            active_drag="xpan",
            active_scroll="xwheel_zoom",
            toolbar_location="right",
            output_backend="canvas",
            min_border_left=64,
            min_border_bottom=BELOW,
            name=name,
        )
        self.figure.toolbar.logo = None
        self.figure.grid.visible = False
        self.figure.yaxis.axis_label = "unit"
        self.figure.image(
            "image", "x", "y", "dw", "dh", color_mapper=self._mapper, source=self._source
        )
        self.figure.vspan("x", source=self._boundaries, line_color="#ffffff", line_width=1)
        self.mark = models.BoxAnnotation(
            left=0,
            right=0,
            fill_alpha=0.12,
            fill_color="#ff7f0e",
            line_color="#ff7f0e",
            line_width=2,
            visible=False,
        )
        self.figure.add_layout(self.mark)
        self._bar = models.ColorBar(color_mapper=self._mapper, width=10, padding=4, title="")
        self.figure.add_layout(self._bar, "right")
        prepare_ticks(self.figure.xaxis[0])
        prepare_ticks(self.figure.yaxis[0])
        self.window: Window | None = None
        self._statistic: Statistic = "mean"
        self._offset = 0
        self._view: SiteView | None = None

    def show(
        self, view: SiteView, span: Span, statistic: Statistic, seconds: float, offset: int = 0
    ) -> None:
        """Show a window: what can be read of it in this time. `refine` goes on.

        Args:
            view: The quantity.
            span: The window, on the axis of the view.
            statistic: What a pixel shows of several values.
            seconds: Time for reading.
            offset: Added to positions of the view to get those of the page.
        """
        width, height = inner_size(self.figure)
        self.window = Window(
            view.rows,
            view.axis,
            span,
            width=min(width, MAX_WIDTH),
            height=min(height, MAX_HEIGHT),
            order=view.order,
        )
        self.window.advance(seconds)
        if view is not self._view:
            self._set_scale(view)
            self._view = view
        self._statistic, self._offset = statistic, offset
        self.draw()
        self._draw_ticks(view)

    def refine(self, seconds: float) -> bool:
        """Read more of the window, without drawing; return whether there was more to read."""
        if self.window is None or self.window.complete:
            return False
        self.window.advance(seconds)
        return True

    def set_title(self, title: str) -> None:
        """Show a title above the picture; none if it is empty."""
        self.figure.title.update(text=title.replace("$$", "$ $"), visible=bool(title))

    def set_statistic(self, statistic: Statistic) -> None:
        """Show another statistic of what is read."""
        self._statistic = statistic
        self.draw()

    def _set_scale(self, view: SiteView) -> None:
        low, high = view.limits
        palette = palettes.interp_palette(DIVERGING, 255) if low < 0 else palettes.Cividis256
        self._mapper.update(low=low, high=high, palette=palette)
        self._bar.title = MEANINGS.get(view.quantity, view.quantity)

    def draw(self) -> None:
        """Draw what is read of the window."""
        window = self.window
        if window is None:
            return
        span, image = window.span, window.image(self._statistic)
        columns = {
            "image": image,
            "x": span.start + self._offset,
            "y": span.first,
            "dw": span.stop - span.start,
            "dh": span.last - span.first,
        }
        self._source.data = {name: [value] if image.size else [] for name, value in columns.items()}

    def _draw_ticks(self, view: SiteView) -> None:
        assert self.window is not None
        span = self.window.span
        first, last = view.axis.places_between(span.start, span.stop)
        inner = view.axis.bounds[first + 1 : last]
        shown = inner if len(inner) <= MAX_BOUNDARIES else inner[:0]
        if len(shown) or len(self._boundaries.data["x"]):
            self._boundaries.data = {"x": shown + self._offset}
        labels = step_ticks(view.axis, span.start, span.stop, inner_size(self.figure)[0])
        set_ticks(self.figure.xaxis[0], {x + self._offset: text for x, text in labels.items()})
        places = np.unique(np.linspace(span.first, max(span.first, span.last - 1), 9).astype(int))
        units = {
            float(place) + 0.5: str(view.unit_name(place)) for place in places if place < view.units
        }
        set_ticks(self.figure.yaxis[0], units)


def inner_size(shown: plotting.figure) -> tuple[int, int]:
    """Return the width and height inside the frame of a figure, which the browser tells."""
    try:
        return int(shown.inner_width), int(shown.inner_height)
    except UnsetValueError:
        return UNKNOWN_WIDTH, MAX_HEIGHT


def prepare_ticks(axis: models.Axis) -> None:
    """Prepare an axis for `set_ticks`: new models later would cost much more."""
    axis.ticker = models.FixedTicker(ticks=[])
    # A formatter gets texts as data: they are never read as markup.
    axis.formatter = models.CustomJSTickFormatter(
        args={"places": [], "texts": []}, code="return texts[places.indexOf(tick)] ?? ''"
    )


def set_ticks(axis: models.Axis, labels: dict[float, str]) -> None:
    """Set the ticks of an axis and their texts, which are shown as they are."""
    axis.formatter.args = {"places": list(labels), "texts": list(labels.values())}
    axis.ticker.ticks = list(labels)


def step_ticks(axis: StepAxis, start: int, stop: int, width: int) -> dict[float, str]:
    """Return ticks for a window of steps: sequences if many are visible, otherwise their steps."""
    first, last = axis.places_between(start, stop)
    if not last - first:
        return {}
    most = max(2, width // TICK_WIDTH)
    if last - first > 3:
        places = np.unique(np.linspace(first, last - 1, most).astype(int)).tolist()
        return {
            float(max(start, axis.bounds[place])): f"seq {axis.sequences[place]}"
            for place in places
        }
    ticks: dict[float, str] = {}
    stride = _stride((stop - start) / most)
    for place in range(first, last):
        low, high = axis.bounds[place : place + 2].tolist()
        begin = max(start, low) - low
        for step in range(-(-begin // stride) * stride, min(stop, high) - low, stride):
            text = f"seq {axis.sequences[place]}" if step == 0 else str(step)
            ticks[low + step + 0.5] = text
    return ticks


def _stride(steps: float) -> int:
    """Return the least of 1, 2, 5, 10, 20, ... that is at least this number."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= steps:
                return factor * power
        power *= 10
