"""Tests of tokens and labels: every form that users pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import grutrace
from tests.capture.models import EncoderDecoder, StepwiseDecoder

#: Two sequences of three steps and of one.
IDS = [[5, 6, 7], [8]]
PADDED = [[5, 6, 7], [8, 0, 0]]


def record(**options: Any) -> Any:
    """A trace of two packed sequences, of three steps and of one."""
    layer = nn.GRU(2, 3, batch_first=True)
    packed = pack_padded_sequence(torch.randn(2, 3, 2), [3, 1], batch_first=True)
    tracer = grutrace.Tracer(layer)
    with tracer.recording(**options):
        layer(packed)
    return tracer["l0"]


TOKENS = {
    "ints": IDS,
    "tuples": tuple(map(tuple, IDS)),
    "an iterator": (iter(ids) for ids in IDS),
    "ranges": [range(5, 8), range(8, 9)],
    "ints of NumPy": [[np.int64(5), np.int32(6), np.uint8(7)], [np.int64(8)]],
    "scalars of torch": [[torch.tensor(5), torch.tensor(6), torch.tensor(7)], [torch.tensor(8)]],
    "arrays": [np.array(ids) for ids in IDS],
    "tensors": [torch.tensor(ids) for ids in IDS],
    "tensors with gradients": [
        torch.tensor(ids, requires_grad=True) for ids in ([5.0, 6, 7], [8.0])
    ],
    "a padded array": np.array(PADDED),
    "a padded tensor": torch.tensor(PADDED),
    "a padded tensor of bytes": torch.tensor(PADDED, dtype=torch.uint8),
    "a padded array of objects": np.array(PADDED, object),
    "a nested tensor": torch.nested.nested_tensor(
        [torch.tensor(ids) for ids in IDS], layout=torch.jagged
    ),
    "a table": pandas.DataFrame(PADDED),
    "series": [pandas.Series(ids) for ids in IDS],
    "extended precision": [np.array(ids, np.longdouble) for ids in IDS],
}


@pytest.mark.parametrize("form", TOKENS)
def test_token_ids_in_any_form(form: str) -> None:
    tokens = TOKENS[form]
    site = record(tokens=iter(map(list, IDS)) if form == "an iterator" else tokens)
    results = [sequence.tokens for sequence in site]
    assert results == [[5, 6, 7], [8]]
    assert all(type(token) is int for result in results for token in result)
    assert site.row_labels("tokens").to_array().tolist() == [5, 6, 7, 8]


TEXTS = {
    "lists": [["t", "h", "e"], ["a"]],
    "words": ["the", "a"],
    "a padded array": np.array([["t", "h", "e"], ["a", "", ""]]),
    "texts of NumPy": [[np.str_("t"), np.str_("h"), np.str_("e")], [np.str_("a")]],
    "words of NumPy": np.array(["the", "a"]),
    "series": pandas.Series(["the", "a"]),
}


@pytest.mark.parametrize("form", TEXTS)
def test_texts_in_any_form(form: str) -> None:
    results = [sequence.tokens for sequence in record(tokens=TEXTS[form])]
    assert results == [["t", "h", "e"], ["a"]]
    assert all(type(token) is str for result in results for token in result)


LABELS = {
    "floats": [0.5, 2],
    "an array": np.array([0.5, 2], np.float16),
    "a tensor": torch.tensor([0.5, 2], dtype=torch.bfloat16),
    "scalars": [torch.tensor(0.5), np.float32(2)],
    "steps and one value": [torch.tensor([0.5, 0.5, 0.5]), 2],
    "steps": np.array([[0.5, 0.5, 0.5], [2, np.nan, np.nan]]),
    "a series": pandas.Series([0.5, 2]),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_in_any_form(form: str) -> None:
    site = record(labels={"x": LABELS[form]})
    np.testing.assert_array_equal(site.sequence(0).labels["x"], [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(site.sequence(1).labels["x"], [2])


def test_booleans_become_numbers() -> None:
    site = record(labels={"x": [np.array([True, False, True]), torch.tensor(True)]})
    np.testing.assert_array_equal(site.sequence(0).labels["x"], [1, 0, 1])
    np.testing.assert_array_equal(site.sequence(1).labels["x"], [1])


def test_a_decoder_step_has_one_id_per_sequence() -> None:
    """The argmax of a step, (B,), is for that step only."""
    cell, state = nn.GRUCell(2, 3), torch.randn(2, 3)
    tracer = grutrace.Tracer(cell)
    for ids in torch.tensor([[5, 6], [7, 8]]):
        with tracer.recording(tokens=ids):
            state = cell(torch.randn(2, 2), state)
    assert [sequence.tokens for sequence in tracer["cell"]] == [[5, 7], [6, 8]]
    with pytest.raises(
        grutrace.OptionError, match="got 2 lists of up to 1 token; the recorded batch"
    ):
        record(tokens=torch.tensor([5, 6]))


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"tokens": "the"}, r"tokens: expected one list .* a sequence; found 'the'$"),
        ({"labels": {"x": "en"}}, r"x: expected .* or one value a sequence; found 'en'$"),
        ({"labels": {"x": 3}}, r"x: expected .*; found 3$"),
        ({"labels": {"x": torch.tensor(3)}}, r"x: .*; found a tensor of shape \(\)"),
        ({"tokens": torch.zeros(2, 3, 1)}, r"tokens: .*; found a tensor of shape \(2, 3, 1\)"),
        ({"tokens": [b"the", b"a"]}, r"tokens: .*; found \[b'the', b'a'\]"),
        ({"tokens": [{"t", "h", "e"}, {"a"}]}, r"tokens: expected one list"),
        ({"tokens": [["t", "h", 3], ["a"]]}, r"tokens: expected one list of texts, or of token"),
        ({"tokens": [["t", None, "e"], ["a"]]}, r"tokens: expected one list"),
        ({"labels": {"x": [1j, 2]}}, r"x: expected one list of numbers"),
        (
            {"labels": {"x": [2**53 + 1, 2]}},
            r"x: .* up to 2\*\*53, .* found 9007199254740993: give it as a text",
        ),
        ({"tokens": np.zeros((2, 4), int)}, r"got 2 lists of up to 4 tokens; the recorded batch"),
        ({"tokens": torch.zeros(3, 3)}, r"got 3 lists of up to 3 tokens; the recorded batch"),
        ({"tokens": [[5, 6, 7], [8, 0, 0]]}, r"got 2 lists of up to 3 tokens; the recorded batch"),
    ],
)
def test_invalid_values_are_one_clear_error(annotations: Any, message: str) -> None:
    """Only the rows of an array are padded: a list that is too long is an error."""
    with pytest.raises(grutrace.OptionError, match=message) as caught:
        record(**annotations)
    assert "\n" not in str(caught.value)
    assert "tensor(" not in str(caught.value)


def test_control_two_to_the_53_is_stored_exactly() -> None:
    site = record(labels={"x": [2**53, -(2**53)]})
    assert site.sequence(0).labels["x"].tolist() == [float(2**53)] * 3


def decode(**options: Any) -> Any:
    """A trace of one decoding, with a token for each step."""
    decoder, state = StepwiseDecoder(1), torch.randn(1, 1, 6)
    tracer = grutrace.Tracer(decoder, **options)
    with tracer.recording(tokens=[list("abcd")]):
        decoder(torch.randn(1, 1, 4), state, steps=4)
    return tracer


@pytest.mark.parametrize("gates", ["inline", "deferred"])
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, ["a", "b", "c", "d"]),
        ({"steps": slice(1, 3)}, ["b", "c"]),
        ({"steps": slice(2, None)}, ["c", "d"]),
        ({"steps": slice(9, None)}, None),
        ({"every": 9}, None),
        ({"every": 2}, None),
        ({"max_calls": 1}, None),
        ({"max_bytes": 1}, None),
        ({"steps": slice(1, 3), "every": 3}, None),
        ({"steps": slice(1, 3), "max_calls": 1}, None),
    ],
)
def test_values_of_unrecorded_steps_are_dropped(options, tokens, gates) -> None:
    tracer = decode(**options, gates=gates)
    results = [sequence.tokens for sequence in tracer["rnn.l0"]]
    assert results == ([tokens] if tokens else [None] * len(results))


@pytest.mark.parametrize("options", [{"every": 2}, {"max_calls": 3}, {"steps": slice(1, None)}])
def test_labels_go_to_the_recorded_batches(options) -> None:
    """As in a training loop: one block with labels for each batch."""
    layer = nn.GRU(2, 3, batch_first=True)
    tracer = grutrace.Tracer(layer, **options)
    for number in range(5):
        with tracer.recording(labels={"batch": [number, number]}):
            layer(torch.randn(2, 3, 2))
    recorded = {"every": [0, 2, 4], "max_calls": [0, 1, 2], "steps": range(5)}[next(iter(options))]
    results = [sequence.labels["batch"][0] for sequence in tracer["l0"]]
    assert results == [number for number in recorded for _ in range(2)]


def test_values_of_an_unrecorded_module_are_dropped() -> None:
    model = EncoderDecoder()
    tracer = grutrace.Tracer(model, max_calls=1)
    tokens = {"encoder": ["the", "a"], "decoder": ["xyz", "uvw"]}
    with tracer.recording(tokens=tokens):
        model(torch.randn(2, 3, 5), steps=3)
    assert [sequence.tokens for sequence in tracer["encoder.l0"]] == [
        ["t", "h", "e"],
        ["a", None, None],
    ]
    assert len(tracer["decoder.cell"]) == 0


@pytest.mark.parametrize(
    ("options", "annotations", "message"),
    [
        # All that was called was recorded, and none of it is so.
        ({"every": 2}, {"tokens": [["a"], ["b"], ["c"]]}, "got 3 lists .* the recorded batch"),
        ({"max_calls": 9}, {"tokens": [["a"], ["b"], ["c"]]}, "got 3 lists .* the recorded batch"),
        (
            {"steps": slice(1, 2)},
            {"tokens": [["a"], ["b"], ["c"]]},
            "got 3 lists .* the recorded batch",
        ),
        # What is no value at all, and a name that no module has, are mistakes whatever was called.
        ({"max_calls": 1}, {"tokens": [["a", 3]]}, "tokens: expected one list"),
        ({"max_calls": 1}, {"labels": {"x": 3}}, "x: expected one list"),
        ({"max_calls": 1}, {"tokens": {"rnm": [["a"]]}}, "'rnm' matches no traced module"),
    ],
)
def test_values_that_fit_no_call_are_an_error(options, annotations, message) -> None:
    layer = nn.GRU(2, 3)
    tracer = grutrace.Tracer(layer, **options)
    with pytest.raises(grutrace.OptionError, match=message), tracer.recording(**annotations):
        layer(torch.randn(3, 1, 2))
