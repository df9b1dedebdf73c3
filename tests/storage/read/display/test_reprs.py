"""Reprs of traces, sites and sequences: what is in them, small, quick, and never markup."""

from __future__ import annotations

import base64
import re
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.memory import MemorySink
from grutrace.storage.read.display import html_reprs
from grutrace.storage.read.display.thumbnails import thumbnail
from grutrace.storage.read.trace import Trace
from tests.storage.streams import Stream, make_header, make_module

#: Limits that the documentation states.
MAX_SECONDS, MAX_CHARS = 0.05, 50_000

TAGS = {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "img", "code"}
HOSTILE = (
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;", "</table>"),
    *("\x00\x1b[31m", "'", "x" * 5000),
)


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(page: str) -> Page:
    """Check that a page has only the known tags and attributes, each closed."""
    assert len(page) < MAX_CHARS
    parsed = Page(page)
    assert not parsed.open
    assert set(parsed.tags) <= TAGS
    for name, value in parsed.attributes:
        assert name in ("style", "src", "width", "height", "alt", "title")
        assert name != "src" or (value or "").startswith("data:image/png;base64,")
    return parsed


def decode(uri: str) -> np.ndarray:
    """The colours of a picture, (height, width, 3), read as the PNG specification says."""
    data = base64.b64decode(uri.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        (size,) = struct.unpack(">I", data[position : position + 4])
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack(">I", data[position + 8 + size : position + 12 + size])
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = content
        position += 12 + size
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, color) == (8, 3)
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return palette[lines[:, 1:]]


def test_a_picture_has_steps_from_left_to_right_and_units_downwards() -> None:
    values = np.zeros((4, 3))
    values[3, 0], values[0, 2], values[1, 1] = 1.0, 0.5, np.nan
    colours = decode(thumbnail(values, signed=False)[0])
    assert colours.shape == (3, 4, 3)
    assert colours[0, 3].tolist() == [253, 231, 37]
    assert colours[0, 0].tolist() == [68, 1, 84]
    assert colours[1, 1].tolist() == [128, 128, 128]
    assert colours[2, 0].tolist() == [33, 145, 140]
    signed = decode(thumbnail(np.array([[-1.0, 0.0, 1.0, 4.0]]) / 4, signed=True)[0])
    assert len({tuple(colour) for colour in signed[:, 0].tolist()}) == 4
    assert signed[1, 0].tolist() == [247, 247, 247]


def test_the_colours_are_those_of_matplotlib() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 33)[:, np.newaxis]
    colours = decode(thumbnail(values, signed=False)[0])[0]
    expected = matplotlib.colormaps["viridis"](values[:, 0], bytes=True)[:, :3]
    # Nine points of it, and lines between them.
    assert np.abs(colours.astype(int) - expected).mean() < 3
    others = matplotlib.colormaps["plasma"](values[:, 0], bytes=True)[:, :3]
    assert np.abs(colours.astype(int) - others).mean() > 30


@pytest.mark.parametrize("shape", [(1, 1), (500, 3), (3, 999), (64, 32), (65, 33), (1, 0)])
def test_a_picture_is_small(shape) -> None:
    uri, width, height = thumbnail(np.full(shape, np.nan), signed=False)
    colours = decode(uri)
    assert colours.shape[:2] == tuple(
        min(size, -(-size // -(-size // limit)) if size else 0)
        for size, limit in ((shape[1], 32), (shape[0], 64))
    )
    assert (width, height) <= (192, 64)


def model_trace(path: Path | None = None, **options: Any) -> grutrace.Tracer:
    torch.manual_seed(0)
    model = nn.GRU(4, 6, 2)
    words = [["the", "ant", "sleeps"], ["a", "bee", "flies"]]
    with grutrace.trace(model, path, **options) as tracer:
        for tag in ("train", "valid"):
            with tracer.recording(tag=tag, tokens=words, labels={"pos": [[1, 2, 3], [1, 2, 3]]}):
                model(torch.randn(3, 2, 4))
    return tracer


def test_what_is_in_here() -> None:
    trace = model_trace()
    assert repr(trace).splitlines() == [
        "<trace of torch.nn.modules.rnn.GRU in memory: 2 sites, 2 calls, 4 sequences",
        "    l0: 4 sequences, 12 steps of reset, update, candidate, hidden",
        "    l1: 4 sequences, 12 steps of reset, update, candidate, hidden",
        "    tags: train, valid",
        "    labels: tokens, pos>",
    ]
    selected = trace.select(tag="valid", tokens="a")
    assert repr(selected).startswith(
        "<selection (tag=valid, tokens=a) of the trace of torch.nn.modules.rnn.GRU in\n"
        "    memory: 2 sites, 1 call, 1 sequence\n"
    )
    assert repr(trace["l0"]).endswith("candidate, hidden\n    labels: tokens, pos>")
    assert repr(trace["l0"][1]) == "<sequence 1 of l0: 3 steps, tag 'train', tokens: a bee flies>"


def test_tables_of_a_notebook_show_what_is_in_the_trace() -> None:
    trace = model_trace()
    page = check_page(trace._repr_html_() or "")
    for text in ("2 sites, 2 calls, 4 sequences", "tags: train, valid", "GRU(4, 6)", "l1"):
        assert text in page.text
    assert page.tags.count("img") == 2
    site = trace["l1"]
    page = check_page(site._repr_html_())
    for text in ("4 sequences, 12 steps, 2 calls", "layer 1, forward", "sleeps", "residual: "):
        assert text in page.text
    assert page.tags.count("img") == 4
    (update,) = re.findall(r'<img src="([^"]*)"[^>]* alt="update of sequence 0', site._repr_html_())
    assert update == thumbnail(site[0].update, signed=False)[0]
    assert update != thumbnail(site[1].update, signed=False)[0]
    page = check_page(site[2]._repr_html_())
    for text in ("3 steps in 1 call, from call 1 on; began as new", "tag: valid", "ant"):
        assert text in page.text
    assert page.tags.count("img") == 4


def hostile_trace(count: int = 1) -> Trace:
    path = "<b>".join(HOSTILE[:2])
    modules = [make_module(f"{path}{number}", directions=(False,)) for number in range(count)]
    stream = Stream(make_header(*modules, model="<script>model</script>"))
    for module in range(count):
        stream.call([len(HOSTILE), 0], module=module, tag=HOSTILE[0])
    stream.annotate(0, "tokens", HOSTILE)
    for name in HOSTILE:
        stream.annotate(0, name, HOSTILE)
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    return Trace(sink)


def pages(trace: Trace) -> list[str]:
    site = trace[trace.sites[0]]
    return [trace._repr_html_() or "", site._repr_html_(), *(s._repr_html_() for s in site)]


def test_text_of_a_file_is_never_markup() -> None:
    for page in pages(hostile_trace()):
        check_page(page)
    tokens = check_page(hostile_trace()[hostile_trace().sites[0]][0]._repr_html_()).text
    assert "<script>alert(" in tokens


def test_control_markup_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(html_reprs, "escape", lambda text: text)
    with pytest.raises(AssertionError):
        check_page(pages(hostile_trace())[0])


def test_a_trace_of_many_sites_is_small() -> None:
    trace = hostile_trace(300)
    assert len(repr(trace)) < 2000
    assert "and 295 more sites" in repr(trace)
    assert "and 292 more sites" in check_page(trace._repr_html_() or "").text


def test_traces_without_anything() -> None:
    empty = grutrace.Tracer(nn.GRU(2, 3), record=("input",))
    for value in (empty, empty["l0"]):
        assert "0 sequences" in repr(value)
        assert "img" not in check_page(value._repr_html_() or "").tags
    statistics = grutrace.Statistics()
    counted = grutrace.Tracer(nn.GRU(2, 3), sink=statistics)
    assert "1 sites" in repr(counted)
    assert counted._repr_html_() is None
    for tracer in (empty, counted):
        tracer.close()


def test_deferred_gates_are_not_computed_for_a_picture(tmp_path: Path) -> None:
    model_trace(tmp_path / "run.h5", gates="deferred")
    with grutrace.open(tmp_path / "run.h5") as trace:
        page = check_page(trace["l0"]._repr_html_())
        assert "recomputed on reading: reset, update, candidate" in page.text
        # The stored ones: hidden and input.
        assert page.tags.count("img") == 2


@pytest.mark.parametrize("place", ["memory", "file"])
def test_ten_thousand_sequences(place, tmp_path: Path) -> None:
    model = nn.GRU(4, 32)
    path = tmp_path / "run.h5" if place == "file" else None
    with grutrace.trace(model, path) as tracer:
        for number in range(100):
            words = [[f"w{number}-{step}" for step in range(5)]] * 100
            with tracer.recording(tag=f"t{number}", tokens=words):
                model(torch.randn(5, 100, 4))
    trace: Trace = tracer
    if path is not None:
        trace = grutrace.open(path)
    assert len(trace["l0"]) == 10_000
    np.asarray(trace["l0"].update[:1])
    for value in (trace, trace["l0"], trace["l0"][9999], trace.select(tag="t7")):
        fastest = []
        for show in (repr, lambda shown: shown._repr_html_()):
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                shown = show(value)
                seconds.append(time.perf_counter() - start)
            fastest.append(min(seconds))
            assert len(shown) < MAX_CHARS
        assert max(fastest) < MAX_SECONDS
    if path is not None:
        trace.close()
