"""`TokenStrip`: the tokens and labels below a picture, where stretches are marked.

Texts of a trace are drawn on a canvas, never as elements of the page.
"""

from __future__ import annotations

import zlib

from bokeh import models, palettes, plotting

from grutrace.view.live.engine.site_view import SiteView
from grutrace.view.live.picture import inner_size, prepare_ticks, set_ticks

#: Most labels that are shown, and pixels of a row of labels.
MAX_LABELS, LABEL_HEIGHT = 4, 22

#: Width of a character, and least width of a step whose token is written upwards. Pixels.
CHARACTER, MIN_STEP = 7.5, 11

#: Least height of the row of tokens, and space around tokens that are written upwards. Pixels.
TOKEN_HEIGHT, MARGIN = 26, 12

#: Pixels of what is not rows.
FRAME = 30


class TokenStrip:
    """Tokens and labels of the visible steps.

    Args:
        x_range: Visible positions, shared with the picture.

    Attributes:
        figure: The figure of bokeh.
    """

    def __init__(self, x_range: models.Range1d) -> None:
        columns = ("x", "y", "text", "angle", "colour")
        self._tokens = models.ColumnDataSource({name: [] for name in columns})
        self._labels = models.ColumnDataSource({name: [] for name in columns})
        self._y_range = models.Range1d(0, 1)
        self.figure = plotting.figure(
            x_range=x_range,
            y_range=self._y_range,
            height=FRAME + TOKEN_HEIGHT,
            sizing_mode="stretch_width",
            tools="xwheel_zoom",
            active_scroll="xwheel_zoom",
            toolbar_location=None,
            output_backend="canvas",
            min_border_left=64,
            name="tokens",
        )
        self.select = models.BoxSelectTool(dimensions="width", persistent=False)
        self.figure.add_tools(self.select)
        self.figure.toolbar.active_drag = self.select
        self.figure.grid.visible = False
        self.figure.xaxis.visible = False
        prepare_ticks(self.figure.yaxis[0])
        self.figure.yaxis.axis_line_color = None
        self.figure.outline_line_color = "#dddddd"
        self.figure.rect(
            "x", "y", 1, LABEL_HEIGHT - 2, fill_color="colour", line_color=None, source=self._labels
        )
        style = {"text_align": "center", "text_baseline": "middle", "text_font_size": "12px"}
        self.figure.text("x", "y", "text", source=self._labels, **style)
        self.figure.text("x", "y", "text", angle="angle", source=self._tokens, **style)
        self.mark = models.BoxAnnotation(
            left=0, right=0, fill_alpha=0.2, fill_color="#ff7f0e", line_color=None, visible=False
        )
        self.figure.add_layout(self.mark)

    def show(self, view: SiteView, start: int, stop: int) -> bool:
        """Show the tokens of a window; return whether it is narrow enough for texts."""
        step_width = inner_size(self.figure)[0] / max(1, stop - start)
        fits = step_width >= MIN_STEP
        texts = view.texts(start, stop) if fits else None
        names = list(texts.labels)[:MAX_LABELS] if texts else []
        tokens = (texts.tokens if texts else None) or []
        if texts and not tokens:
            tokens = [str(view.axis.locate(position)[1]) for position in range(start, stop)]
        longest = max(map(len, tokens), default=0)
        upward = longest * CHARACTER > step_width
        token_height = TOKEN_HEIGHT
        if upward:
            token_height = max(token_height, int(longest * CHARACTER) + MARGIN)
        height = token_height + LABEL_HEIGHT * len(names)
        self._y_range.update(start=-height, end=0)
        self.figure.height = FRAME + height
        xs = [position + 0.5 for position in range(start, start + len(tokens))]
        columns: dict[str, list[object]] = {
            "x": list(xs),
            "y": [-token_height / 2] * len(xs),
            "text": list(tokens),
            "angle": [1.5707963 if upward else 0.0] * len(xs),
            "colour": [""] * len(xs),
        }
        _set_cells(self._tokens, columns)
        self._show_labels(texts.labels if texts else {}, names, xs, token_height, step_width)
        word = "token" if texts and texts.tokens else "step"
        rows = {-token_height / 2: word if texts else ""}
        rows |= {
            -(token_height + LABEL_HEIGHT * (row + 0.5)): name[:9] for row, name in enumerate(names)
        }
        set_ticks(self.figure.yaxis[0], rows)
        return fits

    def _show_labels(
        self,
        labels: dict[str, list[str]],
        names: list[str],
        xs: list[float],
        top: float,
        step_width: float,
    ) -> None:
        columns: dict[str, list[object]] = {"x": [], "y": [], "text": [], "angle": [], "colour": []}
        for row, name in enumerate(names):
            for x, value in zip(xs, labels[name], strict=True):
                if not value:
                    continue
                columns["x"].append(x)
                columns["y"].append(-(top + LABEL_HEIGHT * (row + 0.5)))
                room = int(step_width / CHARACTER)
                columns["text"].append(value if len(value) <= room else value[: max(1, room)])
                columns["colour"].append(label_colour(value))
        columns["angle"] = [0.0] * len(columns["x"])
        _set_cells(self._labels, columns)


def _set_cells(source: models.ColumnDataSource, columns: dict[str, list[object]]) -> None:
    """Set cells. bokeh would send no cells after no cells again, and the page draw them."""
    if columns["x"] or len(source.data["x"]):
        source.data = columns


def label_colour(value: str) -> str:
    """Return the colour of a label: a value has the same colour everywhere."""
    light = palettes.Category20_20[1::2]
    return str(light[zlib.crc32(value.encode()) % len(light)])
