"""`Page`: one open page of a live view: what it shows, and what its widgets do."""

from __future__ import annotations

import dataclasses
import html
import time

from bokeh import events, models
from bokeh.document import Document

from grutrace.errors import GrutraceError, NotRecordedError, OptionError
from grutrace.reprs import plural
from grutrace.view.live.controls import MAX_SITES, Controls
from grutrace.view.live.engine.link import Link, Steps, parse_link
from grutrace.view.live.engine.runs import Runs
from grutrace.view.live.engine.site_view import SiteView, first_quantity
from grutrace.view.live.engine.window import Span
from grutrace.view.live.listeners import Listeners
from grutrace.view.live.picture import Picture, inner_size
from grutrace.view.live.run_report import report_link
from grutrace.view.live.stretch_panel import StretchPanel
from grutrace.view.live.token_strip import MIN_STEP, TokenStrip
from grutrace.view.live.unit_lines import UnitLines

#: Seconds of reading before a picture is shown, and of each slice of work in the background. A
#: request that arrives during a slice waits for its end.
FIRST_PICTURE, SLICE = 0.02, 0.015

#: Milliseconds between slices of work, and between looks for what a writer has committed.
TICK, FOLLOW_TICK = 50, 250

#: Milliseconds in which changes are one: a zoom into a box changes both ranges.
TOGETHER = 2

#: Share of the time that background work of all pages may take.
BACKGROUND = 0.5

#: Seconds between two pictures while one is refined.
REDRAW = 0.4

#: Steps that a page shows of a file that it follows.
FOLLOWED_STEPS = 400

#: Moves what is in the address to what the page shows.
_SET_ADDRESS = "history.replaceState(null, '', cb_obj.text ? '?' + cb_obj.text : '.')"

#: Sends the place of the pointer, at most every 60 milliseconds.
_SEND_POINTER = """
const now = performance.now()
if (now - (window.grutrace_sent ?? 0) > 60) {
  window.grutrace_sent = now
  pointer.data = {x: [cb_obj.x], y: [cb_obj.y]}
}
"""


class Page:
    """A page, which can be made before a browser asks for it. `start` opens it.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._document = Document()
        self._widgets = Controls(runs.names)
        self._x_range = models.Range1d(0, 1, min_interval=3)
        self._y_range = models.Range1d(0, 1, min_interval=1)
        names = ("picture", "beside")[: len(runs.names)]
        self._pictures = [Picture(self._x_range, self._y_range, name) for name in names]
        self._strip, self._lines = TokenStrip(self._x_range), UnitLines(self._x_range)
        self._listeners = Listeners(self._widgets)
        boxes = [*(p.mark for p in self._pictures), self._strip.mark, self._lines.mark]
        self._stretches = StretchPanel(
            self._widgets, self._listeners, boxes, self._show_choice, self._move
        )
        self._pointer = models.ColumnDataSource({"x": [], "y": []})
        self._view: SiteView | None = None
        self._beside: SiteView | None = None
        self._scheduled = self._is_complete = False
        self._drawn = 0.0
        self._snapshot: object = None

    # Setting up

    def start(self, document: Document) -> None:
        """Fill an empty document of bokeh, and show what its address says."""
        self._document, widgets = document, self._widgets
        document.title = f"grutrace: {', '.join(self._runs.names)}"[:80]
        pictures = [picture.figure for picture in self._pictures]
        layout = widgets.layout([*pictures, self._strip.figure])
        self._listen()
        link, problems = parse_link(_arguments(document))
        self._listeners.say(problems)
        self._open(link)
        document.add_root(layout)
        document.on_event(events.DocumentReady, lambda _: self.complete())
        document.add_periodic_callback(self._tick, TICK)
        document.add_periodic_callback(self._look, FOLLOW_TICK)

    def complete(self) -> None:
        """Add what is below the picture, when the browser has painted it."""
        if not self._is_complete:
            self._is_complete = True
            self._widgets.complete([self._lines.figure], [self._stretches.matches.figure])

    def _listen(self) -> None:
        widgets = self._widgets
        for widget in (widgets.run, widgets.site, widgets.quantity, widgets.order, widgets.beside):
            self._listeners.on(widget, "value", self._choose)
        self._listeners.on(widgets.site_filter, "value", self._filter_sites)
        self._listeners.on(widgets.statistic, "value", self._set_statistic)
        self._listeners.on(widgets.select, "value", self._choose)
        self._listeners.on(widgets.sequence, "value", self._go_to_sequence)
        self._listeners.on(widgets.follow, "active", self._follow)
        self._listeners.on(self._x_range, "start", self._schedule)
        self._listeners.on(self._x_range, "end", self._schedule)
        self._listeners.on(self._y_range, "start", self._schedule)
        self._listeners.on(self._y_range, "end", self._schedule)
        self._listeners.on(self._pointer, "data", self._show_pointer)
        for picture in self._pictures:
            self._listeners.on(picture.figure, "inner_height", self._schedule)
        for figure in (self._pictures[0].figure, self._strip.figure):
            self._listeners.on(figure, "inner_width", self._schedule)
        widgets.previous.on_click(lambda: self._step_sequence(-1))
        widgets.next.on_click(lambda: self._step_sequence(1))
        widgets.whole.on_click(self._show_whole)
        widgets.link.js_on_change("text", models.CustomJS(code=_SET_ADDRESS))
        self._strip.figure.on_event(events.SelectionGeometry, self._stretches.select)
        for figure in (self._pictures[0].figure, self._strip.figure):
            figure.js_on_event(
                events.MouseMove,
                models.CustomJS(args={"pointer": self._pointer}, code=_SEND_POINTER),
            )

    # What is shown

    def _open(self, link: Link) -> None:
        """Show what a link says, and defaults for what it does not."""
        widgets = self._widgets
        problems = self._listeners.said
        name = link.run if link.run in self._runs.names else self._runs.names[0]
        if link.run not in (None, name):
            problems.append(f"link: run: expected a run of this view; found {link.run!r}")
        beside = link.beside if link.beside in self._runs.names else ""
        self._listeners.set(widgets.run, value=name)
        self._listeners.set(widgets.beside, value=beside)
        self._listeners.set(widgets.statistic, value=link.statistic or "mean")
        self._listeners.set(widgets.order, value=link.order or "number")
        self._listeners.set(widgets.select, value=link.select or "")
        try:
            self._load(link.site, link.quantity)
        except GrutraceError as error:
            self._listeners.say([*problems, str(error)])
            return
        assert self._view is not None
        trace = self._runs[name].trace
        follows = link.follow if link.follow is not None else not trace.closed
        self._listeners.set(widgets.follow, active=follows and not trace.closed)
        start, stop = 0, len(self._view.axis)
        if link.steps:
            positions = self._view.positions(link.steps)
            if positions is None:
                problems.append("link: steps: the trace does not have these steps")
            else:
                start, stop = positions
        elif widgets.follow.active:
            start = max(0, stop - FOLLOWED_STEPS)
        units = link.units or (0, self._view.units)
        self._listeners.set(self._x_range, start=start, end=max(stop, start + 1))
        self._listeners.set(
            self._y_range, start=units[0], end=max(min(units[1], self._view.units), 1)
        )
        self._stretches.view = self._view
        self._show_window()
        try:
            self._stretches.open(link)
        except GrutraceError as error:
            problems.append(str(error))
        if problems:
            self._listeners.say(problems)

    def _load(self, site: str | None, quantity: str | None) -> None:
        """Load the rows of the chosen run, and of the run beside it."""
        widgets = self._widgets
        run = self._runs[widgets.run.value]
        run.refresh()
        trace = run.trace
        self._snapshot = trace.snapshot
        if not trace.sites:
            raise NotRecordedError(f"{run.name}: no site was recorded yet")
        site = site if site is not None and site in trace else trace.sites[0]
        available = trace[site].site.available_quantities
        if quantity not in available:
            quantity = first_quantity(trace[site])
        self._offer_sites(trace.sites, site)
        self._listeners.set(widgets.site, value=site)
        self._listeners.set(widgets.quantity, options=list(available), value=quantity)
        former = self._view
        select = widgets.select.value
        self._view = SiteView(trace, site, quantity, widgets.order.value, select)
        self._beside = None
        if widgets.beside.value:
            other = self._runs[widgets.beside.value]
            other.refresh()
            self._beside = SiteView(other.trace, site, quantity, widgets.order.value, select)
        titles = (run.name, widgets.beside.value) if self._beside is not None else ("", "")
        for picture, title in zip(self._pictures, titles, strict=False):
            picture.set_title(title)
        for picture in self._pictures[1:]:
            picture.figure.visible = self._beside is not None
        self._listeners.set(self._x_range, bounds=(0, max(1, len(self._view.axis))))
        self._listeners.set(self._y_range, bounds=(0, self._view.units))
        if former is None or former.quantity != quantity:
            low, high = self._view.limits
            step = 10.0 ** round(-2 + _decimals(high - low))
            middle = 0.5 if (low, high) in ((0, 1), (-1, 1)) else round((low + 3 * high) / 4, 6)
            self._listeners.set(widgets.threshold, start=low, end=high, step=step, value=middle)
        widgets.follow.visible = not trace.closed
        # Quoted for an address, no part of a name can be markup.
        target = html.escape(report_link(run.name, select))
        widgets.report.text = f'<a href="{target}" target="_blank" rel="noopener">Report</a>'
        widgets.report.visible = bool(run.paths)

    def _offer_sites(self, sites: tuple[str, ...], chosen: str) -> None:
        widgets = self._widgets
        part = widgets.site_filter.value
        found = [name for name in sites if part.lower() in name.lower()] if part else list(sites)
        shown = found[:MAX_SITES]
        if chosen not in shown:
            shown = [chosen, *shown]
        title = "Site" if len(found) <= MAX_SITES else f"Site ({MAX_SITES} of {len(found):,})"
        self._listeners.set(
            widgets.site, options=[(name, name or "(model)") for name in shown], title=title
        )
        widgets.site_filter.visible = len(sites) > 20

    def _filter_sites(self) -> None:
        self._offer_sites(self._runs[self._widgets.run.value].trace.sites, self._widgets.site.value)

    def _choose(self) -> None:
        """Show another run, site, quantity or order, at the same steps where it has them."""
        steps = self._visible_steps()
        units = self._view.units if self._view else 0
        self._listeners.say([])
        self._load(self._widgets.site.value, self._widgets.quantity.value)
        assert self._view is not None
        positions = self._view.positions(steps) if steps else None
        start, stop = positions or (0, max(1, len(self._view.axis)))
        self._listeners.set(self._x_range, start=start, end=stop)
        if self._view.units != units:
            self._listeners.set(self._y_range, start=0, end=self._view.units)
        # The units of the mark are found again before lines are drawn.
        self._stretches.renew(self._view)
        self._show_window()

    def _schedule(self) -> None:
        """Show the window soon: several changes at once are one."""
        if not self._scheduled:
            self._scheduled = True
            self._document.add_timeout_callback(self._show_scheduled, TOGETHER)

    def _show_scheduled(self) -> None:
        self._scheduled = False
        self._listeners.guarded(self._show_window)

    def _span(self) -> Span:
        assert self._view is not None
        return Span(
            max(0, int(self._x_range.start)),
            min(len(self._view.axis), int(-(-self._x_range.end // 1))),
            max(0, int(self._y_range.start)),
            min(self._view.units, int(-(-self._y_range.end // 1))),
        )

    def _show_window(self) -> None:
        view = self._view
        if view is None:
            return
        span, statistic = self._span(), self._widgets.statistic.value
        self._pictures[0].show(view, span, statistic, FIRST_PICTURE)
        if self._beside is not None:
            self._show_beside(view, self._beside, span)
        self._strip.show(view, span.start, span.stop)
        self._show_lines()
        self._drawn = time.perf_counter()
        self._show_status()
        self._write_link()

    def _show_beside(self, view: SiteView, beside: SiteView, span: Span) -> None:
        """Show the same steps of the other run, from the first visible step on."""
        if not len(view.axis):
            return
        other = beside.axis.position(*view.axis.locate(min(span.start, len(view.axis) - 1)))
        if other is None:
            raise NotRecordedError(
                f"{self._widgets.beside.value} does not have the first visible step: its sequences "
                "are others"
            )
        offset = span.start - other
        shifted = Span(other, other + span.stop - span.start, span.first, span.last)
        statistic = self._widgets.statistic.value
        self._pictures[1].show(beside, shifted, statistic, FIRST_PICTURE, offset)

    def _show_lines(self) -> None:
        assert self._view is not None
        span = self._span()
        units, threshold = self._stretches.units, self._stretches.condition.threshold
        self._lines.show(self._view, span.start, span.stop, units, threshold)

    def _show_choice(self) -> None:
        """Show the chosen units, and hold them in the address."""
        if self._view is not None:
            self._show_lines()
            self._write_link()

    def _show_status(self) -> None:
        view, window = self._view, self._pictures[0].window
        if view is None or window is None:
            return
        span = window.span
        if span.start >= span.stop:
            self._widgets.status.text = "No steps are recorded yet."
            return
        steps, total = span.stop - span.start, len(view.axis)
        parts = [f"{steps:,} of {total:,} steps, of {plural(window.sequences, 'sequence')}"]
        if steps > len(window.steps) - 1:
            parts.append(
                f"a pixel is the {self._widgets.statistic.value} of "
                f"{steps / (len(window.steps) - 1):,.1f} steps"
            )
        if window.complete:
            parts.append("every step is read")
        else:
            share = window.steps_read / steps
            parts.append(
                f"from a sample so far: {window.sequences_read:,} of "
                f"{plural(window.sequences, 'sequence')}, {share:.1%} of the steps"
            )
        if steps > self._strip_limit():
            parts.append("zoom in to see tokens")
        trace = self._runs[self._widgets.run.value].trace
        if not trace.closed:
            parts.append("the file is still being written, or was left behind")
        self._widgets.status.text = " \N{MIDDLE DOT} ".join(parts)

    def _strip_limit(self) -> float:
        return inner_size(self._strip.figure)[0] / MIN_STEP

    def _set_statistic(self) -> None:
        for picture in self._pictures:
            picture.set_statistic(self._widgets.statistic.value)
        self._show_status()
        self._write_link()

    # Moving

    def _visible_steps(self) -> Steps | None:
        if self._view is None or not len(self._view.axis):
            return None
        span = self._span()
        return self._view.steps(span.start, max(span.stop, span.start + 1))

    def _move(self, start: int, stop: int) -> None:
        self._x_range.update(start=start, end=max(stop, start + 1))
        self._schedule()

    def _show_whole(self) -> None:
        if self._view is not None:
            self._listeners.set(self._widgets.sequence, value="")
            self._listeners.set(self._y_range, start=0, end=self._view.units)
            self._move(0, len(self._view.axis))

    def _go_to_sequence(self) -> None:
        text = self._widgets.sequence.value.strip()
        if not text:
            return
        if not (text.isascii() and text.isdigit()):
            raise OptionError(f"sequence: expected a number; found {text!r}")
        self._show_sequence(int(text))

    def _show_sequence(self, number: int) -> None:
        assert self._view is not None
        extent = self._view.axis.extent(number)
        if extent is None:
            count = len(self._view.site)
            raise NotRecordedError(f"there is no sequence {number}; there are {count}")
        self._listeners.say([])
        self._listeners.set(self._widgets.sequence, value=str(number))
        self._move(*extent)

    def _step_sequence(self, by: int) -> None:
        if self._view is None or not len(self._view.axis):
            return
        now = self._view.axis.locate(min(self._span().start, len(self._view.axis) - 1))[0]
        is_shown = self._widgets.sequence.value.strip() == str(now)
        number = min(max(0, now + by if is_shown else now), len(self._view.site) - 1)
        self._listeners.guarded(lambda: self._show_sequence(number))

    def _show_pointer(self) -> None:
        view = self._view
        data = self._pointer.data
        if view is None or not len(data["x"]) or data["x"][0] is None:
            return
        position, place = int(data["x"][0] // 1), int(data["y"][0] // 1)
        self._widgets.pointer.text = view.describe(position, place)

    # The background

    def _tick(self) -> None:
        """Do a slice of work: search, or refine the pictures."""
        now = time.perf_counter()
        if now < self._runs.rest_until or not self._is_open():
            return
        self._work()
        done = time.perf_counter()
        self._runs.rest_until = done + (done - now) * (1 / BACKGROUND - 1)

    def _work(self) -> None:
        if self._stretches.is_searching:
            self._listeners.guarded(lambda: self._stretches.advance_search(SLICE))
            return
        for picture in self._pictures if self._beside is not None else self._pictures[:1]:
            if picture.refine(SLICE):
                is_complete = picture.window is not None and picture.window.complete
                if is_complete or time.perf_counter() - self._drawn > REDRAW:
                    self._drawn = time.perf_counter()
                    picture.draw()
                    self._show_status()
                return

    def _look(self) -> None:
        """Look for what a writer has committed, if the page follows."""
        is_waiting = self._widgets.follow.active or self._view is None
        # A search goes on to the end of what it began with.
        if is_waiting and self._is_open() and not self._stretches.is_searching:
            self._listeners.guarded(self._grow)

    def _is_open(self) -> bool:
        """Return whether a browser shows the page: one that was closed costs nothing."""
        session = getattr(self._document.session_context, "session", None)
        return session is not None and session.connection_count > 0

    def _grow(self) -> None:
        run = self._runs[self._widgets.run.value]
        run.refresh()
        if run.trace.snapshot is self._snapshot:
            return
        span = self._span() if self._view is not None else None
        before = len(self._view.axis) if self._view is not None else 0
        steps = self._visible_steps()
        is_whole = span is not None and span.start == 0 and span.stop >= before
        is_at_end = span is not None and span.stop >= before
        if self._view is None:
            self._open(Link(run=run.name))
            return
        self._load(self._widgets.site.value, self._widgets.quantity.value)
        stop = len(self._view.axis)
        if is_at_end:
            width = FOLLOWED_STEPS if is_whole else max(1, before - span.start)  # type: ignore[union-attr]
            self._listeners.set(self._x_range, start=max(0, stop - width), end=max(stop, 1))
        elif steps is not None and (positions := self._view.positions(steps)) is not None:
            self._listeners.set(self._x_range, start=positions[0], end=positions[1])
        self._stretches.grow(self._view)
        self._show_window()
        if run.trace.closed:
            self._listeners.set(self._widgets.follow, active=False)

    def _follow(self) -> None:
        if self._widgets.follow.active and self._view is not None:
            stop = len(self._view.axis)
            self._move(max(0, stop - FOLLOWED_STEPS), stop)
        self._write_link()

    def _write_link(self) -> None:
        view, widgets = self._view, self._widgets
        if view is None:
            return
        span = self._span()
        is_whole = (span.start, span.stop) == (0, len(view.axis))
        all_units = (span.first, span.last) == (0, view.units)
        link = Link(site=view.site.name, quantity=view.quantity)
        if len(self._runs.names) > 1:
            link = dataclasses.replace(
                link, run=widgets.run.value, beside=widgets.beside.value or None
            )
        if widgets.statistic.value != "mean":
            link = dataclasses.replace(link, statistic=widgets.statistic.value)
        if widgets.select.value.strip():
            link = dataclasses.replace(link, select=widgets.select.value.strip())
        if widgets.order.value != "number":
            link = dataclasses.replace(link, order=widgets.order.value)
        if widgets.follow.active:
            link = dataclasses.replace(link, follow=True)
        elif not is_whole:
            link = dataclasses.replace(link, steps=self._visible_steps(), follow=None)
        if not all_units:
            link = dataclasses.replace(link, units=(span.first, span.last))
        widgets.link.text = self._stretches.add_to(link).query()


def _arguments(document: Document) -> dict[str, str]:
    """Return the parts of the query string of a page."""
    context = document.session_context
    arguments = context.request.arguments if context is not None and context.request else {}
    return {
        str(name): values[-1].decode("utf-8", "replace")
        for name, values in arguments.items()
        if values
    }


def _decimals(spread: float) -> int:
    """Return the power of ten of a range."""
    power = 0
    while spread > 10 ** (power + 1):
        power += 1
    while spread < 10**power:
        power -= 1
    return power
