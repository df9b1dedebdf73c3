"""The widgets of a page, and their layout."""

from __future__ import annotations

from bokeh import layouts, models

from grutrace.view.live.engine.link import ORDERS
from grutrace.view.live.engine.window import STATISTICS

#: Most sites in the list: a page with a million would not open.
MAX_SITES = 200

#: Widgets that do not fit in a row go on in the next.
_WRAP = {"flex-wrap": "wrap", "row-gap": "2px"}


def text(
    size: str = "13px", colour: str = "#444444", name: str = "", **options: object
) -> models.Div:
    """Return a line of text. What it holds is never markup."""
    return models.Div(
        text="",
        name=name,
        render_as_text=True,
        disable_math=True,
        sizing_mode="stretch_width",
        styles={"font-size": size, "color": colour, "font-family": "system-ui, sans-serif"},
        **options,
    )


class Controls:
    """All widgets. The page sets their values and listens to them.

    Args:
        run_names: Names of the runs.
    """

    def __init__(self, run_names: tuple[str, ...]) -> None:
        self.run = models.Select(title="Run", options=list(run_names), width=170, name="run")
        self.beside = models.Select(
            title="Beside it", options=[("", "(none)"), *((n, n) for n in run_names)], width=170
        )
        self.site_filter = models.TextInput(
            title="Find a site", placeholder="part of a name", width=130, name="filter"
        )
        self.site = models.Select(title="Site", options=[], width=200, name="site")
        self.quantity = models.Select(title="Quantity", options=[], width=110, name="quantity")
        self.statistic = models.Select(title="A pixel is the", options=list(STATISTICS), width=90)
        self.order = models.Select(title="Units by", options=list(ORDERS), width=100)
        self.select = models.TextInput(
            title="Select sequences", placeholder="tag=valid; length=10:", width=190, name="select"
        )
        self.sequence = models.TextInput(title="Sequence", width=80, name="sequence")
        self.previous = models.Button(label="\N{LEFTWARDS ARROW}", width=34, align="end")
        self.next = models.Button(label="\N{RIGHTWARDS ARROW}", width=34, align="end")
        self.whole = models.Button(label="Whole file", width=90, align="end", name="whole")
        self.follow = models.Toggle(label="Follow", width=70, align="end")
        self.report = models.Div(
            text="", name="report", align="end", styles={"font": "13px system-ui, sans-serif"}
        )
        self.status = text(name="status")
        self.pointer = text(name="pointer", colour="#111111", height=22)
        self.problem = text(name="problem", colour="#b2182b", visible=False)
        self.mark = models.TextInput(title="Marked: seq.start-seq.end", width=170, name="mark")
        self.above = models.RadioButtonGroup(labels=["on above", "on below"], active=0, align="end")
        self.threshold = models.Slider(
            title="Threshold", start=0, end=1, step=0.01, value=0.5, width=180, name="threshold"
        )
        self.before = models.Spinner(title="Off before", low=0, high=99, value=1, width=80)
        self.after = models.Spinner(title="Off after", low=0, high=99, value=1, width=80)
        self.units = models.TextInput(title="Units", width=200, name="units")
        self.least = models.Spinner(title="At least on", low=1, high=1, value=1, width=85)
        self.find = models.Button(
            label="Find matches", button_type="primary", width=120, align="end", name="find"
        )
        self.found = text(name="found")
        self.progress = text(name="progress")
        #: The query string of what is shown; a script of the page puts it into the address.
        self.link = models.Div(text="", visible=False, name="link", render_as_text=True)

    def layout(self, pictures: list[models.LayoutDOM]) -> models.LayoutDOM:
        """Return the layout of the page, up to the pictures. `complete` adds the rest.

        Args:
            pictures: The pictures, below the status.
        """
        several = len(self.run.options) > 1
        self.run.visible = self.beside.visible = several
        choice = layouts.row(
            [
                *(self.run, self.beside, self.site_filter, self.site, self.quantity),
                *(self.statistic, self.order, self.select, self.sequence, self.previous, self.next),
                *(self.whole, self.follow, self.report),
            ],
            sizing_mode="stretch_width",
            styles=_WRAP,
        )
        # A column of its own: frames of figures in one column are aligned.
        self._pictures = layouts.column(pictures, sizing_mode="stretch_width")
        self._page = layouts.column(
            [choice, self.problem, self.status, self._pictures, self.link],
            sizing_mode="stretch_width",
            styles={"padding": "8px 12px"},
        )
        return self._page

    def complete(self, pictures: list[models.LayoutDOM], below: list[models.LayoutDOM]) -> None:
        """Add the rest of the page, which would delay the first picture by a tenth of a second.

        Args:
            pictures: More pictures, which can be hidden.
            below: What is below the widgets for stretches.
        """
        stretch = layouts.row(
            [
                *(self.mark, self.threshold, self.above, self.before, self.after),
                *(self.units, self.least, self.find),
            ],
            sizing_mode="stretch_width",
            styles=_WRAP,
        )
        heading = models.Div(
            text="Stretches",
            styles={
                "font": "600 15px system-ui, sans-serif",
                "margin-top": "6px",
            },
        )
        self._pictures.children = [*self._pictures.children, *pictures]
        self._page.children = [
            *self._page.children,
            *(self.pointer, heading, stretch, self.found, self.progress),
            layouts.column(below, sizing_mode="stretch_width"),
        ]
