"""The examples that repeat published results, in the small size, against theory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from grutrace.analysis.dynamics import fixed_points as search
from tests.examples.conftest import EXAMPLES

FOLDER = EXAMPLES / "literature"

#: The rows of each table that an example prints, by its title up to the first bracket.
Tables = dict[str, list[list[str]]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of the folder, as Python does when it runs one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and name in {
            path.stem for path in FOLDER.glob("*.py")
        }:
            del sys.modules[name]


def tables(printed: str) -> Tables:
    """Read the tables of a report."""
    found: Tables = {}
    title = ""
    for line in printed.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            found.setdefault(title, []).append(cells)
        elif line:
            title = line.split(" (")[0]
    return {title: rows[2:] for title, rows in found.items()}


def numbers(rows: list[list[str]]) -> np.ndarray:
    return np.array([[float(cell) for cell in row] for row in rows])


@pytest.fixture
def printed(
    example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Tables]:
    """Run an example, and return its tables."""

    def run(name: str) -> Tables:
        example(name).report(True)
        return tables(capsys.readouterr().out)

    return run


def test_random_networks(printed: Callable[[str], Tables]) -> None:
    found = printed("random_grus")
    update = numbers(found["Update gate: slow modes"])
    gain, slow, near_one, radius, edge, outside = update.T
    assert slow[-1] > slow[0] + 0.3
    # Of gates that are open or closed at random, half are open.
    assert near_one[gain == 30] == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(radius, edge, rtol=0.1)
    assert outside.max() < 0.1
    reset = numbers(found["Reset gate: spectral radius"])
    np.testing.assert_allclose(reset[:, 3], reset[:, 4], rtol=0.2)
    assert reset[-1, 3] > 1.5 * reset[0, 3]
    bias, measured, theory = numbers(found["Stability of 0: the critical gain a_h"]).T
    np.testing.assert_allclose(theory, 1 + np.exp(-bias), rtol=0.01)
    np.testing.assert_allclose(measured, theory, rtol=0.1)
    exponents = numbers(found["Largest Lyapunov exponent, nats a step"])
    at = dict(zip(exponents[:, 0], exponents[:, 1:], strict=True))
    # Below 2 the state goes to 0, where the largest eigenvalue of a large network is 1/2 + a/4.
    assert at[1.5][[0, 1, 3]] == pytest.approx(np.log(0.5 + 1.5 / 4), abs=0.03)
    assert at[3.0][3] > 0.05
    points = {row[0]: [int(cell) for cell in row[1:]] for row in found["Fixed points other than 0"]}
    assert points["1.2"] == [0, 0, 0]
    assert points["3"][2] > points["3"][0]


def test_networks_of_two_units(printed: Callable[[str], Tables]) -> None:
    found = printed("two_units")
    structures = numbers(found["Structures of fixed points of 60 random networks"])
    _, sinks, saddles, sources, index, count = structures.T
    assert count.sum() == 60
    assert (sinks + sources - saddles == index).all()
    assert count[index == 1].sum() >= 59
    for _, ours, theory, _ in found["Two units that do not see each other"]:
        assert ours == theory
    for gain, eigenvalue, radius, turn, exponent in numbers(found["A rotating network"]):
        angle = np.pi / 3
        size = abs(0.5 + gain / 4 * np.exp(1j * angle))
        assert eigenvalue == pytest.approx(size, rel=0.01)
        assert (radius > 0.1) == (size > 1) == np.isfinite(turn)
        # On a cycle, a difference along it neither grows nor shrinks.
        assert exponent == pytest.approx(min(0.0, np.log(size)), abs=0.002)


def test_control_a_search_that_misses_points_breaks_the_index(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_units = example("two_units")
    monkeypatch.setattr(search, "ROUNDS", 0)
    assert two_units.portrait(two_units.switches(4.0), 2).structure.index != 1


def test_a_reader_of_reviews(printed: Callable[[str], Tables]) -> None:
    found = printed("sentiment")
    line = {name: here for name, here, _ in found["A line attractor"]}

    def figure(name: str) -> float:
        return float(line[name])

    assert figure("accuracy, %") > 75
    assert figure("variance of the states at rest in 1 direction, %") > 90
    assert figure("cosine of that direction with the readout") > 0.7
    assert figure("cosine of the slowest mode with the line") > 0.5
    assert figure("the same for random directions") < 0.25
    assert figure("slowest timescale, words (median of points)") > figure(
        "mean length of a review, words"
    )
    good, bad = figure("what a good word adds to the mode"), figure("a bad word")
    assert bad < -2 * abs(figure("a neutral word"))
    assert good > 2 * abs(figure("a neutral word"))
    assert figure("correlation of the place on the line with the sum") > 0.5
    (effects,) = (rows for title, rows in found.items() if title.startswith("Effect of a word"))
    next_word = {row[0]: float(row[2]) for row in effects}
    assert max(next_word[word] for word in ("not", "never")) < 1
    assert min(next_word[word] for word in ("very", "extremely")) > 1
    assert all(abs(float(row[-1]) - 1) < 0.1 for row in effects)


def test_control_an_untrained_reader_integrates_nothing(
    example: Callable[[str], ModuleType],
) -> None:
    sentiment = example("sentiment")
    torch.manual_seed(0)
    model = sentiment.Reader(sentiment.SMALL.units)
    site, sums = sentiment.record(model, sentiment.SMALL)
    line = sentiment.find_line(model, site, sums, sentiment.SMALL)
    assert abs(line.correlation) < 0.3
    assert np.median(line.timescales[:, 0]) < sentiment.SMALL.length / 2


def test_the_sums_of_reviews(example: Callable[[str], ModuleType]) -> None:
    sentiment = example("sentiment")
    words, sums = sentiment.draw_reviews(20, 50, np.random.default_rng(0))
    for review, ours in zip(words, sums, strict=True):
        total, factor = 0.0, 1.0
        for number, after in zip(review, ours, strict=True):
            word = sentiment.WORDS[number]
            total += factor * sentiment.VALENCE.get(word, 0.0)
            factor = sentiment.MODIFIERS.get(word, 1.0)
            assert after == total


def test_chrono_initialization(printed: Callable[[str], Tables]) -> None:
    for rows in printed("chrono").values():
        by_kind: dict[tuple[str, str], np.ndarray] = {
            (row[0], row[1]): np.array([float(cell) for cell in row[2:5]]) for row in rows
        }
        # PyTorch's gates start near a half.
        assert by_kind["default", "before"][1] == pytest.approx(1 / np.log(2), rel=0.1)
        np.testing.assert_allclose(
            by_kind["chrono", "before"], by_kind["chrono", "theory"], rtol=0.5
        )
        assert by_kind["chrono", "after"][1] > 3 * by_kind["default", "after"][1]


@pytest.mark.parametrize("name", ["copy", "adding"])
def test_the_loss_without_memory(example: Callable[[str], ModuleType], name: str) -> None:
    chrono = example("chrono")
    task: Any = chrono.TASKS[name](chrono.Size(batch=2000))
    x, expected = task.draw(torch.Generator().manual_seed(0))
    outputs = torch.zeros(*x.shape[:2], task.outputs)
    if name == "copy":
        # Blanks are certain until the signal, and all symbols equally likely after it.
        outputs[:, : -chrono.RECALLED, chrono.SYMBOLS] = 100.0
        outputs[:, -chrono.RECALLED :, chrono.SYMBOLS] = -100.0
    else:
        outputs += 1.0
    assert float(task.loss(outputs, expected)) == pytest.approx(task.memoryless, rel=0.05)
