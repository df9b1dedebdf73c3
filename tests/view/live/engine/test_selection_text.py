"""Selections as text against what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

import grutrace
from grutrace.errors import NotRecordedError, OptionError
from grutrace.view.live.engine.selection_text import parse_selection, selected_sequences
from grutrace.view.live.engine.site_view import SiteView
from tests.view.live.planted import depths, end_to_end, record_brackets


def test_selected_sequences_are_those_that_meet_the_conditions(tmp_path: Path) -> None:
    texts = record_brackets(tmp_path / "run.h5")
    expected = {
        "": None,
        "tag=valid": [n for n in range(40) if n % 4 == 0],
        "length=20:": [n for n in range(40) if len(texts[n]) >= 20],
        "tag=train; length=:12": [n for n in range(40) if n % 4 and len(texts[n]) < 12],
        "sequences=3,5": [3, 5],
        "depth=2": [n for n in range(40) if 2 in depths(texts[n])],
        "tokens=( [abc] )": [
            n for n in range(40) if any(f"({x})" in "".join(texts[n]) for x in "abc")
        ],
    }
    with grutrace.open(tmp_path / "run.h5") as trace:
        for text, numbers in expected.items():
            found = selected_sequences(trace["l0"], text)
            assert (None if found is None else found.tolist()) == numbers, text
        view = SiteView(trace, "l0", "hidden", select="sequences=3,5")
        rows = view.rows[view.axis.rows(0, len(view.axis))]
        assert (rows == end_to_end(trace, "l0", "hidden", [3, 5])).all()
        assert view.axis.locate(len(texts[3])) == (5, 0)
        assert view.texts(0, 3).tokens == texts[3][:3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("valid", "select: expected conditions such as tag=valid; length=10:; pos=noun; found"),
        ("tag=", "select: expected conditions such as"),
        ("length=ten", "length: expected 3, or 10: for 10 or more, or 1,5,7; found 'ten'"),
        ("length=-3", "length: expected numbers from 0 on"),
    ],
)
def test_wrong_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_selection(text)


def test_selections_of_nothing_are_refused(tmp_path: Path) -> None:
    record_brackets(tmp_path / "run.h5", sentences=3)
    with grutrace.open(tmp_path / "run.h5") as trace:
        with pytest.raises(NotRecordedError, match="no sequence has tag=test"):
            selected_sequences(trace["l0"], "tag=test")
        with pytest.raises(NotRecordedError, match="there is no label 'pos'"):
            selected_sequences(trace["l0"], "pos=noun")
