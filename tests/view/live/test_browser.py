"""A real browser clicks through the live view."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.view.live.serve import view
from tests.view.live.browser import LivePage, open_browser
from tests.view.live.planted import (
    ROUND,
    SQUARE,
    bracket_layer,
    depths,
    one_hot,
    record_brackets,
)

#: A token that would run a script if it were markup.
MARKUP = "<img src=x onerror='window.stolen = 1'>"


#: The elements of a page, whether a script of a token ran, and whether the token is text.
ELEMENTS = """(() => {
  const every = (root) => [...root.querySelectorAll('*')].flatMap(
    (e) => [e, ...(e.shadowRoot ? every(e.shadowRoot) : [])])
  const elements = every(document)
  const text = elements.filter((e) => !['SCRIPT', 'STYLE'].includes(e.tagName))
    .flatMap((e) => [...e.childNodes].filter((n) => n.nodeType == 3))
    .map((n) => n.textContent)
  return {tags: elements.map((e) => e.tagName), stolen: window.stolen ?? null,
          shown: text.some((t) => t.includes('<img src=x onerror'))}
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def brackets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    path = tmp_path_factory.mktemp("view") / "brackets.h5"
    return path, record_brackets(path, sentences=40)


def bracket_positions(texts: list[list[str]], opening: str, closing: str) -> list[tuple[int, ...]]:
    """Sequence, first step and end of every bracket."""
    found = []
    for number, letters in enumerate(texts):
        start = 0
        for step, letter in enumerate(letters):
            start = step if letter == opening else start
            if letter == closing:
                found.append((number, start, step))
    return found


def test_marking_a_stretch_finds_its_unit_and_its_matches(
    browser: Any, brackets: tuple[Path, list[list[str]]]
) -> None:
    path, texts = brackets
    places = bracket_positions(texts, "[", "]")
    number, start, stop = next(
        place for place in places if place[0] < 8 and place[2] > place[1] + 1
    )
    with view(path, browser=False) as live:
        shown = LivePage(browser, live.url)
        total = sum(map(len, texts))
        assert f"{total:,} of {total:,} steps, of 40 sequences" in shown.text("status")
        assert "every step is read" in shown.text("status")
        shown.set("sequence", str(number))
        shown.wait("Bokeh.documents[0].get_model_by_name('status').text.includes('1 sequence ')")
        first = sum(map(len, texts[:number]))
        assert shown.visible() == (first, first + len(texts[number]))
        shown.drag("tokens", first + start + 0.2, first + stop - 0.2, -13)
        shown.wait("Bokeh.documents[0].get_model_by_name('units').value != ''")
        assert shown.value("mark") == f"{number}.{start}-{number}.{stop}"
        assert shown.value("units") == str(SQUARE)
        shown.click("Find matches")
        count = len(places) - 1
        shown.wait(f"Bokeh.documents[0].get_model_by_name('progress').text.startsWith('{count} m')")
        shown.settle()
        link = shown.page.url
        # The first match has the same length, and is the first of the file.
        others = [place for place in places if place != (number, start, stop)]
        best = min(others, key=lambda p: (abs(p[2] - p[1] - (stop - start)), p[0], p[1]))
        shown.page.mouse.click(*shown.place("matches", 6.5, -0.5))
        target = sum(map(len, texts[: best[0]])) + best[1]
        shown.wait(
            "Bokeh.documents[0].get_model_by_name('picture').x_range.start"
            f" == {max(0, target - 20)}"
        )
        shown.close()
        again = LivePage(browser, link)
        assert again.value("mark") == f"{number}.{start}-{number}.{stop}"
        assert again.value("units") == str(SQUARE)
        assert again.visible() == (first, first + len(texts[number]))
        again.wait(f"Bokeh.documents[0].get_model_by_name('progress').text.startsWith('{count} m')")
        again.close()


def test_zooming_reads_the_window(browser: Any, brackets: tuple[Path, list[list[str]]]) -> None:
    path, texts = brackets
    total = sum(map(len, texts))
    with grutrace.open(path) as trace, view(path, browser=False) as live:
        shown = LivePage(browser, live.url + "?site=l0&quantity=update")
        shown.page.mouse.move(*shown.place("picture", total / 2, 6))
        for _ in range(4):
            shown.page.mouse.wheel(0, -400)
            shown.settle()
        start, end = shown.visible()
        assert 0 < start < total / 2 < end < total
        image = shown.page.evaluate(
            """(() => {
              const figure = Bokeh.documents[0].get_model_by_name('picture')
              const data = figure.renderers[0].data_source.data
              return {values: Array.from(data.image[0]), shape: data.image[0].shape, x: data.x[0],
                      dw: data.dw[0]}
            })()"""
        )
        first, last = int(start), int(np.ceil(end))
        assert (image["x"], image["dw"]) == (first, last - first)
        rows = np.concatenate([sequence.update for sequence in trace["l0"]])[first:last]
        assert image["shape"] == [12, last - first]
        picture = np.reshape(image["values"], image["shape"])
        np.testing.assert_allclose(picture, rows.T, atol=1e-6)
        assert "steps=" in shown.page.url
        shown.page.mouse.move(*shown.place("picture", first + 2.5, ROUND + 0.5))
        shown.wait("Bokeh.documents[0].get_model_by_name('pointer').text.includes('unit 5')")
        sequence = int(np.searchsorted(np.cumsum([0, *map(len, texts)]), first + 2, "right")) - 1
        step = first + 2 - sum(map(len, texts[:sequence]))
        text = shown.text("pointer")
        assert f"sequence {sequence}, step {step}" in text
        assert f"token {texts[sequence][step]}" in text
        assert f"depth {depths(texts[sequence])[step]}" in text
        assert f"update {rows[2, ROUND]:.4g}" in text
        shown.close()


def test_a_moved_window_is_read_and_sent_once(browser: Any, tmp_path: Path) -> None:
    """Also while no tick is in view: the frame of the picture keeps its size."""
    path = tmp_path / "long.h5"
    layer = nn.GRU(2, 8)
    with torch.no_grad(), grutrace.trace(layer, path):
        for _ in range(8):
            layer(torch.randn(200, 5, 2))
    with view(path, browser=False) as live:
        shown = LivePage(browser, live.url + "?site=l0&quantity=hidden")
        shown.page.evaluate(
            """(() => {
              window.pictures = []
              const figure = Bokeh.documents[0].get_model_by_name('picture')
              const source = figure.renderers[0].data_source
              source.properties.data.change.connect(() => window.pictures.push(source.data.x[0]))
              window.sizes = []
              figure.properties.inner_height.change.connect(() => sizes.push(figure.inner_height))
            })()"""
        )
        # No tick of the whole file, or of the window before, is within the next.
        for start in (1010, 4050, 2210):
            shown.page.evaluate(
                """(start) => {
                  const range = Bokeh.documents[0].get_model_by_name('picture').x_range
                  range.setv({start, end: start + 40})
                }""",
                start,
            )
            shown.wait(f"window.pictures.includes({start})")
            shown.settle()
        # Pictures of the whole file, at 0, may still have been on their way.
        moved = shown.page.evaluate("window.pictures.filter((x) => x != 0)")
        assert moved == [1010, 4050, 2210]
        assert shown.page.evaluate("window.sizes") == []
        shown.close()


def test_texts_of_a_trace_are_never_markup(browser: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({MARKUP.replace(".", "") + "$$x$$": nn.GRU(2, 3)})
    layer = next(iter(model.values()))
    with torch.no_grad(), grutrace.Tracer(model, tmp_path / "<b>run.h5", recording=False) as tracer:
        labels = {MARKUP: [[MARKUP, "$$\\frac{1}{2}$$", "<script>window.stolen = 2</script>"]]}
        with tracer.recording(tag=MARKUP, tokens=[[MARKUP, "$$x$$", "&lt;"]], labels=labels):
            layer(torch.full((3, 1, 2), torch.nan))
    (tmp_path / "<i>b.h5").write_bytes((tmp_path / "<b>run.h5").read_bytes())
    with view(tmp_path, browser=False) as live:
        shown = LivePage(browser, live.url + "?beside=%3Ci%3Eb.h5&mark=0.0-0.2")
        shown.page.mouse.move(*shown.place("tokens", 0.5, -13))
        shown.wait("Bokeh.documents[0].get_model_by_name('pointer').text.includes('token')")
        assert "<img" in shown.text("pointer")
        shown.set("select", f"tag={MARKUP}")
        shown.set("mark", MARKUP)
        shown.wait("Bokeh.documents[0].get_model_by_name('problem').visible")
        found = shown.page.evaluate(ELEMENTS)
        assert found["stolen"] is None
        assert found["shown"]
        assert not {"IMG", "B", "I", "MJX-CONTAINER"} & set(found["tags"])
        # The control: the same text as markup is found, and would run.
        shown.page.evaluate("(text) => document.body.insertAdjacentHTML('beforeend', text)", MARKUP)
        shown.wait("window.stolen === 1")
        found = shown.page.evaluate(ELEMENTS)
        assert found["stolen"] == 1
        assert "IMG" in found["tags"]
        shown.page.close()


def test_a_growing_file_is_followed(browser: Any, tmp_path: Path) -> None:
    layer, letters = bracket_layer(), list("ab(cc)a[b]")
    with torch.no_grad(), grutrace.Tracer(layer, tmp_path / "live.h5", recording=False) as tracer:

        def record(times: int) -> None:
            for _ in range(times):
                with tracer.recording(tokens=[letters]):
                    layer(one_hot(letters))
            tracer.flush()

        record(2)
        with view(tmp_path / "live.h5", browser=False) as live:
            shown = LivePage(browser, live.url)
            assert "20 of 20 steps, of 2 sequences" in shown.text("status")
            for times, steps in ((1, 30), (60, 630)):
                record(times)
                shown.wait(
                    "Bokeh.documents[0].get_model_by_name('status').text.includes("
                    f"'of {steps} steps')"
                )
                assert shown.visible() == (max(0, steps - 400), steps)
            shown.close()


def test_two_runs_are_shown_side_by_side(
    browser: Any, brackets: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    path, _ = brackets
    (tmp_path / "one.h5").write_bytes(path.read_bytes())
    record_brackets(tmp_path / "two.h5", sentences=50)
    with view(tmp_path, browser=False) as live:
        shown = LivePage(browser, live.url + "?run=one.h5&beside=two.h5&steps=3.0-3.9")
        images = shown.page.evaluate(
            """['picture', 'beside'].map((n) => Bokeh.documents[0].get_model_by_name(n)).map(
              (f) => ({visible: f.visible, title: f.title.text,
                       values: Array.from(f.renderers[0].data_source.data.image[0])}))"""
        )
        assert [image["title"] for image in images] == ["one.h5", "two.h5"]
        assert all(image["visible"] for image in images)
        # The first 40 sentences are the same.
        assert images[0]["values"] == images[1]["values"]
        shown.close()
