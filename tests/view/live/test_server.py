"""Who gets an answer from the server of a live view, and who does not."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bokeh", reason="needs the extra view")

import socket

from bokeh.document import Document
from tornado.httpclient import HTTPRequest
from tornado.iostream import IOStream
from tornado.websocket import websocket_connect

import grutrace
from grutrace.errors import OptionError, StateError, TraceFileError
from grutrace.view.live import prepared_pages, run_report
from grutrace.view.live.engine.runs import Runs, find_runs
from grutrace.view.live.page import Page
from grutrace.view.live.prepared_pages import PreparedPages
from grutrace.view.live.serve import LiveView, view
from tests.view.live.planted import record_brackets


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "run.h5"
    record_brackets(path, sentences=5)
    return path


@pytest.fixture
def live(trace_file: Path) -> Iterator[LiveView]:
    with view(trace_file, browser=False) as live:
        yield live


def address(live: LiveView) -> tuple[int, str]:
    """Port and token of a view."""
    match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", live.url)
    assert match is not None
    return int(match[1]), match[2]


def get(live: LiveView, path: str, **headers: str) -> tuple[int, bytes, Any]:
    port, _ = address(live)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    result = response.status, response.read(), response.headers
    connection.close()
    return result


def test_the_page_and_its_scripts_need_the_token(live: LiveView) -> None:
    _, token = address(live)
    script = f"/{token}/static/js/bokeh.min.js"
    assert len(token) >= 43
    for path in (f"/{token}/", f"/{token}", script):
        assert get(live, path)[0] == 200
    wrong = "A" * len(token)
    for path in (
        "/",
        "",
        "/favicon.ico",
        script.replace(token, wrong),
        f"/{wrong}/",
        f"/{token}x/",
    ):
        status, body, _ = get(live, path)
        assert status == 404
        assert body == b"refused\n"
    for path in (
        f"/{token[:-1]}/",
        f"/{token.lower()}/",
        f"/{token}%00/",
    ):
        assert get(live, path)[0] == 404


def test_nothing_but_the_page_and_the_scripts_is_served(live: LiveView, trace_file: Path) -> None:
    _, token = address(live)
    for path in (
        *("metadata", "autoload.js", "static/extensions/x.js", "static/css/x.css"),
        *("static/js/../../../../../../etc/passwd", "static/js/%2e%2e/%2e%2e/__init__.py"),
        *("static/js//etc/passwd", trace_file.name, "static/js/" + str(trace_file)),
    ):
        assert get(live, f"/{token}/{path}")[0] in (403, 404), path


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "[::1]:{port}"]
)
def test_other_host_names_are_refused(live: LiveView, host: str) -> None:
    """A name that a DNS server of others points to this machine (DNS rebinding)."""
    port, token = address(live)
    for path in (f"/{token}/", f"/{token}/static/js/bokeh.min.js"):
        assert get(live, path, Host=host.format(port=port))[:2] == (403, b"refused\n")
    assert get(live, f"/{token}/", Host=f"localhost:{port}")[0] == 200


def test_other_origins_are_refused(live: LiveView) -> None:
    port, token = address(live)
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1"):
        assert get(live, f"/{token}/", Origin=origin)[0] == 403
    assert get(live, f"/{token}/", Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_other_sites_may_link_to_the_page_but_not_use_it(live: LiveView) -> None:
    _, token = address(live)
    for use in ("script", "image", "iframe", "empty"):
        status = get(live, f"/{token}/", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest=use)[0]
        assert status == 403, use
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Dest": "document"}
    assert get(live, f"/{token}/", **link)[0] == 200


def test_every_answer_has_the_headers_that_keep_others_out(live: LiveView) -> None:
    _, token = address(live)
    for path in (f"/{token}/", f"/{token}/static/js/bokeh.min.js", "/"):
        headers = get(live, path)[2]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers


def page_token(live: LiveView) -> str:
    """The token of bokeh's session, which the page holds."""
    page = get(live, f"/{address(live)[1]}/")[1].decode()
    found = re.search(r'"token":"([^"]+)"', page)
    assert found is not None
    return found[1]


async def until_closed(stream: IOStream) -> None:
    while not stream.closed():
        await asyncio.sleep(0.01)


async def connect(url: str, session: str, headers: dict[str, str]) -> bytes | str | None:
    connection = await websocket_connect(
        HTTPRequest(url, headers=headers, request_timeout=10), subprotocols=["bokeh", session]
    )
    assert connection.protocol is not None
    stream = connection.protocol.stream
    message = await asyncio.wait_for(connection.read_message(), 10)
    connection.close()
    # The client closes its socket only after the server has closed its own.
    await asyncio.wait_for(until_closed(stream), 10)
    return message


def test_the_websocket_needs_token_host_and_origin(live: LiveView) -> None:
    port, token = address(live)
    session = page_token(live)
    url = f"ws://127.0.0.1:{port}/{token}/ws"
    good = {"Origin": f"http://127.0.0.1:{port}"}
    assert "ACK" in str(asyncio.run(connect(url, session, good)))
    refused = [
        (f"/{'A' * len(token)}/ws", good, 404),
        ("/ws", good, 404),
        (f"/{token}/ws", {"Origin": "http://evil.example"}, 403),
        (f"/{token}/ws", {**good, "Host": f"evil.example:{port}"}, 403),
        (
            f"/{token}/ws",
            {"Origin": "http://evil.example", "Host": f"evil.example:{port}"},
            403,
        ),
    ]
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
        "Sec-WebSocket-Protocol": session,
    }
    assert get(live, f"/{token}/ws", **upgrade, **good)[0] == 101
    for path, headers, status in refused:
        assert get(live, path, **upgrade, **headers)[0] == status


def test_a_session_that_is_not_signed_is_closed(live: LiveView) -> None:
    port, token = address(live)
    url = f"ws://127.0.0.1:{port}/{token}/ws"
    session = page_token(live)
    forged = session[:-4] + ("AAAA" if session[-4:] != "AAAA" else "BBBB")
    # The server closes the connection without a message.
    assert asyncio.run(connect(url, forged, {"Origin": f"http://127.0.0.1:{port}"})) is None


def test_it_listens_on_this_machine_only(live: LiveView) -> None:
    port, _ = address(live)
    others = {
        info[4][0]
        for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        if not info[4][0].startswith("127.")
    }
    for other in others:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((other, port), timeout=2)
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass


def test_tokens_differ(trace_file: Path) -> None:
    with view(trace_file, browser=False) as first, view(trace_file, browser=False) as second:
        assert address(first)[1] != address(second)[1]


def test_closing_frees_the_port_and_closes_the_files(trace_file: Path) -> None:
    live = view(trace_file, browser=False)
    port, _ = address(live)
    live.close()
    live.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    with view(trace_file, port=port, browser=False) as again:
        assert address(again)[0] == port
        with pytest.raises(StateError, match=f"port {port} of 127.0.0.1 cannot be opened"):
            view(trace_file, port=port, browser=False)


def test_wrong_arguments_are_refused(trace_file: Path, tmp_path: Path) -> None:
    for port in (-1, 65536, "80", True):
        with pytest.raises(OptionError, match="port: expected a number from 0 to 65535; found"):
            view(trace_file, port=port, browser=False)  # type: ignore[arg-type]
    with pytest.raises(TraceFileError, match="does not exist"):
        view(tmp_path / "missing.h5", browser=False)


def test_it_is_a_name_of_the_package(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with grutrace.view(trace_file) as live:
        assert opened == [live.url]
        assert repr(live) == f"<live view at {live.url}>"


def test_a_report_is_that_of_the_trace(live: LiveView, trace_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    _, token = address(live)
    status, body, headers = get(live, f"/{token}/report?run={trace_file.name}")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    grutrace.report(trace_file, tmp_path / "report.html")
    assert findings(body.decode()) == findings((tmp_path / "report.html").read_text("utf-8"))


def test_a_report_of_selected_sequences(live: LiveView, trace_file: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    _, token = address(live)
    status, body, _ = get(live, f"/{token}/report?run={trace_file.name}&select=sequences%3D0%3A2")
    assert status == 200
    assert "Only sequences with sequences=0:2" in body.decode()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?run=other.h5", b"run: expected one of the runs of this view; found 'other.h5'"),
        ("?run=../run.h5", b"found '../run.h5'"),
        ("?select=nonsense", b"select: expected conditions such as"),
        ("?select=nolabel%3D%3Cb%3E", b"nolabel"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_line_of_text(
    live: LiveView, query: str, said: bytes
) -> None:
    _, token = address(live)
    status, body, headers = get(live, f"/{token}/report{query}")
    assert status == 400
    assert said in body
    assert headers["Content-Type"] == "text/plain; charset=utf-8"


def test_a_report_needs_the_token_and_the_host(live: LiveView) -> None:
    port, token = address(live)
    assert get(live, "/report")[0] == 404
    assert get(live, f"/{'A' * len(token)}/report")[0] == 404
    assert get(live, f"/{token}/report", Host=f"evil.example:{port}")[0] == 403
    assert (
        get(live, f"/{token}/report", Sec_Fetch_Site="cross-site", Sec_Fetch_Dest="iframe")[0]
        == 403
    )
    assert get(live, f"/{token}/report/../page")[0] in (403, 404)


def findings(page: str) -> list[str]:
    """The topics and states of the findings of a report, in order."""
    return re.findall(r'<li><a href="#finding-\d+">([^<]*)', page)


def test_a_view_that_closes_ends_its_report(trace_file: Path, monkeypatch) -> None:
    """Without waiting for all parts of it."""
    parts, begun = [], threading.Event()

    def make(trace: Any, progress: Any) -> str:
        for part in range(600):
            parts.append(part)
            begun.set()
            time.sleep(0.1)
            progress(part, 600)
        return "never"

    monkeypatch.setattr(run_report, "make_report", make)
    live = view(trace_file, browser=False)
    _, token = address(live)
    client = threading.Thread(target=get_refused, args=(live, f"/{token}/report"))
    client.start()
    begun.wait()
    live.close()
    client.join()
    assert len(parts) < 100


def get_refused(live: LiveView, path: str) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        get(live, path)


def test_each_page_has_widgets_of_its_own_made_before_it_is_asked_for(trace_file: Path) -> None:
    runs = find_runs(trace_file)
    made: list[Page] = []

    class CountedPage(Page):
        def __init__(self, runs: Runs) -> None:
            super().__init__(runs)
            made.append(self)

    async def open_pages() -> None:
        pages = PreparedPages(runs)
        assert len(made) == 2
        documents = [Document(), Document(), Document()]
        pages.open(documents[0])
        # The one in reserve.
        assert len(made) == 2
        pages.open(documents[1])
        assert len(made) == 3
        await asyncio.sleep(0.1)
        assert len(made) == 4
        pages.open(documents[2])
        assert len(made) == 4
        pictures = [document.get_model_by_name("picture") for document in documents]
        assert len(set(pictures)) == 3
        assert all(picture.renderers[0].data_source.data["image"] for picture in pictures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_pages, "Page", CountedPage)
        patch.setattr(prepared_pages, "LATER", 0.01)
        asyncio.run(open_pages())
    runs.close()
