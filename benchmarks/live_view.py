"""The live view in a real browser: pictures of a large trace, a search, and a run that it follows.

The server, the browser and the run share the cores of the machine.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grutrace
from benchmarks import long_traces
from benchmarks.figures import Figure, Target, measured, not_measured
from benchmarks.pairs import spread
from tests.view.live.browser import CHROMIUM, OPTIONS, PATIENCE

#: Bytes of the large trace.
SIZE = 4 * 1024**3

#: Loads of the page, and windows of each width.
LOADS, WINDOWS = 5, 17

#: Steps of the windows.
WIDTHS = (1_000, 10_000, 100_000)

#: A running model: seconds between its calls, calls of a block, and blocks with a page and without.
INTERVAL, CALLS, BLOCKS = 0.001, 4_000, 5

#: Shape of its calls.
STEPS, BATCH, HIDDEN = 20, 1, 64

#: Shows another window, and returns the milliseconds until it is painted.
MOVE = """([start, width]) => new Promise(resolve => {
  const figure = Bokeh.documents[0].get_model_by_name('picture')
  const began = performance.now()
  figure.x_range.setv({start, end: start + width})
  const look = () => {
    const data = figure.renderers[0].data_source.data
    if (data.x[0] <= start && data.x[0] + data.dw[0] >= start + width && data.dw[0] < 1.5 * width)
      requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - began)))
    else requestAnimationFrame(look)
  }
  requestAnimationFrame(look)
})"""

#: True when the first picture is there.
PAINTED = """window.Bokeh?.documents.length > 0 &&
  Bokeh.documents[0].get_model_by_name('picture')?.renderers[0].data_source.data.image.length > 0"""

#: The number of steps that the page has shown.
SHOWN = """Number(Bokeh.documents[0].get_model_by_name('status').text
  .match(/of ([0-9,]+) steps/)?.[1].replaceAll(',', '') ?? 0)"""


def figures(size: int = SIZE, calls: int = CALLS, blocks: int = BLOCKS) -> Iterator[Figure]:
    """Yield all figures; none without a browser."""
    try:
        from playwright import sync_api
    except ModuleNotFoundError as error:
        yield not_measured("the live view", f"{error.name} is not installed")
        return
    if CHROMIUM is None:
        yield not_measured("the live view", "chromium is not installed")
        return
    with sync_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        large = Path(folder, "large.h5")
        long_traces.write_wide(large, size, label="pos")
        yield from _of_a_large_trace(browser, large)
        large.unlink()
        yield from _of_a_run(browser, Path(folder, "run.h5"), calls, blocks)
        browser.close()


def _of_a_large_trace(browser: Any, path: Path) -> Iterator[Figure]:
    with grutrace.open(path) as trace:
        total = int(trace[trace.sites[0]].lengths.sum())
    with _server(path) as (url, process):
        loads = []
        for _ in range(LOADS):
            page, seconds = _open_page(browser, url)
            loads.append(seconds)
            page.close()
        yield measured("first picture of a large trace", spread(loads), Target(1.0), unit="s")
        page, _ = _open_page(browser, url)
        draw = np.random.default_rng(0)
        moves = []
        for width in (width for width in WIDTHS if width < total):
            starts = draw.integers(0, total - width, WINDOWS).tolist()
            times = [page.evaluate(MOVE, [start, width]) / 1000 for start in starts]
            moves += times
            yield measured(f"a changed window, {width:,} steps", spread(times), unit="s")
        yield measured("a changed window, all of these", spread(moves), Target(0.15), unit="s")
        began = time.perf_counter()
        page.evaluate(
            "Bokeh.documents[0].get_model_by_name('mark').value = '3.40-3.44',"
            "Bokeh.documents[0].get_model_by_name('units').value = '1, 2, 3'"
        )
        page.get_by_role("button", name="Find matches").click()
        page.wait_for_function(
            "Bokeh.documents[0].get_model_by_name('progress').text.includes(' in all ')",
            timeout=600_000,
        )
        yield Figure(
            "a search of the whole trace",
            time.perf_counter() - began,
            unit="s",
            details={"said": page.evaluate(_text("progress"))},
        )
        page.close()
        yield Figure("peak memory of the server", _peak(process), "MiB", Target(512.0))


def _of_a_run(browser: Any, path: Path, calls: int, blocks: int) -> Iterator[Figure]:
    """Yield what following a run takes, and how late the page is."""
    layer, x = torch.nn.GRU(HIDDEN, HIDDEN), torch.randn(STEPS, BATCH, HIDDEN)
    with torch.no_grad(), grutrace.Tracer(layer, path) as tracer:
        layer(x)
        tracer.flush()
        with _server(path) as (url, _):
            pairs, delays = [], []
            for _ in range(blocks):
                # The file is read in both blocks, so that they differ in the page alone.
                alone = _busy_seconds(layer, x, calls, _Delay(path).look)
                page, _seconds = _open_page(browser, url)
                delay = _Delay(path, page)
                followed = _busy_seconds(layer, x, calls, delay.look)
                delays += delay.seconds
                page.close()
                pairs.append(followed / alone)
    name = f"a run of {1 / INTERVAL:,.0f} calls a second that is followed, over one that is not"
    yield measured(name, spread(pairs), Target(1.03))
    yield measured(
        "from a row's commit to its picture", spread(delays), Target(1.0), unit="s",
        largest=max(delays),
    )  # fmt: skip


class _Delay:
    """Compares what a page shows with what is committed.

    Args:
        path: The file.
        page: The page; None to read the file alone.

    Attributes:
        seconds: For each time that rows were committed, how long it took until they were shown.
    """

    def __init__(self, path: Path, page: Any = None) -> None:
        self._trace, self._page = grutrace.open(path), page
        self._committed: list[tuple[float, int]] = []
        self.seconds: list[float] = []

    def look(self) -> None:
        """Read both."""
        self._trace.refresh()
        count = len(self._trace[self._trace.sites[0]].hidden)
        now = time.perf_counter()
        if self._page is None:
            return
        if not self._committed or count > self._committed[-1][1]:
            self._committed.append((now, count))
        shown, now = self._page.evaluate(SHOWN), time.perf_counter()
        while self._committed and self._committed[0][1] <= shown:
            self.seconds.append(now - self._committed.pop(0)[0])


def _busy_seconds(
    layer: torch.nn.GRU, x: torch.Tensor, calls: int, look: Callable[[], None]
) -> float:
    """Return the median time of a call of a run with pauses."""
    times = []
    due = time.perf_counter()
    for call in range(calls):
        began = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - began)
        if call % 100 == 99:
            look()
        due = max(due + INTERVAL, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
    return statistics.median(times)


@contextmanager
def _server(path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, and its address."""
    command = long_traces.command("view", str(path), "--no-browser")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.terminate()


def _open_page(browser: Any, url: str) -> tuple[Any, float]:
    """Open the page, and return it with the seconds until its first picture."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(PATIENCE)
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_function(PAINTED)
    return page, time.perf_counter() - began


def _text(name: str) -> str:
    return f"Bokeh.documents[0].get_model_by_name({name!r}).text"


def _peak(process: subprocess.Popen[str]) -> float:
    """Return the peak memory of a process, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
