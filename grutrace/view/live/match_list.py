"""`MatchList`: matches of a search, each with its tokens in context and its labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh import models, palettes, plotting

from grutrace.view.live.engine.search import Match
from grutrace.view.live.engine.site_view import SiteView, StepTexts
from grutrace.view.live.engine.stretches import Condition
from grutrace.view.live.picture import prepare_ticks, set_ticks

#: Matches that are shown, steps of context on each side, and most steps of a match that are shown.
SHOWN, CONTEXT, MAX_STEPS = 15, 6, 30

#: Pixels of a match: its tokens, and its labels below them. Pixels of the rest of the figure.
ROW_HEIGHT, FRAME = 44, 20

#: Most characters of a token.
MAX_TOKEN = 7


class MatchList:
    """The best matches, a row each.

    Attributes:
        figure: The figure of bokeh.
        matches: The matches that are shown.
    """

    def __init__(self) -> None:
        columns = ("x", "y", "share", "token", "label", "colour", "edge")
        self._cells = models.ColumnDataSource({name: [] for name in columns})
        self._x_range, self._y_range = models.Range1d(0, 1), models.Range1d(0, 1)
        self.figure = plotting.figure(
            x_range=self._x_range,
            y_range=self._y_range,
            height=FRAME,
            sizing_mode="stretch_width",
            tools="tap",
            toolbar_location=None,
            output_backend="canvas",
            frame_align=False,
            min_border_left=150,
            visible=False,
            name="matches",
        )
        self.figure.grid.visible = False
        self.figure.xaxis.visible = False
        prepare_ticks(self.figure.yaxis[0])
        self.figure.yaxis.axis_line_color = None
        self.figure.yaxis.major_tick_line_color = None
        self.figure.yaxis.major_label_text_align = "left"
        self.figure.outline_line_color = None
        # Light to dark: the share of the units that are on.
        mapper = models.LinearColorMapper(palettes.Blues256[::-1][:180], low=0, high=1)
        self.figure.rect(
            "x",
            "y",
            1,
            0.86,
            fill_color={"field": "share", "transform": mapper},
            line_color="edge",
            line_width=1,
            source=self._cells,
            nonselection_fill_alpha=1,
            nonselection_line_alpha=1,
        )
        style = {"text_align": "center", "text_baseline": "middle", "source": self._cells}
        for column, size, offset in (("token", "12px", -7), ("label", "10px", 10)):
            self.figure.text(
                "x",
                "y",
                column,
                text_font_size=size,
                text_color="colour",
                y_offset=offset,
                nonselection_text_alpha=1,
                **style,
            )
        self.matches: list[Match] = []

    def show(
        self, view: SiteView, matches: Sequence[Match], units: Sequence[int], condition: Condition
    ) -> None:
        """Show these matches, the first at the top.

        Args:
            view: The quantity.
            matches: The matches.
            units: The units of the search.
            condition: When a unit is on.
        """
        self.matches = list(matches[:SHOWN])
        columns: dict[str, list[object]] = {name: [] for name in self._cells.data}
        rows: dict[float, str] = {}
        for row, match in enumerate(self.matches):
            rows[-row - 0.5] = _title(row, match, len(units))
            self._add_row(columns, row, view, match, units, condition)
        width = max((float(x) for x in columns["x"]), default=0.5)  # type: ignore[arg-type]
        self._x_range.update(start=0, end=max(width + 0.5, 2 * CONTEXT + 4))
        self._y_range.update(start=-max(1, len(self.matches)), end=0)
        self.figure.height = FRAME + ROW_HEIGHT * len(self.matches)
        self.figure.visible = bool(self.matches)
        self._cells.data = columns
        set_ticks(self.figure.yaxis[0], rows)

    def match_at(self, y: float) -> Match | None:
        """Return the match at a height of the figure."""
        row = int(np.floor(-y))
        return self.matches[row] if 0 <= row < len(self.matches) else None

    def _add_row(
        self,
        columns: dict[str, list[object]],
        row: int,
        view: SiteView,
        match: Match,
        units: Sequence[int],
        condition: Condition,
    ) -> None:
        extent = view.axis.extent(match.stretch.sequence)
        if extent is None:
            return
        first = extent[0] + match.stretch.start
        last = min(extent[0] + match.stretch.stop, first + MAX_STEPS)
        start, stop = max(extent[0], first - CONTEXT), min(extent[1], last + CONTEXT)
        texts = view.texts(start, stop)
        share = condition.is_on(view.values(start, stop, units)).mean(axis=1)
        tokens = texts.tokens or [str(step) for step in range(start - extent[0], stop - extent[0])]
        labels = _label_texts(texts, stop - start)
        for position in range(start, stop):
            index = position - start
            inside = first <= position < last
            columns["x"].append(position - first + CONTEXT + 0.5)
            columns["y"].append(-row - 0.5)
            columns["share"].append(float(share[index]))
            columns["token"].append(tokens[index][:MAX_TOKEN])
            columns["label"].append(labels[index])
            columns["colour"].append("#ffffff" if share[index] > 0.75 else "#333333")
            columns["edge"].append("#ff7f0e" if inside else "#ffffff")


def _title(row: int, match: Match, units: int) -> str:
    stretch = match.stretch
    steps = f"{stretch.start}" if len(stretch) == 1 else f"{stretch.start}-{stretch.stop - 1}"
    return f"{row + 1}.  seq {stretch.sequence}: {steps}  {match.held}/{units}"


def _label_texts(texts: StepTexts, count: int) -> list[str]:
    """Return the first label of each step."""
    for values in texts.labels.values():
        return [value[:MAX_TOKEN] for value in values]
    return [""] * count
