"""Tests of row labels from plain values. The conformance suite tests those of a trace."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.storage.read.annotations import encode_labels


@pytest.mark.parametrize(
    ("annotation", "values", "codes"),
    [
        ([2.0, None, 1.0, 2.0], (1.0, 2.0), [1, -1, 0, 1]),
        (np.array([2, 5, 2]), (2.0, 5.0), [0, 1, 0]),
        (np.array([np.nan, 0.5]), (0.5,), [-1, 0]),
        (np.array([True, False]), (0.0, 1.0), [1, 0]),
        (["b", "a", None, "b"], ("a", "b"), [1, 0, -1, 1]),
        (np.array(["b", "a"]), ("a", "b"), [1, 0]),
        (["b", 3, float("nan"), ""], (3.0, "", "b"), [2, 0, -1, 1]),
        ([], (), []),
    ],
)
def test_plain_values(annotation, values, codes) -> None:
    result = encode_labels("mine", annotation)
    assert (result.name, result.values, result.codes.tolist()) == ("mine", values, codes)


def test_back_to_an_array() -> None:
    numbers = encode_labels("mine", [2.0, None, 1.0]).to_array()
    np.testing.assert_array_equal(numbers, [2.0, np.nan, 1.0])
    assert numbers.dtype == np.float64
    assert encode_labels("mine", ["a", None, 1.5]).to_array().tolist() == ["a", None, 1.5]
    assert encode_labels("mine", [None, None]).to_array().dtype == np.float64
