"""Tests of segments: together they are the sequences, in order."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.engine import segments as module
from grutrace.analysis.engine.segments import iter_segments
from grutrace.analysis.engine.site_data import SiteArrays, as_site_data
from grutrace.errors import NotRecordedError, OptionError
from grutrace.records import FORWARD_QUANTITIES as QUANTITIES
from tests.analysis import sites

ASKED = (*QUANTITIES, "previous", "weights")


@pytest.fixture(params=["memory", "file", "deferred"])
def trace(request, tmp_path):
    if request.param == "memory":
        yield sites.in_memory()
        return
    with sites.in_a_file(
        tmp_path / "run.h5", "inline" if request.param == "file" else "deferred"
    ) as trace:
        yield trace


@pytest.mark.parametrize("block", [1, 700, 10**9])
def test_segments_are_the_sequences(trace, block, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    for name in trace.sites:
        site = trace[name]
        result = list(iter_segments(as_site_data(site), ASKED))
        assert [segment.sequence for segment in result] == sorted(
            segment.sequence for segment in result
        )
        assert {segment.sequence for segment in result} == set(range(len(site)))
        for number in range(len(site)):
            own = [segment for segment in result if segment.sequence == number]
            check_sequence(site, site.sequence(number), own)


def check_sequence(site, sequence, own) -> None:
    way = slice(None, None, -1 if site.site.reverse else 1)
    for quantity in QUANTITIES:
        together = np.concatenate([segment.values[quantity] for segment in own])[way]
        # The last bits of derived gates depend on which steps are derived together: sums of 16
        # terms of at most 5 or so, in another order.
        np.testing.assert_allclose(together, sequence.rows(quantity), rtol=0, atol=16 * 5 * 6e-8)
    previous = np.concatenate([segment.previous for segment in own])[way]
    np.testing.assert_array_equal(previous, sequence.previous)
    assert [segment.start for segment in own] == [
        0,
        *np.cumsum([len(segment) for segment in own])[:-1],
    ]
    assert {segment.length for segment in own} == {len(sequence)}
    assert [segment.is_first for segment in own] == [True] + [False] * (len(own) - 1)
    assert [segment.ends for segment in own] == [False] * (len(own) - 1) + [True]
    # These weights, and no other version's, give back the states.
    for segment in own:
        assert recomputed(segment) == pytest.approx(segment.values["hidden"], abs=1e-5)


def recomputed(segment) -> np.ndarray:
    """PyTorch's equations in float64."""
    weights = {name: value.astype(np.float64) for name, value in segment.weights.items()}
    x = segment.values["input"].astype(np.float64)
    before = segment.previous.astype(np.float64)
    from_x = np.split(x @ weights["weight_ih"].T + weights["bias_ih"], 3, axis=1)
    from_h = np.split(before @ weights["weight_hh"].T + weights["bias_hh"], 3, axis=1)
    reset = 1 / (1 + np.exp(-from_x[0] - from_h[0]))
    update = 1 / (1 + np.exp(-from_x[1] - from_h[1]))
    candidate = np.tanh(from_x[2] + reset * from_h[2])
    return (1 - update) * candidate + update * before


def test_control_other_weights_do_not_give_the_states(trace) -> None:
    for name in trace.sites:
        result = list(iter_segments(as_site_data(trace[name]), ASKED))
        first, last = result[0], result[-1]
        crossed = module.SequenceSegment(0, 0, len(last), last.values, last.previous, first.weights)
        assert np.abs(recomputed(crossed) - last.values["hidden"]).max() > 1e-3


def test_some_sequences(trace) -> None:
    result = iter_segments(as_site_data(trace["encoder.l1_reverse"]), ("update",), 2, 5)
    assert sorted({segment.sequence for segment in result}) == [2, 3, 4]


def test_a_sequence_without_steps_has_no_segment() -> None:
    arrays = SiteArrays(update=np.arange(6.0).reshape(3, 2), lengths=[0, 2, 0, 1])
    result = list(iter_segments(as_site_data(arrays), ("update",)))
    assert [(segment.sequence, len(segment)) for segment in result] == [(1, 2), (3, 1)]


def test_what_was_not_recorded() -> None:
    arrays = SiteArrays(update=np.zeros((3, 2)), name="mine")
    with pytest.raises(NotRecordedError, match=r"'mine' has no 'hidden'.*it has update"):
        list(iter_segments(as_site_data(arrays), ("update", "previous")))
    with pytest.raises(NotRecordedError, match="no weights"):
        list(iter_segments(as_site_data(arrays), ("update", "weights")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (SiteArrays(), "expected one of reset"),
        (SiteArrays(update=np.zeros(3)), r"SiteArrays.update: expected an array \(rows, width\)"),
        (SiteArrays(update=np.zeros((3, 2)), lengths=[1, 1]), "expected 2 rows.*found 3"),
        (
            SiteArrays(update=np.zeros((3, 2)), hidden=np.zeros((3, 4))),
            "expected one number of units",
        ),
        (SiteArrays(update=np.zeros((3, 2)), initial=np.zeros((1, 3))), r"expected shape \(1, 2\)"),
        ("update", "expected a site of a trace"),
    ],
)
def test_arrays_that_do_not_fit_together(arrays, message) -> None:
    with pytest.raises(OptionError, match=message):
        as_site_data(arrays)
