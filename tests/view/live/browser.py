"""A real browser that looks at a live view: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

#: The browser, and how it starts: without its own traffic.
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

#: Milliseconds that a page has for anything.
PATIENCE = 20_000


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser; the test is skipped without one."""
    missing = [name for name in ("bokeh", "playwright") if find_spec(name) is None]
    missing += ["chromium"] if CHROMIUM is None else []
    if missing:
        assert "GRUTRACE_REQUIRE_PACKAGES" not in os.environ, f"not installed: {missing}"
        pytest.skip(f"needs {', '.join(missing)}")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class LivePage:
    """A page of a live view, and what it shows.

    Attributes:
        page: The page of playwright.
        problems: Errors of the page's scripts and loads from elsewhere.
    """

    def __init__(self, browser: Any, url: str, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 1000})
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, url))
        self.go(url)

    def _check(self, requested: str, url: str) -> None:
        host = url.split("/")[2]
        if not requested.startswith((f"http://{host}/", f"ws://{host}/", "data:", "blob:")):
            self.problems.append(f"request of {requested}")

    def go(self, url: str) -> None:
        """Open an address, and wait for the picture."""
        self.page.goto(url)
        self.wait("document.title.startsWith('grutrace') && window.Bokeh?.documents.length > 0")
        self.wait("Bokeh.documents[0].is_idle")
        # Sizes have been reported, and the picture of this size is here.
        self.settle()

    def wait(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        self.page.wait_for_function(condition)

    def settle(self) -> None:
        """Wait until the text of the status stays as it is."""
        last, same = "", 0
        for _ in range(100):
            now = self.text("status") + self.page.url
            same = same + 1 if now == last else 0
            last = now
            if same == 3:
                return
            self.page.wait_for_timeout(100)

    def value(self, name: str, attribute: str = "value") -> Any:
        """An attribute of a widget."""
        return self.page.evaluate(
            f"Bokeh.documents[0].get_model_by_name({name!r}).attributes[{attribute!r}]"
        )

    def text(self, name: str) -> str:
        """The text of a line of the page."""
        return str(self.value(name, "text"))

    def set(self, name: str, value: Any) -> None:
        """Set the value of a widget as a user does."""
        self.page.evaluate(
            "([name, value]) => { Bokeh.documents[0].get_model_by_name(name).value = value }",
            [name, value],
        )

    def visible(self) -> tuple[float, float]:
        """The visible positions."""
        start, end = self.page.evaluate(
            "(() => { const r = Bokeh.documents[0].get_model_by_name('picture').x_range;"
            " return [r.start, r.end] })()"
        )
        return start, end

    def place(self, figure: str, x: float, y: float) -> tuple[float, float]:
        """The place on the page of a point of a figure."""
        place = self.page.evaluate(
            """([name, x, y]) => {
              const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(name))
              const box = view.el.getBoundingClientRect()
              const {x_scale, y_scale} = view.frame
              return [box.left + x_scale.compute(x), box.top + y_scale.compute(y)]
            }""",
            [figure, x, y],
        )
        return place[0], place[1]

    def drag(self, figure: str, start: float, stop: float, y: float) -> None:
        """Drag over a figure with the mouse."""
        self.page.mouse.move(*self.place(figure, start, y))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(figure, (start + stop) / 2, y))
        self.page.mouse.move(*self.place(figure, stop, y))
        self.page.mouse.up()

    def click(self, name: str) -> None:
        """Click a button by its text."""
        self.page.get_by_role("button", name=name).click()

    def close(self) -> None:
        """Close the page; nothing may have failed in it."""
        self.page.close()
        assert self.problems == []
