"""Lyapunov exponents: whether a network forgets small differences between states or amplifies them.

Two nearby states with the same input differ after t steps by the product of the steps' Jacobians
times their initial difference. Its directions grow or shrink as exp(lambda_i t). The lambda_i are
the exponents, in decreasing order, in nats a step. A positive exponent means chaos: a difference as
small as rounding grows as large as the states, so a run on another machine, or from states that
were stored with fewer digits, soon takes a different course.

Method: k orthonormal directions are multiplied by the Jacobian of every recorded step, and
orthonormalized by QR every few steps. The exponents are the sum of log |R_ii| over the number of
steps (Benettin et al. 1980; Geist, Parlitz and Lauterborn 1990). Between two QRs the directions
turn towards the one that grows most, which costs the others as many digits as the ratio of their
sizes has. So the number of steps is chosen by the growth that the last ones had (`SPREAD`), and
what lost too many digits (`MAX_SPREAD`) is repeated in fewer steps. For GRUs: Can, Krishnamurthy
and Schwab (2020); Engelken, Wolf and Abbott (2023), "Lyapunov spectra of chaotic recurrent neural
networks". The Jacobians are taken at the recorded states, so the trajectory does not drift.

H units, k exponents, B sequences that are processed together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np

from grutrace.analysis.dynamics.jacobian import REQUIRED, factors, require_all_units
from grutrace.analysis.engine.blas import single_blas_thread
from grutrace.analysis.engine.map_reduce import reduce_sequences
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.segments import PREVIOUS, RESTARTS, WEIGHTS, SequenceSegment
from grutrace.analysis.engine.site_data import SiteLike, as_site_data, row_bytes
from grutrace.errors import OptionError, short_repr
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Default number of exponents.
EXPONENTS = 10

#: Share of each sequence that is skipped by default, in which the random directions align.
TRANSIENT = 0.1

#: Largest number of blocks for the standard errors, and smallest number of steps in a block.
BLOCKS, MIN_BLOCK_STEPS = 32, 10

#: Smallest number of counted steps for a statement about chaos. Jacobians of single steps are not
#: normal: even in a network that forgets everything, differences can grow for a few steps, and
#: shorter sequences show nothing else.
MIN_LENGTH = 50

#: Size of the steps or directions of short sequences that are processed together, in bytes.
BATCH_BYTES = 8 * 1024 * 1024

#: Number of values of a quantity in the sequences that one thread processes.
PART_VALUES = 512 * 1024

#: Largest number of steps between two QRs.
MAX_INTERVAL = 64

#: Log ratio of the largest to the smallest direction at a QR: to aim at, and not to exceed. The
#: smallest keeps twelve digits of float64.
SPREAD, MAX_SPREAD = np.log(1e3), np.log(1e4)


@dataclass(frozen=True, eq=False)
class Lyapunov(Result):
    """Lyapunov exponents along the sequences of a site.

    Values are NaN where no step was counted or a value is not finite.

    Attributes:
        units: H.
        sequences: Number of sequences.
        steps: Number of counted steps, of all sequences.
        numbers: (k,) 1 for the largest exponent, and so on.
        exponents: (k,) in nats a step, in decreasing order. Minus infinity for a direction that is
            lost exactly. Exponents below about -30 consist of rounding.
        errors: (k,) standard errors, from the means of blocks of consecutive steps. Too small if
            the network changes more slowly than a block. NaN where there are fewer than two blocks.
        drift: (k,) exponents of the second half of the counted steps minus those of the first.
            Large compared with `errors` if they have not converged, or the sequences differ.
        largest: The largest exponent.
        largest_error: Its standard error.
        length: Mean number of counted steps in the sequence of a counted step.
        chaotic: Whether the largest exponent is above 0 by more than two standard errors; None
            where `length` is below `MIN_LENGTH`, too short to tell.
        horizon: Number of steps after which a difference of one rounding of the storage type is as
            large as the states: -log(eps) / largest. Infinite unless the largest exponent is
            positive; NaN where `chaotic` is None.
        dimension: Kaplan-Yorke dimension of the attractor: the number of the largest exponents that
            sum to 0, the last in part. NaN if k exponents are too few.
        entropy_rate: Sum of the positive exponents, in nats a step: an upper bound of the entropy
            rate. NaN likewise.
    """

    index_field: ClassVar[str] = "numbers"

    units: int
    sequences: int
    steps: int
    numbers: Integers
    exponents: Array
    errors: Array
    drift: Array
    largest: float
    largest_error: float
    length: float
    chaotic: bool | None
    horizon: float
    dimension: float
    entropy_rate: float


def lyapunov(
    site: SiteLike,
    count: int = EXPONENTS,
    skip: int | None = None,
    interval: int | None = None,
) -> Lyapunov:
    """Compute the largest Lyapunov exponents along the recorded sequences.

    A step takes about ``6 H^2 k`` operations; every few steps there is a QR of (H, k).

    Args:
        site: A site with reset, update, candidate, hidden and weights, of all units. The input is
            held fixed: for a decoder that reads its own output, the feedback is not included.
        count: k, at most H.
        skip: Number of steps at the start of each sequence that are not counted, because the
            initial directions are random. Default: a tenth of each sequence.
        interval: Number of steps between two QRs. Default: as many as the growth of the directions
            allows, so that the smallest keeps twelve digits.

    Returns:
        The exponents, and what follows from them.

    Raises:
        NotRecordedError: A required quantity was not recorded.
        OptionError: `count`, `skip` or `interval` is not such a number.

    Examples:
        A layer with PyTorch's initialization forgets its initial state.

        >>> import torch, grutrace
        >>> from grutrace.analysis import lyapunov
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.GRU(2, 8)
        >>> with torch.no_grad(), grutrace.trace(layer) as trace:
        ...     _ = layer(torch.randn(200, 1, 2))
        >>> result = lyapunov(trace["l0"], count=2)
        >>> result.chaotic, bool(result.largest < 0)
        (False, True)
    """
    if not isinstance(count, int) or count < 1:
        raise OptionError(
            f"count: expected a number of exponents, 1 or more; found {short_repr(count)}"
        )
    if skip is not None and (not isinstance(skip, int) or skip < 0):
        raise OptionError(f"skip: expected a number of steps, 0 or more; found {short_repr(skip)}")
    if interval is not None and (not isinstance(interval, int) or interval < 1):
        raise OptionError(
            f"interval: expected a number of steps, 1 or more; found {short_repr(interval)}"
        )
    data = as_site_data(site)
    require_all_units(data)
    size = len(data.units)
    skipped = np.ceil(data.lengths * TRANSIENT).astype(np.int64) if skip is None else skip
    skipped = np.minimum(data.lengths, skipped)
    counted = data.lengths - skipped
    total = int(counted.sum())
    blocks = max(1, min(BLOCKS, total // MIN_BLOCK_STEPS))
    # Position of each sequence's first step among the counted steps of all, as if none were
    # skipped.
    starts = np.cumsum(counted) - counted - skipped
    make_reducer = partial(
        _GrowthSums, size, min(count, size), skipped, starts, blocks, total, interval
    )
    quantities = (*REQUIRED, PREVIOUS, WEIGHTS, RESTARTS)
    part_bytes = PART_VALUES * row_bytes(data, REQUIRED) // max(1, size)
    growth = reduce_sequences(data, quantities, make_reducer, part_bytes)
    with np.errstate(invalid="ignore", divide="ignore"):
        exponents = growth.logs.sum(axis=0) / total
        errors = _errors(growth.logs / growth.steps[:, np.newaxis])
        drift = _drift(growth.logs, growth.steps)
    # QR returns them in this order, except for those closer than their errors.
    order = np.argsort(-exponents, kind="stable")
    exponents, errors, drift = exponents[order], errors[order], drift[order]
    largest, error = float(exponents[0]), float(errors[0])
    length = float(np.square(counted, dtype=np.float64).sum() / total) if total else np.nan
    chaotic = largest > (0.0 if np.isnan(error) else 2 * error)
    horizon = _horizon(largest, float(np.finfo(data.rows("hidden").dtype).eps))
    known = length >= MIN_LENGTH
    return Lyapunov(
        site=data.name,
        units=size,
        sequences=len(data.lengths),
        steps=total,
        numbers=np.arange(1, len(exponents) + 1),
        exponents=exponents,
        errors=errors,
        drift=drift,
        largest=largest,
        largest_error=error,
        length=length,
        chaotic=chaotic if known else None,
        horizon=horizon if known else np.nan,
        dimension=kaplan_yorke(exponents, size),
        entropy_rate=_entropy_rate(exponents, size),
    )


def _horizon(largest: float, spacing: float) -> float:
    return float(-np.log(spacing) / largest) if largest > 0 else np.inf


def _errors(means: Array) -> Array:
    """(k,) of (blocks, k) means."""
    if len(means) < 2:
        return np.full(means.shape[1], np.nan)
    return np.asarray(means.std(axis=0, ddof=1) / np.sqrt(len(means)))


def _drift(logs: Array, steps: Integers) -> Array:
    """(k,) of (blocks, k) sums of logs, and their numbers of steps."""
    half = len(logs) // 2
    if half == 0:
        return np.full(logs.shape[1], np.nan)
    first, second = (
        logs[part].sum(0) / steps[part].sum() for part in np.split(np.arange(len(logs)), [half])
    )
    return np.asarray(second - first)


def kaplan_yorke(exponents: Array, size: int) -> float:
    """Kaplan-Yorke dimension (1979) from the largest of H exponents.

    Args:
        exponents: (k,) in decreasing order.
        size: H.
    """
    if np.isnan(exponents).any():
        return float("nan")
    sums = np.cumsum(exponents)
    count = int(np.count_nonzero(np.minimum.accumulate(sums) >= 0))
    if count == len(exponents):
        return float(size) if count == size else float("nan")
    remainder = sums[count - 1] if count else 0.0
    return float(count + remainder / -exponents[count])


def _entropy_rate(exponents: Array, size: int) -> float:
    unknown = exponents[-1] > 0 and len(exponents) < size
    if unknown or np.isnan(exponents).any():
        return float("nan")
    return float(exponents[exponents > 0].sum())


class _GrowthSums:
    """Sums of the logarithmic growth of the directions, by blocks of counted steps.

    Args:
        size: H.
        count: k.
        skipped: (S,) number of steps of each sequence that are not counted.
        starts: (S,) position of its first step among the counted steps of all sequences.
        blocks: Number of blocks.
        total: Number of counted steps.
        interval: Number of steps between two QRs; None to choose it.

    Attributes:
        logs: (blocks, k) sums of log |R_ii|.
        steps: (blocks,) numbers of counted steps.
    """

    def __init__(
        self,
        size: int,
        count: int,
        skipped: Integers,
        starts: Integers,
        blocks: int,
        total: int,
        interval: int | None,
    ) -> None:
        self._skipped, self._starts, self._total = skipped, starts, max(1, total)
        self._interval, self._adaptive = interval or 1, interval is None
        self.logs, self.steps = np.zeros((blocks, count)), np.zeros(blocks, np.int64)
        random = np.random.default_rng(0).standard_normal((size, count))
        # Directions are rows, so that what a product reads and writes is contiguous.
        self._first = np.ascontiguousarray(np.linalg.qr(random)[0].T)
        self._directions = self._first[np.newaxis]
        self._waiting: list[SequenceSegment] = []

    def add(self, segment: SequenceSegment) -> None:
        if self._waiting and self._waiting[0].weights is not segment.weights:
            self.finish()
        if segment.is_first and segment.ends:
            self._waiting.append(segment)
            steps = len(self._waiting) * max(map(len, self._waiting))
            directions = len(self._waiting) * self._first.shape[0]
            if 8 * self._first.shape[1] * max(4 * steps, 4 * directions) >= BATCH_BYTES:
                self.finish()
            return
        if segment.is_first:
            self._directions = self._first[np.newaxis]
        self._directions = self._carry([segment], self._directions)

    def merge(self, later: _GrowthSums) -> None:
        self.logs += later.logs
        self.steps += later.steps

    def finish(self) -> None:
        """Process the pending segments."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            # Longest first, so that the active sequences are always the first ones.
            waiting.sort(key=len, reverse=True)
            self._carry(waiting, np.repeat(self._first[np.newaxis], len(waiting), axis=0))

    def _carry(self, segments: Sequence[SequenceSegment], directions: Array) -> Array:
        """Propagate directions, (B, k, H), along segments with the same weights, longest first."""
        weights = segments[0].weights
        assert weights is not None
        lengths = np.array([len(segment) for segment in segments])
        sequences = np.array([segment.sequence for segment in segments])
        starts = np.array([segment.start for segment in segments])
        recurrent = np.ascontiguousarray(np.asarray(weights["weight_hh"], np.float64).T)
        step_factors = _padded(segments, weights, recurrent.shape[0])
        # There is a QR where a sequence ends, where its counting begins, and between blocks.
        begins = np.clip(self._skipped[sequences] - starts, 0, lengths)
        firsts = -(-np.arange(len(self.steps)) * self._total // len(self.steps))
        between = (firsts - (self._starts[sequences] + starts)[:, np.newaxis]).ravel()
        bounds = np.unique(np.concatenate([[0], begins, lengths, between]))
        bounds = bounds[(bounds >= 0) & (bounds <= lengths[0])]
        with (
            single_blas_thread(),
            np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"),
        ):
            for start, stop in pairwise(bounds.tolist()):
                active = int(np.count_nonzero(lengths > start))
                directions, step = directions[:active], start
                while step < stop:
                    length = min(self._interval, stop - step)
                    part = [factor[step : step + length, :active] for factor in step_factors]
                    after = _multiply(recurrent, part, directions)
                    orthonormal, upper = np.linalg.qr(after.transpose(0, 2, 1))
                    logs = np.log(np.abs(np.diagonal(upper, axis1=1, axis2=2)))
                    if self._adaptive and not self._adapt(logs, length):
                        continue
                    directions = np.ascontiguousarray(orthonormal.transpose(0, 2, 1))
                    self._count(sequences[:active], starts[:active] + step, length, logs)
                    step += length
        return directions

    def _adapt(self, logs: Array, length: int) -> bool:
        """Choose the interval by the growth in the last one, and tell whether that was accurate."""
        spread = float(np.max(logs.max(1) - logs.min(1), initial=0.0))
        longest = min(MAX_INTERVAL, 2 * max(length, self._interval))
        allowed = SPREAD * length / spread if spread else np.inf
        # Without an exact direction, or a finite one, there is nothing to choose by.
        self._interval = 1 if np.isnan(allowed) else max(1, int(min(longest, allowed)))
        if spread > MAX_SPREAD and length > 1:
            self._interval = min(self._interval, length // 2)
            return False
        return True

    def _count(self, sequences: Integers, steps: Integers, length: int, logs: Array) -> None:
        """Add the logs, (B, k), of `length` steps from these on, which are in one block each."""
        counted = steps >= self._skipped[sequences]
        blocks = (self._starts[sequences] + steps)[counted] * len(self.steps) // self._total
        np.add.at(self.logs, blocks, logs[counted])
        np.add.at(self.steps, blocks, length)


def _multiply(recurrent: Array, step_factors: Sequence[Array], directions: Array) -> Array:
    """Multiply directions, (B, k, H), by the Jacobians of steps, given the factors of `_padded`."""
    batch, count, size = directions.shape
    product = np.empty((batch * count, 3 * size))
    by_gate = product.reshape(batch, count, 3, size)
    for keep, gates in zip(*step_factors, strict=True):
        # `matmul` of two matrices keeps the GIL.
        np.dot(directions.reshape(batch * count, size), recurrent, out=product)
        directions = keep[:, np.newaxis] * directions
        # One pass, in place of three products and three sums.
        directions += np.einsum("bkgh,bgh->bkh", by_gate, gates)
    return directions


def _padded(
    segments: Sequence[SequenceSegment], weights: Mapping[str, Array], size: int
) -> tuple[Array, Array]:
    """Return the factors of all steps, zero-padded: (T, B, H) kept, (T, B, 3, H) through gates."""
    shape = len(segments[0]), len(segments)
    keeps, gates = np.zeros((*shape, size)), np.zeros((*shape, 3, size))
    for number, segment in enumerate(segments):
        assert segment.previous is not None
        keep, *by_gate = factors(segment.values, segment.previous, weights)
        keeps[: len(segment), number] = keep
        for gate, factor in enumerate(by_gate):
            gates[: len(segment), number, gate] = factor
    return keeps, gates
