"""A folder over HTTP, on this machine, with byte ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: Names that the server treats in a way of its own.
WHOLE, SECRET = "whole.h5", "secret.h5"


@dataclass
class Server:
    """A folder over HTTP, with byte ranges, and the bytes that it has sent."""

    url: str
    folder: Path
    sent: list[int] = field(default_factory=list)


def make_handler(folder: Path, sent: list[int]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            name = self.path.strip("/")
            path = folder / name
            if name == SECRET and self.headers.get("Authorization") != "me":
                self.send_error(401)
                return
            if not path.exists():
                self.send_error(404)
                return
            body, span = path.read_bytes(), self.headers.get("Range")
            if span is None or name == WHOLE:
                self.send_response(200)
            else:
                start, _, last = span.removeprefix("bytes=").partition("-")
                stop = int(last) + 1 if last else len(body)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
                body = body[int(start) : stop]
            if name != WHOLE:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                sent.append(len(body))
                self.wfile.write(body)

    return Handler


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve the files of a folder."""
    sent = list[int]()
    web = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(folder, sent))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{web.server_port}/", folder, sent)
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
