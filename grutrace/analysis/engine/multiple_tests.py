"""Corrections of p-values for the number of tests, and the binomial test.

n tests.
"""

from __future__ import annotations

import numpy as np

from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers


def holm(p: Array) -> Array:
    """Correct p-values so that the chance of any false finding is at most the level.

    Holm (1979), "A simple sequentially rejective multiple test procedure". NaN stands for no test.

    Args:
        p: p-values, of any shape.

    Returns:
        The corrected p-values, of the same shape.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis.engine.multiple_tests import holm
        >>> holm(np.array([0.01, 0.04, np.nan, 0.03]))
        array([0.03, 0.06,  nan, 0.06])
    """
    flat = np.asarray(p, np.float64).ravel()
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    corrected = np.full(len(flat), np.nan)
    steps = flat[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return corrected.reshape(np.shape(p))


def binomial_tail(successes: Integers, trials: int, share: float) -> Array:
    """Return the probability of at least this many successes.

    Args:
        successes: (n,) from 0 to `trials`.
        trials: Number of independent trials.
        share: Probability of a success in each, between 0 and 1.

    Returns:
        (n,) probabilities: the p-values of the hypothesis that the probability is at most `share`.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis.engine.multiple_tests import binomial_tail
        >>> binomial_tail(np.array([0, 1, 2]), trials=2, share=0.5)
        array([1.  , 0.75, 0.25])
    """
    logs = np.log(np.arange(1, trials + 1))
    factorials = np.concatenate([[0.0], np.cumsum(logs)])
    count = np.arange(trials + 1)
    choose = factorials[-1] - factorials - factorials[::-1]
    mass = np.exp(choose + count * np.log(share) + (trials - count) * np.log1p(-share))
    tail = np.minimum(np.cumsum(mass[::-1])[::-1], 1.0)
    return np.asarray(tail[np.asarray(successes)])
