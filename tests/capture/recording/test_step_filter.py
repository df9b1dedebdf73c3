"""`steps`: what is kept of a sequence is a shorter sequence, and only that is computed."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import grutrace
from grutrace.analysis.verification.verify import verify
from grutrace.records import GATES
from tests import oracles
from tests.capture.models import StepwiseDecoder
from tests.capture.recording.test_record_and_units import Counted
from tests.checks import EVERYTHING, same_result
from tests.plain_reader import PlainTrace
from tests.strategies import Case, cases

ranges = st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(1, 8))).filter(
    # All steps are no part; and then a call of an empty batch is recorded like any other.
    lambda bounds: bounds != (0, None) and (bounds[1] is None or bounds[1] > bounds[0])
)


def assert_range(part: Any, whole: Any, selected: slice, pairs: list[tuple[int, int]]) -> None:
    """Compare sequences of a part with those of the whole that they are of."""
    assert part.sites == whole.sites
    for name in part.sites:
        one, other = part[name], whole[name]
        assert len(one) == len(pairs)
        allowed = float(other.checks["tolerance"].max(initial=0))
        for number, of in pairs:
            left, right = one.sequence(number), other.sequence(of)
            for quantity in EVERYTHING:
                actual, expected = left.rows(quantity), right.rows(quantity)[selected]
                assert actual.shape == expected.shape
                if quantity in GATES:
                    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
                    assert (np.abs(actual.astype(float) - expected) <= allowed).all()
                else:
                    np.testing.assert_array_equal(actual, expected)
            np.testing.assert_array_equal(left.previous, right.previous[selected])
            if len(left):
                first = -1 if one.site.reverse else 0
                np.testing.assert_array_equal(left.initial, right.previous[selected][first])


@settings(max_examples=200, deadline=None)
@given(cases(), ranges, st.sampled_from(("inline", "deferred")))
def test_the_lattice(case: Case, bounds: tuple[int, int | None], gates: Any) -> None:
    expected, selected = case.run(case.untouched()), slice(*bounds)
    with (
        grutrace.trace(case.layer, record=EVERYTHING) as whole,
        grutrace.trace(
            case.layer, record=EVERYTHING, steps=selected, check="raise", gates=gates
        ) as part,
    ):
        assert same_result(expected, case.run())
    site = whole[whole.sites[0]]
    any_left = any(len(range(length)[selected]) for length in site.lengths.tolist())
    assert len(part.calls) == int(any_left)
    assert_range(part, whole, selected, [(n, n) for n in range(len(site))] if any_left else [])
    for result in verify(part):
        assert (result.check, result.holds) == ("gates" if gates == "inline" else "derived", True)


@settings(max_examples=100, deadline=None)
@given(cases(), ranges)
def test_the_oracle_in_float64(case: Case, bounds: tuple[int, int | None]) -> None:
    with grutrace.trace(case.layer, record=EVERYTHING, steps=slice(*bounds)) as part:
        case.run()
    for name in part.sites if len(part.calls) else ():
        eps = float(np.finfo(part[name].update.dtype).eps)
        for sequence in part[name]:
            expected = oracles.gates(part[name].weights(), sequence.input, sequence.previous, eps)
            for quantity in (*GATES, "hidden"):
                off = np.abs(sequence.rows(quantity) - expected.values[quantity])
                assert (off <= expected.bounds[quantity]).all()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases(), ranges)
def test_a_plain_reader(tmp_path, case: Case, bounds: tuple[int, int | None]) -> None:
    path, options = tmp_path / "run.h5", {"record": EVERYTHING, "steps": slice(*bounds)}
    with (
        grutrace.trace(case.layer, gates="inline", **options) as memory,
        grutrace.trace(case.layer, path, mode="overwrite", **options),
    ):
        case.run()
    plain = PlainTrace(path).modules[0]
    for name in memory.sites:
        for number, sequence in enumerate(memory[name]):
            for quantity in EVERYTHING:
                np.testing.assert_array_equal(
                    plain.sites[name].sequence(number, quantity), sequence.rows(quantity)
                )
            np.testing.assert_array_equal(plain.sites[name].previous(number), sequence.previous)


@settings(max_examples=60, deadline=None)
@given(st.data(), ranges, st.sampled_from(("inline", "deferred")))
def test_decoding_in_which_rows_come_go_and_fork(data, bounds, gates) -> None:
    """Each batch row at its own step of its own sequence, several steps a call."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer, selected = nn.GRU(2, 3, 2), slice(*bounds)
    options: Any = {"record": EVERYTHING, "check": "raise"}
    with (
        torch.no_grad(),
        grutrace.trace(layer, **options) as whole,
        grutrace.trace(layer, **options, steps=selected, gates=gates) as part,
    ):
        state = torch.randn(2, 3, 3)
        for _ in range(data.draw(st.integers(1, 7))):
            batch = state.shape[1]
            rows = data.draw(st.lists(st.integers(0, batch), min_size=1, max_size=4))
            # A row beyond the last is a sequence that begins.
            state = torch.cat((state, torch.randn(2, 1, 3)), 1)[:, rows]
            _, state = layer(torch.randn(data.draw(st.integers(1, 3)), len(rows), 2), state)
    sequences = [
        n for n, length in enumerate(whole["l0"].lengths.tolist()) if range(length)[selected]
    ]
    by_rows = {whole["l1"].sequence(n).hidden[selected].tobytes(): n for n in sequences}
    assert len(by_rows) == len(sequences), "the control: no two of them are the same"
    filled = [n for n, length in enumerate(part["l0"].lengths.tolist()) if length]
    pairs = {by_rows[part["l1"].sequence(n).hidden.tobytes()]: n for n in filled}
    assert set(pairs) == set(sequences)
    assert len(filled) == len(sequences)
    for name in part.sites:
        for of, number in pairs.items():
            actual, expected = part[name].sequence(number), whole[name].sequence(of)
            np.testing.assert_array_equal(actual.previous, expected.previous[selected])
            np.testing.assert_array_equal(actual.initial, expected.previous[selected][0])
            np.testing.assert_array_equal(actual.input, expected.input[selected])
            np.testing.assert_allclose(actual.update, expected.update[selected], atol=1e-6)
            if actual.parent is not None:
                parent = part[name].sequence(actual.parent)
                np.testing.assert_array_equal(
                    parent.hidden[actual.parent_steps - 1], actual.initial
                )
                assert pairs[expected.parent] == actual.parent
    assert all(result.holds for result in verify(part))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_decoder_counts_the_steps_of_all_its_calls(layers) -> None:
    decoder, state = StepwiseDecoder(layers), torch.randn(layers, 2, 6)
    with (
        grutrace.trace(decoder, record=EVERYTHING) as whole,
        grutrace.trace(decoder, record=EVERYTHING, steps=slice(3, 6)) as part,
    ):
        decoder(torch.randn(1, 2, 4), state, steps=8)
        decoder(torch.randn(1, 2, 4), state + 1, steps=5)
        decoder(torch.randn(1, 2, 4), state + 2, steps=2)
    assert len(part.calls) == 3 + 2
    assert part["rnn.l0"].lengths.tolist() == [3, 3, 2, 2]
    assert_range(part, whole, slice(3, 6), [(n, n) for n in range(4)])
    assert all(result.holds for result in verify(part))


def test_packed_sequences_that_are_too_short_are_there_without_steps() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(2, 3, bidirectional=True)
    lengths = [2, 6, 1, 4]
    x = pack_sequence([torch.randn(n, 2) for n in lengths], enforce_sorted=False)
    with (
        grutrace.trace(layer, record=EVERYTHING) as whole,
        grutrace.trace(layer, record=EVERYTHING, steps=slice(2, 5)) as part,
    ):
        layer(x)
    assert part["l0"].lengths.tolist() == part["l0_reverse"].lengths.tolist() == [0, 3, 0, 2]
    assert_range(part, whole, slice(2, 5), [(n, n) for n in range(4)])
    assert [sequence.place for sequence in part["l0"]] == [0, 1, 2, 3]
    assert part["l0"].padded("update")[0].shape == (4, 3, 3)
    empty = part["l0"].sequence(0)
    assert (empty.update.shape, empty.previous.shape) == ((0, 3), (0, 3))
    assert all(result.holds for result in verify(part))


def test_control_a_wrong_first_state_does_not_verify(monkeypatch) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(2, 3), torch.randn(6, 2, 2)
    for options in ({}, {"gates": "deferred"}):
        with monkeypatch.context() as patch:
            patch.setattr(
                "grutrace.gru.step_window._TimeWindow.initial", lambda *states, **_: states[2]
            )
            with grutrace.trace(
                layer, record=EVERYTHING, steps=slice(2, 4), check="off", **options
            ) as trace:
                layer(x)
        (result,) = verify(trace)
        if options:
            assert not result.holds
        else:
            assert trace["l0"].residual > 10 * trace["l0"].checks["tolerance"][0]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_only_the_steps_that_are_kept_are_multiplied(kind, monkeypatch) -> None:
    counted, layer, x = Counted(monkeypatch), nn.GRU(4, 16), torch.randn(10, 3, 4)
    if kind == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, [10, 8, 4])
    with grutrace.trace(layer, steps=slice(2, 6), gates="inline"):
        layer(x)
    rows = 3 * 4 if kind == "padded" else 4 + 4 + 2
    assert counted.products == [(rows, 48, 4), (rows, 48, 16)]
    counted.products.clear()
    with grutrace.trace(layer, steps=slice(2, 6), units=slice(4)):
        layer(x)
    extra = 3 * 12 * 16 if kind == "packed" else 0
    assert counted.multiplications() == rows * 12 * (4 + 16) + extra


def test_tokens_are_of_all_steps_and_go_to_those_that_are_kept() -> None:
    layer = nn.GRU(2, 3)
    x = pack_sequence([torch.randn(n, 2) for n in (2, 6, 4)], enforce_sorted=False)
    words = ["ab", "cdefgh", "ijkl"]
    labels = {"n": [list(range(length)) for length in (2, 6, 4)], "b": ["x", "y", "z"]}
    with (
        grutrace.trace(layer, steps=slice(2, 5)) as trace,
        trace.recording(tokens=words, labels=labels),
    ):
        layer(x)
    assert [sequence.tokens for sequence in trace["l0"]] == [None, ["e", "f", "g"], ["k", "l"]]
    assert trace["l0"].sequence(1).labels["n"].tolist() == [2, 3, 4]
    assert trace["l0"].sequence(2).labels["b"] == ["z", "z"]


def test_tokens_of_a_decoder_whose_first_steps_are_left_out() -> None:
    decoder, state = StepwiseDecoder(1), torch.randn(1, 2, 6)
    with grutrace.trace(decoder, steps=slice(2, 4)) as trace:
        with trace.recording(tokens=["abcde", "vwxyz"]):
            decoder(torch.randn(1, 2, 4), state, steps=5)
        # Of these no step is kept: that they fit is still found out.
        with trace.recording(tokens=["ab", "vw"]):
            decoder(torch.randn(1, 2, 4), state + 1, steps=2)
        with (
            pytest.raises(
                grutrace.OptionError, match="got 2 lists of up to 3 tokens; the recorded batch of"
            ),
            trace.recording(tokens=["abc", "vwx"]),
        ):
            decoder(torch.randn(1, 2, 4), state + 2, steps=2)
    assert [sequence.tokens for sequence in trace["rnn.l0"]] == [["c", "d"], ["x", "y"]]


@pytest.mark.parametrize(
    "steps",
    [slice(-3, None), slice(0, -1), slice(0, 9, 2), slice(5, 5), slice(5, 2), 5, "0:5", slice("a")],
)
def test_wrong_steps_are_one_clear_error(steps) -> None:
    with pytest.raises(grutrace.OptionError, match=r"steps: expected a slice such as slice\(5, 20"):
        grutrace.Tracer(nn.GRU(2, 3), steps=steps)


def test_all_steps_are_no_part() -> None:
    for steps in (slice(None), slice(0, None), slice(None, None, 1)):
        assert "steps" not in grutrace.Tracer(nn.GRU(2, 3), steps=steps).header.options
    assert grutrace.Tracer(nn.GRU(2, 3), steps=slice(5)).header.options["steps"] == "0:5"
