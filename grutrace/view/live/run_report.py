"""The report of a run of a live view, made when somebody asks for it."""

from __future__ import annotations

import asyncio
import threading
from urllib.parse import urlencode

from tornado.web import RequestHandler

from grutrace.errors import GrutraceError, OptionError, StateError
from grutrace.storage.open import open_trace
from grutrace.view.live.engine.runs import Runs
from grutrace.view.live.engine.selection_text import parse_conditions
from grutrace.view.report.report import make_report

#: Path of a report below the token of the address.
PATH = "/report"


def report_link(run: str, select: str) -> str:
    """Return the address of a report, relative to the page."""
    return f".{PATH}?" + urlencode({"run": run, **({"select": select} if select.strip() else {})})


class Reports:
    """Makes the reports of a view, one after another, in any thread.

    Args:
        runs: The runs of the view.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs, self._lock, self._is_closing = runs, threading.Lock(), False

    def make(self, name: str | None, select: str) -> str:
        """Return the report about a run, or about those of its sequences that a page shows.

        The files are opened anew, so that the pages can read meanwhile.

        Args:
            name: Name of the run; None for the first.
            select: Conditions, as for `parse_conditions`; empty for all sequences.

        Raises:
            OptionError: There is no such run, the conditions are invalid, or it has no files.
            NotRecordedError: The trace has no such label, or no tokens.
            TraceFileError: The trace cannot be read.
            StateError: The view is closed.
        """
        run = self._runs[self._runs.names[0] if name is None else name]
        if not run.paths:
            raise OptionError(
                f"report: {name!r} is in no file: grutrace.report(trace, 'report.html') makes it"
            )
        conditions = parse_conditions(select)
        paths = run.paths[0] if len(run.paths) == 1 else run.paths
        with self._lock, open_trace(paths) as trace:
            return make_report(
                trace.select(**conditions) if conditions else trace, self._require_open
            )

    def close(self) -> None:
        """End the report that is being made at its next part."""
        self._is_closing = True

    def _require_open(self, _done: int, _total: int) -> None:
        if self._is_closing:
            raise StateError("the view is closed")


class ReportHandler(RequestHandler):
    """Answers with the report of a run."""

    def initialize(self, reports: Reports) -> None:
        """Take what makes reports."""
        self._reports = reports

    async def get(self) -> None:
        """Make the report in another thread, and send it."""
        name = self.get_query_argument("run", None, strip=False)
        select = self.get_query_argument("select", "")
        loop = asyncio.get_running_loop()
        try:
            page = await loop.run_in_executor(None, self._reports.make, name, select)
        except GrutraceError as error:
            self.set_status(400)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            page = f"{error}\n"
        self.finish(page)
