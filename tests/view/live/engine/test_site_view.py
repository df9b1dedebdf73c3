"""What a page shows of a site: texts, units and colour limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.errors import NotRecordedError
from grutrace.view.live.engine.site_view import SiteView, first_quantity, value_text
from tests.view.live.planted import depths, record_brackets


def test_texts_are_those_of_the_steps(tmp_path: Path) -> None:
    texts = record_brackets(tmp_path / "run.h5", sentences=4)
    tokens = [letter for letters in texts for letter in letters]
    labels = [str(depth) for letters in texts for depth in depths(letters)]
    with grutrace.open(tmp_path / "run.h5") as trace:
        view = SiteView(trace, "l0", "hidden")
        for start, stop in (
            (0, len(tokens)),
            (3, 9),
            (len(texts[0]) - 1, len(texts[0]) + 1),
            (2, 2),
        ):
            found = view.texts(start, stop)
            assert found.tokens == (tokens[start:stop] if start < stop else None)
            assert found.labels == {"depth": labels[start:stop]}


def test_a_trace_without_tokens_has_none() -> None:
    layer = nn.GRU(2, 3)
    with torch.no_grad(), grutrace.trace(layer) as trace:
        layer(torch.randn(4, 2, 2))
    found = SiteView(trace, "l0", "update").texts(0, 8)
    assert found.tokens is None
    assert found.labels == {}


def test_units_have_their_number_in_the_layer() -> None:
    layer = nn.GRU(2, 9)
    with (
        torch.no_grad(),
        grutrace.trace(layer, units=[7, 2, 5], record=("hidden", "input")) as trace,
    ):
        layer(torch.randn(40, 2, 2))
    view = SiteView(trace, "l0", "hidden", order="mean")
    means = trace["l0"].hidden.mean(axis=0)
    assert [view.unit(place) for place in range(3)] == np.argsort(means).tolist()
    assert [view.unit_name(place) for place in range(3)] == [
        (7, 2, 5)[unit] for unit in np.argsort(means)
    ]
    expected = trace["l0"].sequence(0).hidden[3:7][:, [2, 0]]
    assert np.array_equal(view.values(3, 7, [2, 0]), expected)


def test_limits_of_colours() -> None:
    layer = nn.GRU(2, 3)
    with torch.no_grad(), grutrace.trace(layer, record=("update", "hidden", "input")) as trace:
        layer(torch.cat([torch.full((1, 1, 2), -7.0), torch.full((9, 1, 2), 3.0)]))
        assert SiteView(trace, "l0", "update").limits == (0, 1)
        assert SiteView(trace, "l0", "hidden").limits == (-1, 1)
        assert SiteView(trace, "l0", "input").limits == (-7, 7)


def test_the_first_quantity() -> None:
    layer = nn.GRU(2, 3)
    for record, first in ((("reset", "update"), "update"), (("input", "reset"), "reset")):
        with grutrace.trace(layer, record=record) as trace:
            layer(torch.randn(2, 1, 2))
        assert first_quantity(trace["l0"]) == first
    with pytest.raises(NotRecordedError, match="'hidden' was not recorded"):
        SiteView(trace, "l0", "hidden")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (2.0, "2"),
        (0.25, "0.25"),
        (7, "7"),
        ("a\nb\x1b[31m", "a\ufffdb\ufffd[31m"),
        ("x" * 40, "x" * 15 + "\u2026"),
        ("<b>", "<b>"),
    ],
)
def test_texts_of_values(value: object, text: str) -> None:
    assert value_text(value) == text
