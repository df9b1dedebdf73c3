"""Units on in a stretch, and matches, against loops over the sequences."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

import grutrace
from grutrace.errors import NotRecordedError, OptionError
from grutrace.view.live.engine import search as search_module
from grutrace.view.live.engine.search import Match, Search
from grutrace.view.live.engine.step_axis import step_axis
from grutrace.view.live.engine.stretches import Condition, Stretch, units_on
from tests.view.live.planted import ROUND, SQUARE, record_brackets, stepwise_trace


def oracle_units(
    values: np.ndarray, stretch: Stretch, condition: Condition, before: int, after: int
) -> list[int]:
    """The units of one sequence (T, U), unit by unit and step by step."""
    units = []
    for unit in range(values.shape[1]):
        on = [
            value >= condition.threshold if condition.above else value <= condition.threshold
            for value in values[:, unit]
        ]
        inside = on[stretch.start : stretch.stop]
        around = on[max(0, stretch.start - before) : stretch.start]
        around += on[stretch.stop : stretch.stop + after]
        if all(inside) and not any(around):
            units.append(unit)
    return units


def oracle_matches(
    sequences: list[np.ndarray],
    units: list[int],
    condition: Condition,
    example: Stretch,
    least: int,
) -> list[Match]:
    """All matches, ranked as the documentation of `Search` says."""
    found = []
    for number, values in enumerate(sequences):
        on = values[:, units] >= condition.threshold
        if not condition.above:
            on = values[:, units] <= condition.threshold
        enough = on.sum(axis=1) >= least
        step = 0
        for is_run, group in groupby(enough.tolist()):
            start, step = step, step + len(list(group))
            overlaps = number == example.sequence and start < example.stop and step > example.start
            if not is_run or overlaps:
                continue
            held = on[start:step].all(axis=0)
            before = ~on[start - 1] if start else np.ones(len(units), bool)
            after = ~on[step] if step < len(on) else np.ones(len(units), bool)
            switched = int((held & before & after).sum())
            found.append(Match(Stretch(number, start, step), int(held.sum()), switched))
    return sorted(
        found,
        key=lambda match: (
            -match.held,
            -match.switched,
            abs(len(match.stretch) - len(example)),
            match.stretch.sequence,
            match.stretch.start,
        ),
    )


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("around", [(0, 0), (1, 1), (3, 2)])
def test_units_on_are_those_of_the_definition(above: bool, around: tuple[int, int]) -> None:
    site = stepwise_trace(hidden=40)["cell"]
    axis, condition = step_axis(site), Condition(0.02, above)
    some = 0
    for sequence in range(len(site)):
        values = site.sequence(sequence).hidden
        for start in range(len(values)):
            for stop in range(start + 1, min(len(values), start + 3) + 1):
                stretch = Stretch(sequence, start, stop)
                units = units_on(
                    site.hidden, axis, stretch, condition, before=around[0], after=around[1]
                )
                assert units.tolist() == oracle_units(values, stretch, condition, *around)
                some += len(units)
    assert some


def test_stretches_that_do_not_exist_are_refused() -> None:
    site = stepwise_trace()["cell"]
    for stretch in (Stretch(0, 3, 3), Stretch(0, 0, 18), Stretch(9, 0, 1), Stretch(0, -1, 2)):
        with pytest.raises(NotRecordedError, match="expected steps of a sequence; found steps"):
            units_on(site.hidden, step_axis(site), stretch, Condition(0.5))


@pytest.mark.parametrize("block", [20, 200, 1 << 20])
@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("above", [True, False])
def test_matches_are_those_of_the_definition(
    block: int, least: int, above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "BLOCK", block)
    for seed in range(4):
        site = stepwise_trace(hidden=6, seed=seed)["cell"]
        sequences = [sequence.hidden for sequence in site]
        units, example = [0, 3, 4], Stretch(1, 5, 7)
        condition = Condition(0.05 if above else -0.05, above)
        search = Search(site.hidden, step_axis(site), units, condition, example, least=least)
        slices = 1
        while not search.advance(0):
            slices += 1
        assert slices >= (3 if block == 200 else 1)
        expected = oracle_matches(sequences, units, condition, example, least)
        assert search.matches == expected[:50]
        assert search.count == len(expected)
        assert search.progress == 1


def test_control_another_threshold_has_other_matches() -> None:
    site = stepwise_trace(hidden=6)["cell"]
    sequences = [sequence.hidden for sequence in site]
    example = Stretch(1, 5, 7)
    search = Search(site.hidden, step_axis(site), [0, 3], Condition(0.05), example)
    search.advance(10)
    assert search.matches != oracle_matches(sequences, [0, 3], Condition(0.06), example, 2)


def test_only_the_best_matches_are_kept() -> None:
    site = stepwise_trace(hidden=6)["cell"]
    condition, example = Condition(0.0), Stretch(0, 0, 1)
    search = Search(site.hidden, step_axis(site), [0], condition, example, limit=3)
    search.advance(10)
    expected = oracle_matches([s.hidden for s in site], [0], condition, example, 1)
    assert len(expected) > 3
    assert search.matches == expected[:3]
    assert search.count == len(expected)


def test_only_the_sequences_of_the_axis_are_searched() -> None:
    site = stepwise_trace(hidden=6)["cell"]
    axis = step_axis(site, np.array([1, 4]))
    search = Search(site.hidden, axis, [0], Condition(-2.0), Stretch(0, 0, 4))
    search.advance(10)
    lengths = site.lengths.tolist()
    assert sorted(match.stretch.sequence for match in search.matches) == [1, 4]
    assert {len(match.stretch) for match in search.matches} == {lengths[1], lengths[4]}


def test_a_search_without_units_is_refused() -> None:
    site = stepwise_trace()["cell"]
    for units, least in (([], None), ([1], 2), ([1], 0)):
        with pytest.raises(OptionError, match="expected at least one unit"):
            Search(
                site.hidden, step_axis(site), units, Condition(0.5), Stretch(0, 0, 1), least=least
            )


@pytest.mark.parametrize(("opening", "closing", "unit"), [("(", ")", ROUND), ("[", "]", SQUARE)])
def test_marking_a_bracket_finds_its_unit_and_all_other_brackets(
    opening: str, closing: str, unit: int, tmp_path: Path
) -> None:
    texts = record_brackets(tmp_path / "run.h5")
    brackets = []
    for number, letters in enumerate(texts):
        start = 0
        for step, letter in enumerate(letters):
            start = step if letter == opening else start
            if letter == closing:
                brackets.append(Stretch(number, start, step))
    with grutrace.open(tmp_path / "run.h5") as trace:
        site = trace["l0"]
        axis, condition = step_axis(site), Condition(0.9)
        marked = max(brackets, key=len)
        assert units_on(site.hidden, axis, marked, condition).tolist() == [unit]
        search = Search(site.hidden, axis, [unit], condition, marked, limit=1000)
        search.advance(10)
        found = [match.stretch for match in search.matches]
    assert set(found) == set(brackets) - {marked}
    assert found == sorted(found, key=lambda s: (abs(len(s) - len(marked)), s.sequence, s.start))
