"""`PreparedPages`: pages whose widgets are made before a browser asks for them."""

from __future__ import annotations

from bokeh.document import Document
from tornado.ioloop import IOLoop

from grutrace.view.live.engine.runs import Runs
from grutrace.view.live.page import Page

#: Seconds after a page was opened until the next is made: the browser of the first waits no longer.
LATER = 0.5


class PreparedPages:
    """Opens pages, and keeps one in reserve. Making the widgets takes about 0.1 s.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        # What bokeh prepares for its first page is ready before the browser asks, too.
        Page(runs).start(Document())
        self._page: Page | None = Page(runs)

    def open(self, document: Document) -> None:
        """Open a page in an empty document of bokeh. Called in the server's loop."""
        page, self._page = self._page, None
        (page or Page(self._runs)).start(document)
        IOLoop.current().call_later(LATER, self._prepare)

    def _prepare(self) -> None:
        if self._page is None:
            self._page = Page(self._runs)
