"""Boundaries between segments of sequences, and how well some agree with others.

A boundary at a step says that a segment begins there. N steps of all sequences, end to end; S
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grutrace.errors import OptionError
from grutrace.record import Array
from grutrace.storage.index import Integers


@dataclass(frozen=True)
class BoundaryScore:
    """How well boundaries that were found agree with those of a reference.

    Räsänen, Laine and Altosaar (2009), "An improved speech segmentation quality measure: the
    R-value", Interspeech: with the hit rate HR and the over-segmentation OS in percent,

        r1 = sqrt((100 - HR)^2 + OS^2),  r2 = (-OS + HR - 100) / sqrt(2),
        R = 1 - (|r1| + |r2|) / 200.

    Unlike the F-score, R cannot be raised by boundaries that are put in at random. It is 1 where
    all agree, and below 0 where far too many are found. Not a number where there is nothing to
    divide by.

    Attributes:
        hits: Pairs of a found and a reference boundary of the same sequence that lie within the
            tolerance; each is in one pair at most.
        found: How many were found.
        reference: How many there are in the reference.
        precision: hits / found.
        recall: hits / reference: the hit rate.
        f_score: 2 hits / (found + reference).
        over_segmentation: found / reference - 1.
        r_value: R.
    """

    hits: int
    found: int
    reference: int
    precision: float
    recall: float
    f_score: float
    over_segmentation: float
    r_value: float


def score_boundaries(
    found: Array, reference: Array, lengths: Sequence[int] | Integers, tolerance: int = 2
) -> BoundaryScore:
    """Pair found boundaries with those of a reference, and score them.

    Args:
        found: (N,) whether a boundary was found at each step.
        reference: (N,) whether there is one.
        lengths: (S,) steps of each sequence. A pair never spans two sequences.
        tolerance: How many steps apart the two of a pair may be.

    Raises:
        OptionError: The shapes do not fit together.
    """
    lengths = np.asarray(lengths, np.int64)
    for name, given in (("found", found), ("reference", reference)):
        if np.shape(given) != (int(lengths.sum()),):
            raise OptionError(
                f"{name}: expected shape ({lengths.sum()},), as the lengths add up to; "
                f"found {np.shape(given)}"
            )
    # As one sequence, whose parts lie too far apart for a pair.
    apart = np.repeat(np.arange(len(lengths)) * (tolerance + 1), lengths)
    places = np.arange(len(apart)) + apart
    hits = _pairs(places[np.asarray(found, bool)], places[np.asarray(reference, bool)], tolerance)
    return _score(hits, int(np.count_nonzero(found)), int(np.count_nonzero(reference)))


def _pairs(found: Integers, reference: Integers, tolerance: int) -> int:
    """How many pairs there can be. Taking the earliest that fits leaves most for the rest."""
    hits, place, ours, theirs = 0, 0, found.tolist(), reference.tolist()
    for boundary in ours:
        while place < len(theirs) and theirs[place] < boundary - tolerance:
            place += 1
        if place < len(theirs) and theirs[place] <= boundary + tolerance:
            hits, place = hits + 1, place + 1
    return hits


def _score(hits: int, found: int, reference: int) -> BoundaryScore:
    recall, over = _ratio(hits, reference), _ratio(found, reference) - 1
    r1 = math.hypot(100 - 100 * recall, 100 * over)
    r2 = (100 * recall - 100 - 100 * over) / math.sqrt(2)
    return BoundaryScore(
        hits=hits,
        found=found,
        reference=reference,
        precision=_ratio(hits, found),
        recall=recall,
        f_score=_ratio(2 * hits, found + reference),
        over_segmentation=over,
        r_value=1 - (abs(r1) + abs(r2)) / 200,
    )


def _ratio(some: int, of: int) -> float:
    return some / of if of else math.nan


def peaks(
    values: Array, lengths: Sequence[int] | Integers, threshold: float
) -> npt.NDArray[np.bool_]:
    """Where values are above a threshold and no smaller than either neighbour of their sequence.

    Of neighbours that are equal the first is the peak. What is not a number is none.

    Args:
        values: (N,)
        lengths: (S,) steps of each sequence.
        threshold: In the unit of the values.
    """
    edges = np.zeros(len(values) + 1, bool)
    edges[np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])] = True
    known = np.where(np.isnan(values), -np.inf, values)
    before = np.concatenate([[-np.inf], known[:-1]])
    after = np.concatenate([known[1:], [-np.inf]])
    before[edges[:-1]], after[edges[1:]] = -np.inf, -np.inf
    return np.asarray((known > threshold) & (known > before) & (known >= after))
