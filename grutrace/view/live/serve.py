"""`view`: open traces in the browser.

`import grutrace` imports this module, so it imports what it needs when it is called.
"""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from grutrace.errors import require_extra

if TYPE_CHECKING:
    from grutrace.storage.read.trace import Trace
    from grutrace.view.live.engine.runs import Runs
    from grutrace.view.live.server import LiveServer


class LiveView:
    """A live view that is being served. Use it as a context manager, or close it.

    Attributes:
        url: The address of the page. Its random token keeps others out; share it with people who
            may see the traces.
    """

    def __init__(self, server: LiveServer, runs: Runs) -> None:
        self._server, self._runs = server, runs
        self.url = server.url

    def __repr__(self) -> str:
        return f"<live view at {self.url}>"

    def wait(self) -> None:
        """Wait until the view is closed, or for an interruption."""
        self._server.wait()

    def close(self) -> None:
        """Close the pages and the files. Closing twice has no effect."""
        self._server.close()
        self._runs.close()

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def view(
    path: str | os.PathLike[str] | Trace | Sequence[str | os.PathLike[str] | Trace],
    *,
    port: int = 0,
    browser: bool = True,
) -> LiveView:
    """Show traces in the browser: heatmaps, tokens, and stretches with the same units on.

    A server on this machine answers from a thread of its own. It listens to 127.0.0.1 only, needs
    the random token in its address, refuses pages of other sites, and opens no file but these.

    Args:
        path: A trace file, also one that is being written, or its URL; a glob for shards; a folder
            with the files of several runs; an open trace; or several of these.
        port: The port; 0 for any free one.
        browser: Whether to open the page in the browser.

    Raises:
        MissingExtraError: bokeh is not installed.
        OptionError: There is no path, or the port is not between 0 and 65535.
        StateError: The port is in use.
        TraceFileError: A path does not exist, or is not a trace.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru, "run.h5"):
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> with grutrace.view("run.h5", browser=False) as view:
        ...     print(view.url.startswith("http://127.0.0.1:"))
        True
    """
    with require_extra("view", "view"):
        from grutrace.view.live.engine.runs import find_runs
        from grutrace.view.live.prepared_pages import PreparedPages
        from grutrace.view.live.server import LiveServer

    runs = find_runs(path)
    try:
        server = LiveServer(PreparedPages(runs).open, runs, port)
    except BaseException:
        runs.close()
        raise
    if browser:
        webbrowser.open(server.url)
    return LiveView(server, runs)
