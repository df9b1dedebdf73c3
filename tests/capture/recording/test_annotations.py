"""Tokens and labels find the steps they belong to, or one error says what was recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import grutrace
from tests.capture.models import EncoderDecoder, StepwiseDecoder

WORDS = [["t", "h", "e"], ["a"]]


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 3, 5)


def test_tokens_go_where_they_fit_exactly(model, batch) -> None:
    tracer = grutrace.Tracer(model)
    with tracer.recording(tokens=WORDS):
        model(batch, steps=5)
    assert [sequence.tokens for sequence in tracer["encoder.l0"]] == [
        ["t", "h", "e"],
        ["a", None, None],
    ]
    assert [sequence.tokens for sequence in tracer["decoder.cell"]] == [None, None]


def test_a_word_is_its_letters(model, batch) -> None:
    tracer = grutrace.Tracer(model)
    with tracer.recording(tokens=["the", "a"]):
        model(batch, steps=5)
    assert tracer["encoder.l0"].sequence(0).tokens == ["t", "h", "e"]


def test_what_is_known_only_afterwards(model, batch) -> None:
    tracer = grutrace.Tracer(model)
    with tracer.recording() as recording:
        model(batch, steps=4)
        recording.annotate(tokens=[["DH", "AH"], ["EY", "</s>", "x", "y"]], module="dec*")
    assert tracer["decoder.cell"].sequence(0).tokens == ["DH", "AH", None, None]
    assert tracer["decoder.cell"].sequence(1).tokens == ["EY", "</s>", "x", "y"]


def test_values_by_module(model, batch) -> None:
    tracer = grutrace.Tracer(model)
    labels = {"n": {"encoder": np.arange(6).reshape(2, 3), "decoder": torch.ones(2, 4)}}
    with tracer.recording(labels=labels):
        model(batch, steps=4)
    np.testing.assert_array_equal(tracer["encoder.l0"].sequence(1).labels["n"], [3, 4, 5])
    np.testing.assert_array_equal(tracer["decoder.cell"].sequence(1).labels["n"], np.ones(4))


def test_one_value_a_sequence_holds_for_all_its_steps(model, batch) -> None:
    tracer = grutrace.Tracer(model)
    with tracer.recording(labels={"language": ["en", "de"], "id": [7, 8]}):
        model(batch, steps=4)
    assert tracer["encoder.l0"].sequence(1).labels["language"] == ["de"] * 3
    np.testing.assert_array_equal(tracer["decoder.cell"].sequence(0).labels["id"], [7.0] * 4)


def test_a_sequence_that_goes_on_gets_values_from_where_the_recording_began() -> None:
    decoder = StepwiseDecoder(1)
    state = torch.randn(1, 2, 6)
    tracer = grutrace.Tracer(decoder)
    with tracer.recording():
        token, state = decoder.rnn(torch.randn(1, 2, 4), state)
    with tracer.recording() as recording:
        for _ in range(2):
            token, state = decoder.rnn(token[..., :4], state)
        recording.annotate(tokens=[["b", "c"], ["y"]], module="rnn")
    assert tracer["rnn.l0"].sequence(0).tokens == [None, "b", "c"]
    assert tracer["rnn.l0"].sequence(1).tokens == [None, "y", None]


def test_a_shrinking_batch_keeps_its_places() -> None:
    cell, state = torch.nn.GRUCell(2, 3), torch.randn(3, 3)
    tracer = grutrace.Tracer(cell)
    with tracer.recording() as recording:
        state = cell(torch.randn(3, 2), state)
        state = cell(torch.randn(2, 2), state[[0, 2]])
        cell(torch.randn(1, 2), state[[1]])
        recording.annotate(tokens=["ab", "x", "pqr"], module="")
    tokens = [sequence.tokens for sequence in tracer["cell"]]
    assert tokens == [["a", "b"], ["x"], ["p", "q", "r"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokens": [["a"], ["b"], ["c"]]},
            r"^tokens: got 3 lists of up to 1 token; .*"
            r"the recorded batch of encoder has 2 sequences of up to 3 steps",
        ),
        ({"tokens": [[1, 2, "x"], [4]]}, "tokens: expected one list of texts, or of token ids"),
        ({"labels": {"pos": [["NN", 2, 3], [4]]}}, "pos: expected one list of numbers, or"),
        (
            {"labels": {"pos": {"encodr": [[1], [2]]}}},
            "'encodr' matches no traced module: encoder, decoder",
        ),
        (
            {"labels": {"pos": {"encoder": [[1, 2, 3, 4], [2]]}}},
            "pos: got 2 lists of up to 4 values for 'encoder'; the recorded batch of",
        ),
    ],
)
def test_values_that_fit_nothing_are_one_clear_error(model, batch, options, message) -> None:
    tracer = grutrace.Tracer(model)
    with pytest.raises(grutrace.OptionError, match=message), tracer.recording(**options):
        model(batch)
    assert len(tracer["encoder.l0"]) == 2
    assert not tracer.is_recording
