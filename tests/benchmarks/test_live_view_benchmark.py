"""Tests of the measurement of the live view, in a real browser."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from benchmarks.live_view import figures
from tests.view.live.browser import CHROMIUM


@pytest.mark.skipif(
    "GRUTRACE_REQUIRE_PACKAGES" not in os.environ
    and (CHROMIUM is None or find_spec("playwright") is None),
    reason="needs chromium and playwright",
)
def test_every_figure_is_measured() -> None:
    found = list(figures(size=20 * 1024**2, calls=400, blocks=1))
    values = {figure.name: figure.value for figure in found}
    assert len(values) == 7
    assert all(value is not None and value > 0 for value in values.values())
    # The page shows rows some time after they are committed, and the run takes about as long.
    assert found[-1].details["largest"] < 5
    assert 0.3 < values[found[-2].name] < 3  # type: ignore[operator]
    search = next(figure for figure in found if figure.name == "a search of the whole trace")
    assert "in all 8,192 steps" in search.details["said"]
