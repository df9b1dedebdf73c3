"""Gate activation along time, and boundaries between segments of a sequence.

Wang, Chung and Lee (2017), "Gate activation signal analysis for gated recurrent neural networks and
its correlation with phoneme boundaries", Interspeech. For a gate g of H units:

    signal(t) = mean over units of g(t),   difference(t) = signal(t) - signal(t - 1).

They find that the difference of the update gate peaks at phoneme boundaries, in networks that were
not trained on phonemes.

A boundary at a step means that a segment begins there. N steps of all sequences, concatenated; S
sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from grutrace.analysis.engine.map_reduce import summarize_rows
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import (
    SiteData,
    SiteLike,
    as_site_data,
    steps_of_sequences,
)
from grutrace.errors import OptionError, short_repr
from grutrace.records import GATES, Array
from grutrace.storage.read.sequence_index import Integers


@dataclass(frozen=True)
class BoundaryScore:
    """Agreement of detected boundaries with those of a reference.

    Räsänen, Laine and Altosaar (2009), "An improved speech segmentation quality measure: the
    R-value", Interspeech: with the hit rate HR and the over-segmentation OS in percent,

        r1 = sqrt((100 - HR)^2 + OS^2),  r2 = (-OS + HR - 100) / sqrt(2),
        R = 1 - (|r1| + |r2|) / 200.

    Unlike the F-score, R cannot be raised by inserting random boundaries. It is 1 for full
    agreement, and negative where far too many boundaries are detected. Values are NaN where the
    divisor is 0.

    Attributes:
        hits: Number of pairs of a detected and a reference boundary of the same sequence within the
            tolerance; each is in at most one pair.
        found: Number of detected boundaries.
        reference: Number of reference boundaries.
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
    """Pair detected boundaries with those of a reference, and score them.

    Args:
        found: (N,) whether a boundary was detected at each step.
        reference: (N,) whether the reference has one.
        lengths: (S,) number of steps of each sequence. A pair never spans two sequences.
        tolerance: Largest distance of a pair, in steps.

    Returns:
        Counts and scores.

    Raises:
        OptionError: The shapes do not match.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import score_boundaries
        >>> found, reference = np.zeros((2, 20), bool)
        >>> found[[3, 10]], reference[[4, 16]] = True, True
        >>> score = score_boundaries(found, reference, lengths=[20], tolerance=2)
        >>> score.hits, score.precision, score.recall
        (1, 0.5, 0.5)
    """
    lengths = np.asarray(lengths, np.int64)
    for name, boundaries in (("found", found), ("reference", reference)):
        if np.shape(boundaries) != (int(lengths.sum()),):
            raise OptionError(
                f"{name}: expected shape ({lengths.sum()},), as the lengths add up to; "
                f"found {np.shape(boundaries)}"
            )
    # Concatenate the sequences with gaps wider than the tolerance.
    delta = np.repeat(np.arange(len(lengths)) * (tolerance + 1), lengths)
    positions = np.arange(len(delta)) + delta
    hits = _pairs(
        positions[np.asarray(found, bool)], positions[np.asarray(reference, bool)], tolerance
    )
    return _score_boundaries(hits, int(np.count_nonzero(found)), int(np.count_nonzero(reference)))


def _pairs(detected: Integers, reference: Integers, tolerance: int) -> int:
    """Count the pairs. Matching the earliest candidate gives the largest number."""
    hits, position, ours, theirs = 0, 0, detected.tolist(), reference.tolist()
    for boundary in ours:
        while position < len(theirs) and theirs[position] < boundary - tolerance:
            position += 1
        if position < len(theirs) and theirs[position] <= boundary + tolerance:
            hits, position = hits + 1, position + 1
    return hits


def _score_boundaries(hits: int, detected: int, reference: int) -> BoundaryScore:
    recall, over = _ratio(hits, reference), _ratio(detected, reference) - 1
    r1 = math.hypot(100 - 100 * recall, 100 * over)
    r2 = (100 * recall - 100 - 100 * over) / math.sqrt(2)
    return BoundaryScore(
        hits=hits,
        found=detected,
        reference=reference,
        precision=_ratio(hits, detected),
        recall=recall,
        f_score=_ratio(2 * hits, detected + reference),
        over_segmentation=over,
        r_value=1 - (abs(r1) + abs(r2)) / 200,
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def peaks(
    values: Array, lengths: Sequence[int] | Integers, threshold: float
) -> npt.NDArray[np.bool_]:
    """Find values above a threshold that are no smaller than both neighbours of their sequence.

    Of equal neighbours the first is the peak. NaN is never one.

    Args:
        values: (N,)
        lengths: (S,) number of steps of each sequence.
        threshold: In the unit of the values.
    """
    edges = np.zeros(len(values) + 1, bool)
    edges[np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])] = True
    known = np.where(np.isnan(values), -np.inf, values)
    before = np.concatenate([[-np.inf], known[:-1]])
    after = np.concatenate([known[1:], [-np.inf]])
    before[edges[:-1]], after[edges[1:]] = -np.inf, -np.inf
    return np.asarray((known > threshold) & (known > before) & (known >= after))


#: Smallest default threshold, so that a nearly constant gate has no boundaries. It is the smallest
#: threshold in the program of Wang, Chung and Lee.
LEAST = 0.001

#: Factor of the difference by direction; 0 for its magnitude.
DIRECTIONS = {"rise": 1, "fall": -1, "both": 0}


@dataclass(frozen=True, eq=False)
class GateActivation(Result):
    """Gate activation of a site. Steps of all sequences are concatenated, each in time order.

    Attributes:
        steps: N.
        gate: Name of the gate.
        threshold: Threshold of the difference for a boundary.
        boundaries: Number of boundaries.
        lengths: (S,) number of steps of each sequence.
        signal: (N,) float64, mean of the gate over the recorded units. NaN where the gate of a unit
            is NaN.
        difference: (N,) difference from the step before in the same sequence; NaN at the first
            step. For a reverse direction it is the difference from the step after, which was
            computed before, and is stored at the later of the two steps.
        boundary: (N,) whether a segment begins there.
        r_value, precision, recall, f_score, over_segmentation: Agreement with the label; see
            `BoundaryScore`. NaN without a label.
    """

    index_field: ClassVar[str] = "rows"
    excluded_columns: ClassVar[tuple[str, ...]] = ("lengths",)
    index_columns: ClassVar[tuple[str, ...]] = ("sequence", "step")

    steps: int
    gate: str
    threshold: float
    boundaries: int
    lengths: Integers
    signal: Array
    difference: Array
    boundary: Array
    r_value: float
    precision: float
    recall: float
    f_score: float
    over_segmentation: float

    @property
    def rows(self) -> Integers:
        """(N,) numbers of the rows."""
        return np.arange(self.steps)

    def columns(self) -> dict[str, Array]:
        """Return the columns of the table, with the sequence and step of each row."""
        number, *rest = super().columns().items()
        ends = np.cumsum(self.lengths)
        sequence = np.repeat(np.arange(len(ends)), self.lengths)
        step = steps_of_sequences(self.lengths)
        return dict([number, ("sequence", sequence), ("step", step), *rest])


def gate_activation(
    site: SiteLike,
    gate: str = "update",
    *,
    direction: str = "rise",
    threshold: float | None = None,
    label: str | None = None,
    tolerance: int = 2,
) -> GateActivation:
    """Compute the mean of a gate along time, and boundaries where it changes most.

    A boundary is a local maximum of the difference above the threshold.

    Args:
        site: A site with the gate.
        gate: reset, update or candidate.
        direction: ``rise``, as in the paper; ``fall``; or ``both``, for the magnitude.
        threshold: In the unit of the gate. Default: mean plus standard deviation of the differences
            (signed by `direction`), and at least `LEAST`.
        label: Name of a label, or ``tokens``, whose changes within a sequence are the reference
            boundaries. Default: no scores.
        tolerance: Largest distance of a boundary from one of the reference, in steps.

    Returns:
        The signal, its differences and the boundaries.

    Raises:
        OptionError: There is no such gate or direction.
        NotRecordedError: The gate was not recorded, or there is no such label.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, gate_activation
        >>> update = np.array([[0.2], [0.2], [0.9], [0.8], [0.2]])
        >>> gate_activation(SiteArrays(update=update)).boundary
        array([False, False,  True, False, False])
    """
    if gate not in GATES:
        raise OptionError(f"gate: expected one of {', '.join(GATES)}; found {short_repr(gate)}")
    if direction not in DIRECTIONS:
        expected = ", ".join(DIRECTIONS)
        raise OptionError(f"direction: expected one of {expected}; found {short_repr(direction)}")
    data = as_site_data(site)
    lengths = data.lengths
    means = summarize_rows(data, (gate,), _row_means)["means"]
    signal = np.concatenate(means)[data.rows_between(0, len(lengths))]
    difference = np.full(data.steps, np.nan)
    inner = np.flatnonzero(steps_of_sequences(lengths))
    way = -1 if data.reverse else 1
    difference[inner] = (signal[inner] - signal[inner - 1]) * way
    sign = DIRECTIONS[direction]
    turned = np.abs(difference) if sign == 0 else sign * difference
    bound = _threshold(turned) if threshold is None else threshold
    boundary = peaks(turned, lengths, bound)
    return GateActivation(
        site=data.name,
        steps=data.steps,
        gate=gate,
        threshold=float(bound),
        boundaries=int(np.count_nonzero(boundary)),
        lengths=lengths,
        signal=signal,
        difference=difference,
        boundary=boundary,
        **_scores(None if label is None else _score(data, label, boundary, tolerance)),
    )


def _row_means(rows: Mapping[str, Array]) -> dict[str, Any]:
    """Compute the mean of each row over units."""
    (gate,) = rows.values()
    return {"means": [gate.mean(1, dtype=np.float64)]}


def label_boundaries(site: SiteLike, label: str) -> Array:
    """Find the steps where a label changes within a sequence.

    A step with a label next to one without is a change.

    Args:
        site: A site with labels.
        label: Name of the label, or ``tokens``.

    Returns:
        (N,) whether a segment begins at each step; sequences concatenated, each in time order.

    Raises:
        NotRecordedError: There is no such label.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, label_boundaries
        >>> site = SiteArrays(hidden=np.zeros((5, 2)), labels={"word": ["a", "a", "b", "b", "a"]})
        >>> label_boundaries(site, "word")
        array([False, False,  True, False,  True])
    """
    data = as_site_data(site)
    codes = data.labels(label).codes[data.rows_between(0, len(data.lengths))]
    changes = np.zeros(data.steps, bool)
    changes[1:] = codes[1:] != codes[:-1]
    return changes & (steps_of_sequences(data.lengths) > 0)


def _score(data: SiteData, label: str, boundary: Array, tolerance: int) -> BoundaryScore:
    return score_boundaries(boundary, label_boundaries(data, label), data.lengths, tolerance)


def _scores(score: BoundaryScore | None) -> dict[str, float]:
    names = ("r_value", "precision", "recall", "f_score", "over_segmentation")
    return {name: np.nan if score is None else getattr(score, name) for name in names}


def _threshold(turned: Array) -> float:
    known = turned[np.isfinite(turned)]
    return max(LEAST, float(known.mean() + known.std())) if len(known) else LEAST
