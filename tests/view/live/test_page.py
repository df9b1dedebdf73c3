"""What the widgets of a page do, without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("bokeh", reason="needs the extra view")

from bokeh.document import Document

import grutrace
from grutrace.view.live import page as page_module
from grutrace.view.live.engine import search as search_module
from grutrace.view.live.engine.runs import Runs, find_runs
from grutrace.view.live.page import Page
from tests.view.live.planted import SQUARE, record_brackets


class ShownPage:
    """A page that no browser shows, opened at this query string."""

    def __init__(self, runs: Runs, query: str = "") -> None:
        self.document = Document()
        arguments = {
            name: [value.encode() for value in values] for name, values in parse_qs(query).items()
        }
        session = SimpleNamespace(connection_count=1)
        request = SimpleNamespace(arguments=arguments)
        context = SimpleNamespace(session=session, request=request)
        self.document._session_context = lambda: context  # type: ignore[assignment]
        self.page = Page(runs)
        self.page.start(self.document)
        self.page.complete()

    def __getitem__(self, name: str) -> Any:
        return self.document.get_model_by_name(name)

    @property
    def problem(self) -> str:
        """The message of the page, empty without one."""
        return self["problem"].text if self["problem"].visible else ""

    def work(self) -> None:
        """Do what the page does in the background."""
        for _ in range(1000):
            self.tick()

    def tick(self) -> None:
        """Do a slice of work, without a rest after the last."""
        self.page._runs.rest_until = 0
        self.page._tick()

    def show(self) -> None:
        """Show what was scheduled."""
        self.page._show_scheduled()


@pytest.fixture(scope="module")
def brackets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    path = tmp_path_factory.mktemp("page") / "brackets.h5"
    return path, record_brackets(path, sentences=12)


@pytest.fixture
def runs(brackets: tuple[Path, list[list[str]]]) -> Iterator[Runs]:
    runs = find_runs(brackets[0])
    yield runs
    runs.close()


def first_square(texts: list[list[str]]) -> tuple[int, int, int]:
    """Sequence, first step and end of the first pair of square brackets."""
    number = next(number for number, letters in enumerate(texts) if "[" in letters)
    return number, texts[number].index("["), texts[number].index("]")


def test_a_link_is_opened_and_written_again(
    runs: Runs, brackets: tuple[Path, list[list[str]]]
) -> None:
    number, start, stop = first_square(brackets[1])
    mark = f"{number}.{start}-{number}.{stop}"
    query = (
        f"site=l0&quantity=hidden&statistic=max&order=mean&select=length%3D5%3A"
        f"&steps={number}.0-{number}.8&units=1-9&mark={mark}&on=%3E0.6&around=1-0&least=1&search=1"
    )
    shown = ShownPage(runs, query)
    assert shown.problem == ""
    assert shown["units"].value == str(SQUARE)
    assert shown["threshold"].value == 0.6
    shown.work()
    assert shown["link"].text == query
    assert "matches in all" in shown["progress"].text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("steps=99.0-99.3", "link: steps: the trace does not have these steps"),
        ("steps=x", "link: steps: expected numbers such as 3.5-3.9; found 'x'"),
        ("run=other.h5", "link: run: expected a run of this view; found 'other.h5'"),
        ("mark=0.0-0.999", "mark: the trace does not have these steps"),
        ("select=tag%3Dnone", "no sequence has tag=none"),
        ("statistic=sum", "link: statistic: expected one of mean, min, max; found 'sum'"),
    ],
)
def test_what_a_link_has_wrong_is_said(runs: Runs, query: str, message: str) -> None:
    assert message in ShownPage(runs, query).problem


def test_wrong_texts_in_widgets_are_said(runs: Runs) -> None:
    shown = ShownPage(runs)
    for name, text, message in (
        ("sequence", "99", "there is no sequence 99; there are 12"),
        ("sequence", "one", "sequence: expected a number; found 'one'"),
        ("mark", "1.2", "mark: expected numbers such as 3.5-3.9; found '1.2'"),
        ("units", "99", "units: expected numbers of units of this site; found '99'"),
        ("select", "valid", "select: expected conditions such as"),
    ):
        shown[name].value = text
        assert message in shown.problem


def test_other_quantities_keep_the_steps(runs: Runs) -> None:
    shown = ShownPage(runs, "quantity=hidden&steps=2.1-2.6")
    visible = shown["picture"].x_range.start, shown["picture"].x_range.end
    shown["quantity"].value = "update"
    assert (shown["picture"].x_range.start, shown["picture"].x_range.end) == visible
    assert "quantity=update" in shown["link"].text
    image = shown["picture"].renderers[0].data_source.data["image"][0]
    with grutrace.open(runs["brackets.h5"].paths[0]) as trace:
        assert np.array_equal(image, trace["l0"].sequence(2).update[1:6].T)


def test_a_search_can_be_stopped(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "BLOCK", 1)
    monkeypatch.setattr(page_module, "SLICE", 0)
    shown = ShownPage(runs, "quantity=hidden&mark=0.0-0.2")
    shown["units"].value = "1, 2"
    shown.page._stretches.toggle_search()
    for _ in range(5):
        shown.tick()
    shown.page._stretches.toggle_search()
    assert shown["progress"].text.startswith("Stopped at")
    assert shown["find"].label == "Find matches"
    shown.page._stretches.toggle_search()
    shown.work()
    assert "in all" in shown["progress"].text


def test_many_sites_are_offered_in_part(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.GRUCell(1, 1) for _ in range(230)])
    with torch.no_grad(), grutrace.trace(model, tmp_path / "run.h5"):
        for cell in model:
            cell(torch.zeros(1, 1))
    runs = find_runs(tmp_path / "run.h5")
    shown = ShownPage(runs)
    assert len(shown["site"].options) == 200
    assert shown["site"].title == "Site (200 of 230)"
    assert shown["filter"].visible
    shown["filter"].value = "22"
    names = [name for name, _ in shown["site"].options]
    assert names == ["0.cell", "22.cell", "122.cell", *(f"{n}.cell" for n in range(220, 230))]
    runs.close()


def test_a_trace_without_rows_says_so_and_grows(tmp_path: Path) -> None:
    layer = nn.GRU(2, 3)
    with torch.no_grad(), grutrace.Tracer(layer, tmp_path / "live.h5") as tracer:
        runs = find_runs(tmp_path / "live.h5")
        shown = ShownPage(runs)
        assert shown["status"].text == "No steps are recorded yet."
        layer(torch.randn(4, 2, 2))
        tracer.flush()
        runs["live.h5"]._next_refresh = 0
        shown.page._look()
        assert shown["status"].text.startswith("8 of 8 steps, of 2 sequences")
        runs.close()


def test_a_run_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    record_brackets(tmp_path / "a.h5", sentences=2)
    (tmp_path / "b.h5").write_bytes(b"nothing")
    runs = find_runs(tmp_path)
    shown = ShownPage(runs, "run=b.h5")
    assert "b.h5" in shown.problem
    shown["run"].value = "a.h5"
    assert shown.problem == ""
    assert "2 sequences" in shown["status"].text
    runs.close()


def test_a_page_that_is_closed_costs_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ShownPage(runs, "mark=0.0-0.2")
    shown["units"].value = "1"
    shown.page._stretches.toggle_search()
    shown.document.session_context.session.connection_count = 0
    shown.work()
    assert "in all" not in shown["progress"].text
    shown.document.session_context.session.connection_count = 1
    shown.work()
    assert "in all" in shown["progress"].text


def test_the_link_to_the_report_has_the_run_and_the_selection(tmp_path: Path) -> None:
    name = 'a"><b>&run=x.h5'
    record_brackets(tmp_path / name, sentences=5)
    runs = find_runs(tmp_path / name)
    page = ShownPage(runs, "select=sequences%3D0%3A2")
    anchor = ElementTree.fromstring(page["report"].text)
    assert [anchor.tag, anchor.text, list(anchor)] == ["a", "Report", []]
    path, _, query = anchor.attrib["href"].partition("?")
    assert path == "./report"
    assert parse_qs(query) == {"run": [name], "select": ["sequences=0:2"]}
    runs.close()


def test_a_trace_in_memory_has_no_link_to_a_report() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2))
    assert not ShownPage(find_runs(trace))["report"].visible
