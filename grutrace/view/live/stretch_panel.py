"""`StretchPanel`: marked stretches, the units that are on in them, and the search for matches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from bokeh import events

from grutrace.errors import NotRecordedError, OptionError
from grutrace.reprs import plural
from grutrace.view.live.controls import Controls
from grutrace.view.live.engine.link import Link, Steps, parse_link
from grutrace.view.live.engine.search import Search
from grutrace.view.live.engine.site_view import SiteView
from grutrace.view.live.engine.stretches import Condition, Stretch, units_on
from grutrace.view.live.listeners import Listeners
from grutrace.view.live.match_list import MatchList

#: Units that the text of found units lists.
MAX_UNITS = 64

#: Steps that are shown around a match.
CONTEXT = 20

#: Seconds between two lists of matches while a search runs.
REDRAW = 0.4

_NO_UNIT = (
    "matches: expected at least one unit; no unit is on in the stretch and off around it: change "
    "the threshold or the stretch"
)


class StretchPanel:
    """The lower part of a page.

    Args:
        widgets: The widgets.
        listeners: What calls this object.
        boxes: The marks in the figures.
        changed: Called when the chosen units, the threshold or the mark have changed.
        move: Shows other positions.

    Attributes:
        view: The quantity that the page shows; None before the first.
        matches: The list of matches.
        is_searching: Whether a search runs.
    """

    def __init__(
        self,
        widgets: Controls,
        listeners: Listeners,
        boxes: list[Any],
        changed: Callable[[], None],
        move: Callable[[int, int], None],
    ) -> None:
        self._widgets, self._listeners, self._boxes = widgets, listeners, boxes
        self._changed, self._move = changed, move
        self.view: SiteView | None = None
        self.matches = MatchList()
        self._mark: Steps | None = None
        self._found: list[int] = []
        self._search: Search | None = None
        self._searched: tuple[list[int], Condition] = ([], Condition(0))
        self._was_searched = False
        self._drawn = 0.0
        listeners.on(widgets.mark, "value", self._read_mark)
        listeners.on(widgets.threshold, "value_throttled", self._find_units)
        for widget in (widgets.before, widgets.after):
            listeners.on(widget, "value", self._find_units)
        listeners.on(widgets.above, "active", self._find_units)
        listeners.on(widgets.units, "value", self._read_units)
        listeners.on(widgets.least, "value", changed)
        widgets.find.on_click(self.toggle_search)
        self.matches.figure.on_event(events.Tap, self._go_to_match)

    # Marking

    @property
    def condition(self) -> Condition:
        """When a unit is on."""
        return Condition(float(self._widgets.threshold.value), self._widgets.above.active == 0)

    def select(self, event: events.SelectionGeometry) -> None:
        """Mark what was dragged over."""
        view, geometry = self.view, event.geometry
        if not event.final or view is None or not len(view.axis):
            return
        x0, x1 = sorted((geometry["x0"], geometry["x1"]))
        start, stop = int(x0 // 1), int(-(-x1 // 1))
        self._listeners.guarded(lambda: self.mark(view.steps(start, max(stop, start + 1))))

    def mark(self, steps: Steps) -> None:
        """Mark steps: those of the first sequence only, if they are of several.

        Raises:
            NotRecordedError: The trace does not have these steps.
        """
        view = self._require_view()
        extent = view.axis.extent(steps.first_sequence)
        if steps.last_sequence != steps.first_sequence and extent is not None:
            sequence = steps.first_sequence
            steps = Steps(sequence, steps.start, sequence, extent[1] - extent[0])
        positions = view.positions(steps)
        if positions is None:
            raise NotRecordedError("mark: the trace does not have these steps")
        self._forget_matches()
        self._mark = steps
        self._listeners.say([])
        text = f"{steps.first_sequence}.{steps.start}-{steps.last_sequence}.{steps.stop}"
        self._listeners.set(self._widgets.mark, value=text)
        for box in self._boxes:
            box.update(left=positions[0], right=positions[1], visible=True)
        self._find_units()

    def renew(self, view: SiteView) -> None:
        """Take another quantity, run or selection. The mark stays if the axis has its steps."""
        self.stop_search()
        self.view = view
        if self._mark is not None and view.positions(self._mark) is not None:
            self.mark(self._mark)
        else:
            self._clear()

    def grow(self, view: SiteView) -> None:
        """Take the same quantity with more steps: a sequence before the mark may have grown."""
        self.view = view
        positions = view.positions(self._mark) if self._mark is not None else None
        if positions is not None:
            for box in self._boxes:
                box.update(left=positions[0], right=positions[1])

    def _require_view(self) -> SiteView:
        if self.view is None:
            raise NotRecordedError("mark: no steps are shown")
        return self.view

    def _read_mark(self) -> None:
        text = self._widgets.mark.value.strip()
        if not text:
            self._clear()
            return
        link, problems = parse_link({"mark": text})
        if link.mark is None:
            raise OptionError(problems[0].removeprefix("link: "))
        self.mark(link.mark)

    def _forget_matches(self) -> None:
        """Hide the matches of another mark."""
        self.stop_search()
        self._was_searched = False
        self._widgets.progress.text = ""
        if self.view is not None and self.matches.matches:
            self.matches.show(self.view, [], [], self.condition)

    def _clear(self) -> None:
        self._forget_matches()
        self._mark, self._found = None, []
        self._listeners.set(self._widgets.mark, value="")
        self._listeners.set(self._widgets.units, value="")
        self._widgets.found.text = ""
        for box in self._boxes:
            box.visible = False
        self._changed()

    # Units

    @property
    def units(self) -> list[int]:
        """The chosen units, as columns.

        Raises:
            OptionError: The text has something else.
        """
        view = self._require_view()
        names = {view.name_of(unit): unit for unit in range(view.units)}
        words = self._widgets.units.value.replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) in names):
                raise OptionError(f"units: expected numbers of units of this site; found {word!r}")
        return list(dict.fromkeys(names[int(word)] for word in words))

    def _find_units(self) -> None:
        """Find the units that are on in the marked stretch and off around it."""
        self.stop_search()
        stretch = self._stretch()
        if self.view is None or stretch is None:
            self._changed()
            return
        view, widgets = self.view, self._widgets
        before, after = int(widgets.before.value or 0), int(widgets.after.value or 0)
        found = units_on(
            view.rows, view.axis, stretch, self.condition, before=before, after=after
        ).tolist()
        self._found = found[:MAX_UNITS]
        self._listeners.set(widgets.units, value=self._names(self._found))
        around = f" and off {before} before and {after} after it" if before or after else ""
        more = f" The first {MAX_UNITS} are taken." if len(found) > MAX_UNITS else ""
        widgets.found.text = (
            f"{plural(len(found), 'unit')} of {view.units} on in {_stretch_text(stretch)}"
            f"{around}.{more}"
        )
        self._read_units()

    def _read_units(self) -> None:
        self.stop_search()
        count = max(1, len(self.units))
        self._listeners.set(self._widgets.least, high=count, value=count)
        self._changed()

    def _names(self, units: list[int]) -> str:
        view = self._require_view()
        return ", ".join(str(view.name_of(unit)) for unit in units)

    def _stretch(self) -> Stretch | None:
        mark = self._mark
        return None if mark is None else Stretch(mark.first_sequence, mark.start, mark.stop)

    # Searching

    @property
    def is_searching(self) -> bool:
        """Whether a search runs."""
        return self._search is not None

    def toggle_search(self) -> None:
        """Start a search, or stop the one that runs."""
        if self._search is not None:
            self.stop_search()
        else:
            self._listeners.guarded(self._start_search)

    def _start_search(self) -> None:
        view, stretch = self._require_view(), self._stretch()
        if stretch is None:
            raise OptionError("matches: expected a marked stretch: drag over the tokens")
        units, condition = self.units, self.condition
        if not units:
            raise OptionError(_NO_UNIT)
        least = min(int(self._widgets.least.value or 1), len(units))
        self._search = Search(view.rows, view.axis, units, condition, stretch, least=least)
        self._searched, self._was_searched = (units, condition), True
        self._listeners.say([])
        self._widgets.find.update(label="Stop", button_type="warning")
        self._changed()

    def stop_search(self) -> None:
        """Stop the search, if one runs."""
        if self._search is not None:
            self._show_progress(self._search, stopped=True)
            self._end_search()

    def advance_search(self, seconds: float) -> None:
        """Search for this time, and show what was found."""
        search = self._search
        if search is None or self.view is None:
            return
        complete = search.advance(seconds)
        now = time.perf_counter()
        if complete or now - self._drawn > REDRAW:
            self._drawn = now
            self.matches.show(self.view, search.matches, *self._searched)
            self._show_progress(search)
        if complete:
            self._end_search()
            self._changed()

    def _end_search(self) -> None:
        self._search = None
        self._widgets.find.update(label="Find matches", button_type="primary")

    def _show_progress(self, search: Search, *, stopped: bool = False) -> None:
        found = "1 match" if search.count == 1 else f"{search.count:,} matches"
        if search.complete:
            text = f"{found} in all {search.position:,} steps, besides the marked stretch."
        elif stopped:
            text = f"Stopped at {search.progress:.0%} of the steps: {found} so far."
        else:
            text = f"{search.progress:.0%} of the steps searched, {found} so far ..."
        shown = len(self.matches.matches)
        if search.count > shown:
            text += f" The best {shown} are shown; click one to go there."
        elif search.count:
            text += " Click one to go there."
        self._widgets.progress.text = text

    def _go_to_match(self, event: events.Tap) -> None:
        match = self.matches.match_at(event.y) if event.y is not None else None
        if match is None or self.view is None:
            return
        extent = self.view.axis.extent(match.stretch.sequence)
        if extent is not None:
            start, stop = extent[0] + match.stretch.start, extent[0] + match.stretch.stop
            self._move(max(0, start - CONTEXT), min(stop + CONTEXT, len(self.view.axis)))

    # Links

    def open(self, link: Link) -> None:
        """Show what a link says of stretches.

        Raises:
            GrutraceError: The trace does not have what it says.
        """
        widgets, listeners = self._widgets, self._listeners
        if link.around:
            listeners.set(widgets.before, value=min(link.around[0], 99))
            listeners.set(widgets.after, value=min(link.around[1], 99))
        if link.on:
            threshold = min(max(link.on[0], widgets.threshold.start), widgets.threshold.end)
            listeners.set(widgets.threshold, value=threshold)
            listeners.set(widgets.above, active=0 if link.on[1] else 1)
        if link.mark:
            self.mark(link.mark)
            if link.chosen is not None:
                listeners.set(widgets.units, value=", ".join(map(str, link.chosen)))
                self._read_units()
            if link.least:
                listeners.set(widgets.least, value=min(link.least, widgets.least.high))
            if link.search:
                self.toggle_search()

    def add_to(self, link: Link) -> Link:
        """Return a link that holds what is marked, chosen and searched as well."""
        if self._mark is None:
            return link
        widgets, condition = self._widgets, self.condition
        units = self.units
        chosen = tuple(self._require_view().name_of(unit) for unit in units)
        return dataclasses.replace(
            link,
            mark=self._mark,
            on=(condition.threshold, condition.above),
            around=(int(widgets.before.value or 0), int(widgets.after.value or 0)),
            chosen=chosen if units != self._found else None,
            least=int(widgets.least.value or 1),
            search=True if self._was_searched else None,
        )


def _stretch_text(stretch: Stretch) -> str:
    steps = f"step {stretch.start}"
    if len(stretch) > 1:
        steps = f"steps {stretch.start} to {stretch.stop - 1}"
    return f"{steps} of sequence {stretch.sequence}"
