"""Compiled products of directions with Jacobians, against NumPy's products and QR."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.dynamics.jacobian import Factors, jacobians
from grutrace.native import library
from grutrace.native.directions import advance
from tests.instruction_sets import INSTRUCTION_SETS

COMPILED = [name for name in INSTRUCTION_SETS if name != "none"]
pytestmark = pytest.mark.skipif(not COMPILED, reason="there is no compiled library")

#: As in `grutrace.analysis.dynamics.growth`.
SPREAD = (np.log(1e3), np.log(1e4))


def steps_of(units: int, steps: int, scale: float = 1.0) -> tuple[np.ndarray, Factors]:
    """Random weights, and factors of the size of a layer's."""
    rng = np.random.default_rng(units)
    weights = scale * rng.standard_normal((3 * units, units)) / units**0.5
    return weights, Factors(*rng.uniform(0, 1, (4, steps, units)))


def start_of(units: int, count: int) -> np.ndarray:
    random = np.random.default_rng(1).standard_normal((units, count))
    return np.ascontiguousarray(np.linalg.qr(random)[0].T)


def expected(weights, data, directions, interval) -> tuple[np.ndarray, np.ndarray]:
    logs, now = 0, directions.T
    matrices = jacobians(data, {"weight_hh": weights})
    for first in range(0, len(matrices), interval):
        for matrix in matrices[first : first + interval]:
            now = matrix @ now
        now, upper = np.linalg.qr(now)
        now = now * np.sign(np.diag(upper))
        logs = logs + np.log(np.abs(np.diag(upper)))
    return now.T, logs


@pytest.mark.parametrize("instruction_set", COMPILED, indirect=True)
@pytest.mark.parametrize(
    ("units", "count"), [(1, 1), (3, 2), (8, 8), (16, 9), (17, 16), (37, 20), (37, 37)]
)
@pytest.mark.parametrize("interval", [1, 3, 7])
@pytest.mark.usefixtures("instruction_set")
def test_directions_and_growth(units, count, interval) -> None:
    weights, data = steps_of(units, 7)
    start = start_of(units, count)
    kept = start.copy()
    done = advance(weights, data, start, interval, 0, SPREAD)
    assert done is not None
    directions, logs, after = done
    want, want_logs = expected(weights, data, start, interval)
    np.testing.assert_allclose(logs, want_logs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(directions, want, atol=1e-6)
    np.testing.assert_allclose(directions @ directions.T, np.eye(count), atol=1e-6)
    assert after == interval
    np.testing.assert_array_equal(start, kept)
    # The control: a factor that changed changes the growth.
    data.candidate[3] *= 1.01
    assert np.abs(advance(weights, data, start, interval, 0, SPREAD)[1] - want_logs).max() > 1e-5


@pytest.mark.parametrize("longest", [0, 64])
def test_every_instruction_set_gives_the_same_bits(longest, monkeypatch) -> None:
    weights, data = steps_of(37, 60)
    found = []
    for name in COMPILED:
        monkeypatch.setenv(library.VARIABLE, name)
        library.load.cache_clear()
        found.append(advance(weights, data, start_of(37, 11), 4, longest, SPREAD))
    monkeypatch.undo()
    library.load.cache_clear()
    for directions, logs, interval in found:
        np.testing.assert_array_equal(directions, found[0][0])
        np.testing.assert_array_equal(logs, found[0][1])
        assert interval == found[0][2]


@pytest.mark.parametrize("instruction_set", COMPILED, indirect=True)
@pytest.mark.usefixtures("instruction_set")
def test_intervals_follow_the_growth() -> None:
    weights, data = steps_of(24, 200)
    start = start_of(24, 24)
    _, exact, _ = advance(weights, data, start, 1, 0, SPREAD)
    _, logs, interval = advance(weights, data, start, 1, 64, SPREAD)
    np.testing.assert_allclose(logs, exact, atol=1e-8)
    assert 1 <= interval < 64
    # One that is too long for the first steps is halved and they are repeated.
    _, logs, shorter = advance(weights, data, start, 64, 64, SPREAD)
    np.testing.assert_allclose(logs, exact, atol=1e-8)
    assert shorter < 64
    # Where all directions grow alike, the interval doubles up to the longest.
    same = data._replace(
        keep=np.ones((200, 24)),
        **dict.fromkeys(("reset", "update", "candidate"), np.zeros((200, 24))),
    )
    assert advance(weights, same, start, 1, 16, SPREAD)[2] == 16
    # The control: without a limit it takes what it gets.
    lost = advance(weights, data, start, 64, 64, (np.inf, np.inf))[1]
    assert np.abs(lost - exact).max() > 1e-6


@pytest.mark.parametrize("instruction_set", COMPILED, indirect=True)
@pytest.mark.parametrize("value", [0.0, 1e-200, 1e200, np.nan, np.inf])
@pytest.mark.usefixtures("instruction_set")
def test_growth_without_a_normal_square_is_refused(value) -> None:
    weights, data = steps_of(9, 5)
    broken = Factors(*(factor.copy() for factor in data))
    for factor in broken:
        factor[3] = value
    assert advance(weights, broken, start_of(9, 3), 1, 0, SPREAD) is None
    assert advance(weights, data, start_of(9, 3), 1, 0, SPREAD) is not None
