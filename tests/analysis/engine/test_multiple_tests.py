"""Tests of corrections and of the binomial test, against SciPy and simulation."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom

from grutrace.analysis.engine.multiple_tests import binomial_tail, holm


def test_the_binomial_tail_is_scipys() -> None:
    for trials in (0, 1, 7, 3000):
        counts = np.unique(np.linspace(0, trials, 9).astype(int))
        expected = binom.sf(counts - 1, trials, 0.8)
        np.testing.assert_allclose(binomial_tail(counts, trials, 0.8), expected, rtol=1e-9)


def test_holm_by_hand() -> None:
    """The smallest of n is multiplied by n, the next by n - 1; they never fall."""
    p = np.array([[0.01, 0.02], [0.03, 0.5]])
    np.testing.assert_allclose(holm(p), [[0.04, 0.06], [0.06, 0.5]])
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).shape == (0,)


def test_holm_keeps_the_level_and_control_without_it_does_not() -> None:
    p = np.random.default_rng(0).uniform(size=(2000, 20))
    assert 0.03 < np.mean([(holm(row) < 0.05).any() for row in p]) < 0.07
    assert np.mean((p < 0.05).any(axis=1)) > 0.5
