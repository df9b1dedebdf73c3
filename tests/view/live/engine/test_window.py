"""Windows against means, minima and maxima of NumPy, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.storage.read.lazy_rows import MemoryRows
from grutrace.view.live.engine import window as window_module
from grutrace.view.live.engine.step_axis import StepAxis, step_axis
from grutrace.view.live.engine.window import STATISTICS, Span, Window, _spread
from tests.view.live.planted import end_to_end, stepwise_trace

FUNCTIONS = {"mean": np.nanmean, "min": np.nanmin, "max": np.nanmax}


class OneSequence(StepAxis):
    """An axis of one sequence of this many steps, whose rows are their positions."""

    def __init__(self, steps: int) -> None:
        self._complete, self.sequences, self.bounds = True, np.array([0]), np.array([0, steps])

    def rows(self, start: int, stop: int) -> slice:
        return slice(start, stop)


def oracle(values: np.ndarray, window: Window, statistic: str) -> np.ndarray:
    """The picture, from the definition: one value of all that falls into a pixel."""
    picture = np.full((len(window.units) - 1, len(window.steps) - 1), np.nan)
    for row in range(picture.shape[0]):
        for column in range(picture.shape[1]):
            part = values[
                window.steps[column] : window.steps[column + 1],
                window.units[row] : window.units[row + 1],
            ]
            part = np.where(np.isfinite(part), part, np.nan)
            if not np.isnan(part).all():
                picture[row, column] = FUNCTIONS[statistic](part)
    return picture


def read(window: Window) -> Window:
    while not window.advance(0):
        pass
    return window


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("block", [24, 300, 1 << 20])
@pytest.mark.parametrize("sequences", [None, [0, 2, 4]])
def test_pictures_are_those_of_numpy(
    statistic: str, block: int, sequences: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "BLOCK", block)
    trace = stepwise_trace()
    site = trace["cell"]
    axis = step_axis(site, None if sequences is None else np.array(sequences))
    values = end_to_end(trace, "cell", "update", list(range(5)) if sequences is None else sequences)
    random = np.random.default_rng(0)
    for _ in range(25):
        start, stop = sorted(random.integers(0, len(axis) + 1, 2))
        first, last = sorted(random.integers(0, 6, 2))
        order = random.permutation(5) if random.random() < 0.5 else None
        size = {"width": int(random.integers(1, 60)), "height": int(random.integers(1, 7))}
        window = read(
            Window(site.update, axis, Span(start, stop, first, last), order=order, **size)
        )
        shown = values if order is None else values[:, order]
        expected = oracle(shown, window, statistic)
        np.testing.assert_allclose(window.image(statistic), expected, rtol=1e-6, equal_nan=True)
        assert window.image(statistic).shape == (
            min(size["height"], last - first),
            min(size["width"], stop - start),
        )


def test_control_the_oracle_sees_a_shifted_picture() -> None:
    trace = stepwise_trace()
    site = trace["cell"]
    axis = step_axis(site)
    values = end_to_end(trace, "cell", "update", list(range(5)))
    window = read(Window(site.update, axis, Span(0, 30, 0, 5), width=10, height=5))
    assert not np.allclose(window.image(), oracle(np.roll(values, 1, axis=0), window, "mean"))


def test_nan_and_infinity_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    values[3:20, 1] = np.nan
    values[40, 2], values[41, 2] = np.inf, -np.inf
    values[:, 3] = np.nan
    for width in (64, 7):
        window = Window(
            MemoryRows(values), OneSequence(64), Span(0, 64, 0, 4), width=width, height=2
        )
        for statistic in STATISTICS:
            picture = read(window).image(statistic)
            expected = oracle(values, window, statistic)
            np.testing.assert_allclose(picture, expected, rtol=1e-5, equal_nan=True)


def test_a_first_picture_is_a_sample_of_the_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "BLOCK", 10 * 4)
    values = np.arange(1000, dtype=np.float32)[:, None]
    window = Window(MemoryRows(values), OneSequence(1000), Span(0, 1000, 0, 1), width=100, height=1)
    for _ in range(8):
        window.advance(0)
    assert window.steps_read == 80
    assert not window.complete
    picture = window.image()[0]
    # Every column shows a place of the file that is at most an eighth of the file away.
    assert np.abs(picture - (np.arange(100) * 10 + 4.5)).max() <= 130
    # Columns that are read are exact.
    assert np.isclose(picture, np.arange(100) * 10 + 4.5).sum() == 8
    read(window)
    assert window.steps_read == 1000
    assert np.allclose(window.image()[0], np.arange(100) * 10 + 4.5)


def test_blocks_are_visited_once_each_and_spread() -> None:
    for count in (0, 1, 2, 3, 8, 13, 100):
        order = _spread(count)
        assert sorted(order.tolist()) == list(range(count))
    assert _spread(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


def test_how_much_is_read_is_counted_in_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "BLOCK", 17 * 5 * 4)
    site = stepwise_trace()["cell"]
    window = Window(site.update, step_axis(site), Span(0, 69, 0, 5), width=9, height=5)
    axis, steps = step_axis(site), set()
    while not window.complete:
        first = int(window._blocks[window._next]) * 17
        steps |= set(range(first, min(first + 17, 69)))
        window.advance(0)
        assert window.steps_read == len(steps)
        assert window.sequences_read == len({axis.locate(step)[0] for step in steps})
    assert (window.sequences_read, window.sequences) == (5, 5)


def test_empty_windows_have_empty_pictures() -> None:
    site = stepwise_trace()["cell"]
    for span in (Span(5, 5, 0, 5), Span(0, 5, 3, 3), Span(400, 500, 0, 5), Span(7, 3, 0, 5)):
        window = Window(site.update, step_axis(site), span, width=10, height=10)
        assert window.complete
        assert window.image().size == 0
