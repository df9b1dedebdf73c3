"""The server of a live view: on this machine only, behind a random token.

A page of another site, a name that somebody's DNS points to this machine, and another user of this
machine without the address get nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from bokeh.application import Application as BokehApplication
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.resources import Resources
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from bokeh.server.views.static_handler import StaticHandler
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.routing import Router
from tornado.web import Application, RequestHandler

from grutrace.errors import OptionError, StateError
from grutrace.view.live.engine.runs import Runs
from grutrace.view.live.run_report import PATH as REPORT_PATH
from grutrace.view.live.run_report import ReportHandler, Reports

#: The address of the server: this machine.
ADDRESS = "127.0.0.1"

#: Names under which a browser of this machine reaches it. Any other name was made to lead here.
HOSTS = (ADDRESS, "localhost")

#: Bytes of randomness in the token of an address.
TOKEN_BYTES = 32

#: Paths below the token that are served: the page, its connection, reports, and scripts of bokeh.
_SERVED = re.compile(rf"/?|/ws|{REPORT_PATH}|/static/js/[\w.-]+")

#: Largest message that a page may send. Bytes.
MAX_MESSAGE = 1024 * 1024

#: Seconds until a page that was closed is forgotten.
SESSION_LIFETIME = 5

#: The page loads scripts from this server only, sends nothing anywhere else, and is in no frame.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' ws://{host}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _SafeHeaders(RequestHandler):
    """Adds the headers that keep other sites out."""

    def set_default_headers(self) -> None:
        super().set_default_headers()
        for name, value in _HEADERS.items():
            self.set_header(name, value.format(host=self.request.host))


class _Refusal(_SafeHeaders):
    """Answers a request that is refused, with no word about what is served."""

    def initialize(self, status: int) -> None:
        self._status = status

    async def prepare(self) -> None:
        self.send_error(self._status)

    def write_error(self, status_code: int, **kwargs: Any) -> None:  # noqa: ARG002
        self.set_header("Content-Type", "text/plain")
        self.finish("refused\n")


class _Report(_SafeHeaders, ReportHandler):
    """Answers with a report, with the same headers."""


def _no_log(handler: RequestHandler) -> None:
    """Log no request: its address has the token."""


class Guard(Router):
    """Lets requests pass to bokeh's application, websockets included, or refuses them.

    Args:
        make_page: Fills the document of a page that is opened.
        reports: Makes reports.
        token: The token in the address.
        port: Port of the server.

    Attributes:
        application: The application of bokeh.
    """

    def __init__(
        self, make_page: Callable[[Document], None], reports: Reports, token: str, port: int
    ) -> None:
        self._reports, self._token = reports, token
        self._hosts = {f"{host}:{port}" for host in HOSTS}
        self._refusals = Application([], log_function=_no_log)
        self.application = BokehTornado(
            {"/": BokehApplication(FunctionHandler(make_page))},
            prefix=token,
            extra_websocket_origins=sorted(self._hosts),
            secret_key=secrets.token_bytes(TOKEN_BYTES),
            sign_sessions=True,
            websocket_max_message_size_bytes=MAX_MESSAGE,
            unused_session_lifetime_milliseconds=SESSION_LIFETIME * 1000,
            check_unused_sessions_milliseconds=SESSION_LIFETIME * 1000,
            include_headers=[],
            include_cookies=[],
            log_function=_no_log,
        )
        self.application.resources = self._resources
        for rule in self.application.wildcard_router.rules:
            # Every answer has the headers that keep other sites out.
            rule.target = type(rule.target.__name__, (_SafeHeaders, rule.target), {})

    def refusal(self, request: HTTPServerRequest) -> int | None:
        """Return the status with which a request is refused, or None."""
        if request.host not in self._hosts:
            return 403
        origin = request.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self._hosts}:
            return 403
        token, path = request.path[1 : len(self._token) + 1], request.path[len(self._token) + 1 :]
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return 404
        if not _SERVED.fullmatch(path):
            return 404
        # Another site may link to the page, but not use it in a script, a picture or a frame.
        is_foreign = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        if is_foreign and request.headers.get("Sec-Fetch-Dest") != "document":
            return 403
        return None

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> HTTPMessageDelegate | None:
        """Return the handler of a request, or the refusal."""
        status = self.refusal(request)
        if status is not None:
            return self._refusals.get_handler_delegate(request, _Refusal, {"status": status})
        if request.path == f"/{self._token}{REPORT_PATH}":
            return self._refusals.get_handler_delegate(request, _Report, {"reports": self._reports})
        handler: HTTPMessageDelegate = self.application.find_handler(request, **kwargs)
        return handler

    def _resources(self, absolute_url: str | bool | None = None) -> Resources:  # noqa: ARG002
        """Return the scripts that the page needs, of this server: fewer load faster."""
        return Resources(
            mode="server",
            root_url=f"/{self._token}",
            path_versioner=StaticHandler.append_version,
            components=["bokeh", "bokeh-widgets"],
        )


def _listen(port: int) -> socket.socket:
    """Return a socket that listens to a port of this machine only.

    Raises:
        StateError: The port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # A port whose last connections are still being forgotten can be used again.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((ADDRESS, port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise StateError(f"port {port} of {ADDRESS} cannot be opened: {reason}") from None
    return listener


class LiveServer:
    """A server in a thread of its own.

    Args:
        make_page: Fills the document of a page that is opened.
        runs: The runs that reports are about.
        port: The port; 0 for any free one.

    Attributes:
        port: The port.
        token: The token in the address.

    Raises:
        OptionError: The port is not between 0 and 65535.
        StateError: The port is in use.
    """

    def __init__(self, make_page: Callable[[Document], None], runs: Runs, port: int = 0) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise OptionError(f"port: expected a number from 0 to 65535; found {port!r}")
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        self._make_page, self._reports = make_page, Reports(runs)
        self._started = threading.Event()
        self._loop: IOLoop | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="grutrace-view", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.port}/{self.token}/"

    def _run(self) -> None:
        asyncio.set_event_loop(asyncio.new_event_loop())
        loop = IOLoop.current()
        try:
            guard = Guard(self._make_page, self._reports, self.token, self.port)
            http_server = HTTPServer(guard)
            http_server.add_socket(self._socket)
            server = BaseServer(loop, guard.application, http_server)
            server.start()
        except BaseException as error:
            self._socket.close()
            self._failure = error
            self._started.set()
            return
        self._loop = loop
        loop.add_callback(self._started.set)
        # NaN and infinity in a file cause no NumPy warnings.
        with np.errstate(all="ignore"):
            loop.start()
        server.stop()
        http_server.stop()
        loop.run_sync(asyncio.get_event_loop().shutdown_default_executor)
        loop.run_sync(http_server.close_all_connections, timeout=5)
        loop.close(all_fds=True)

    def close(self) -> None:
        """Close all pages, and stop. Closing twice has no effect."""
        loop, self._loop = self._loop, None
        if loop is not None:
            self._reports.close()
            loop.add_callback(loop.stop)
            self._thread.join()

    def wait(self) -> None:
        """Wait until the server stops."""
        self._thread.join()
