"""The axis of steps against the sequences themselves, laid end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.view.live.engine.step_axis import step_axis
from tests.view.live.planted import end_to_end, stepwise_trace


@pytest.mark.parametrize("sequences", [None, [0, 2, 4], [1], []])
def test_rows_are_those_of_the_sequences_in_time_order(sequences: list[int] | None) -> None:
    trace = stepwise_trace()
    site = trace["cell"]
    axis = step_axis(site, None if sequences is None else np.array(sequences, int))
    numbers = list(range(len(site))) if sequences is None else sequences
    expected = end_to_end(trace, "cell", "hidden", numbers)
    assert len(axis) == (len(expected) if numbers else 0)
    for start in range(0, len(axis), 7):
        for stop in range(start, len(axis) + 1, 5):
            rows = site.hidden[axis.rows(start, stop)]
            assert np.array_equal(rows, expected[start:stop])


def test_positions_and_steps_lead_to_each_other() -> None:
    site = stepwise_trace()["cell"]
    axis = step_axis(site, np.array([1, 3]))
    expected = [(n, step) for n in (1, 3) for step in range(int(site.lengths[n]))]
    assert [axis.locate(position) for position in range(len(axis))] == expected
    assert [axis.position(*place) for place in expected] == list(range(len(axis)))
    assert axis.places(3, 20).tolist() == [[1, 3].index(n) for n, _ in expected[3:20]]
    assert axis.extent(3) == (17, 26)


def test_what_the_axis_does_not_have() -> None:
    axis = step_axis(stepwise_trace()["cell"], np.array([1, 3]))
    assert axis.position(0, 0) is axis.position(1, 17) is axis.position(1, -1) is None
    assert axis.extent(0) is axis.extent(4) is None
    assert axis.places_between(5, 5) == (0, 0)
    assert len(axis.places(5, 5)) == 0


def test_the_reverse_direction_is_in_time_order() -> None:
    layer = nn.GRU(2, 3, bidirectional=True)
    with torch.no_grad(), grutrace.trace(layer) as trace:
        output, _ = layer(torch.randn(6, 2, 2))
    site = trace["l0_reverse"]
    rows = site.hidden[step_axis(site).rows(6, 12)]
    assert np.array_equal(rows, output[:, 1, 3:].numpy())
