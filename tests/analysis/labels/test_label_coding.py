"""Tests of labels as classes: one class a value, or groups of many values."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.analysis.labels.label_coding import (
    MAX_CLASSES,
    NUMERIC_GROUPS,
    OTHERS_NAME,
    encode_classes,
)
from grutrace.errors import OptionError
from grutrace.storage.read.annotations import encode_labels


def test_each_value_is_a_class() -> None:
    result = encode_classes(encode_labels("x", ["b", None, "a", 1.5, "b"]))
    assert result.names == (1.5, "a", "b")
    assert result.codes.tolist() == [2, -1, 1, 0, 2]
    assert result.counts.tolist() == [1, 1, 2]


def test_rare_texts_are_one_class() -> None:
    random = np.random.default_rng(0)
    words = [f"w{number:02}" for number in random.geometric(0.1, 3000)]
    result = encode_classes(encode_labels("x", words))
    assert len(result.names) == MAX_CLASSES
    assert result.names[-1] == OTHERS_NAME
    counts = {word: words.count(word) for word in set(words)}
    frequent = sorted(counts.values(), reverse=True)[: MAX_CLASSES - 1]
    assert sorted(result.counts[:-1].tolist(), reverse=True) == frequent
    assert result.counts.sum() == 3000
    for word, code in zip(words, result.codes.tolist(), strict=True):
        assert result.names[code] == (word if word in result.names else OTHERS_NAME)


def test_many_numbers_are_groups_of_equal_size() -> None:
    values = np.random.default_rng(0).normal(size=4000)
    values[:10] = np.nan
    result = encode_classes(encode_labels("x", values))
    assert len(result.names) == NUMERIC_GROUPS
    assert result.codes[:10].tolist() == [-1] * 10
    np.testing.assert_allclose(result.counts, 3990 / NUMERIC_GROUPS, atol=1)
    means = [values[result.codes == group].mean() for group in range(NUMERIC_GROUPS)]
    assert means == sorted(means)
    largest, least = values[result.codes == 0].max(), values[result.codes == 1].min()
    assert largest < least


def test_equal_numbers_stay_together() -> None:
    values = np.concatenate([np.zeros(1000), np.arange(1, 31)])
    result = encode_classes(encode_labels("x", values))
    assert len(set(result.codes[:1000].tolist())) == 1
    assert (result.counts > 0).all()


@pytest.mark.parametrize("values", [["a", "a"], [None, None], []])
def test_a_single_value_is_an_error(values) -> None:
    with pytest.raises(OptionError, match="at least two values; 'x' has"):
        encode_classes(encode_labels("x", values))
