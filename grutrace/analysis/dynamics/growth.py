"""Growth of directions along sequences: products with the Jacobians of steps, and QR between.

`lyapunov` explains the method. With the compiled library each sequence is processed by itself: it
computes the Jacobian of each step and multiplies all directions by it. With NumPy, sequences are
processed together, and their directions are multiplied by the three recurrent weights.

H units, k directions, B sequences that are processed together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from grutrace.analysis.dynamics.jacobian import Factors, factors
from grutrace.analysis.engine.blas import single_blas_thread
from grutrace.analysis.engine.segments import SequenceSegment
from grutrace.native.directions import advance, is_available
from grutrace.records import Array
from grutrace.storage.read.sequence_index import Integers

#: Size of the steps or directions of short sequences that are processed together, in bytes.
BATCH_BYTES = 8 * 1024 * 1024

#: Largest number of steps between two QRs.
MAX_INTERVAL = 64

#: Log ratio of the largest to the smallest direction at a QR: to aim at, and not to exceed. The
#: smallest keeps twelve digits of float64.
SPREAD, MAX_SPREAD = np.log(1e3), np.log(1e4)


class GrowthSums:
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
        # The weights of the last segment, and their recurrent part in float64.
        self._weights: Mapping[str, Array] | None = None
        self._recurrent = np.empty((0, 0))

    def add(self, segment: SequenceSegment) -> None:
        """Propagate the directions of a sequence along its next segment, now or in `finish`."""
        if is_available():
            self._carry_compiled(segment)
            return
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

    def merge(self, later: GrowthSums) -> None:
        """Add the sums of other sequences."""
        self.logs += later.logs
        self.steps += later.steps

    def finish(self) -> None:
        """Process the pending segments."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            # Longest first, so that the active sequences are always the first ones.
            waiting.sort(key=len, reverse=True)
            self._carry(waiting, np.repeat(self._first[np.newaxis], len(waiting), axis=0))

    def _carry_compiled(self, segment: SequenceSegment) -> None:
        """Propagate the directions of one sequence along its next segment."""
        assert segment.weights is not None
        assert segment.previous is not None
        if segment.is_first:
            self._directions = self._first[np.newaxis]
            if self._adaptive:
                self._interval = 1
        if segment.weights is not self._weights:
            self._weights = segment.weights
            self._recurrent = np.asarray(segment.weights["weight_hh"], np.float64, order="C")
        with single_blas_thread():
            data = factors(segment.values, segment.previous, segment.weights)
        longest = MAX_INTERVAL if self._adaptive else 0
        for start, stop in pairwise(self._bounds([segment])):
            part = Factors(*(np.ascontiguousarray(factor[start:stop]) for factor in data))
            done = advance(
                *(self._recurrent, part, self._directions[0]),
                *(self._interval, longest, (SPREAD, MAX_SPREAD)),
            )
            if done is None:
                # A direction is lost, or a value is not finite: QR knows what to do.
                gates = np.stack(part[1:], axis=1)[:, np.newaxis]
                self._directions = self._advance(
                    [segment],
                    (part.keep[:, np.newaxis], gates),
                    *(np.ascontiguousarray(self._recurrent.T), self._directions, start),
                )
                continue
            directions, logs, self._interval = done
            self._directions = directions[np.newaxis]
            self._count([segment], start, stop - start, logs[np.newaxis])

    def _bounds(self, segments: Sequence[SequenceSegment]) -> list[int]:
        """Steps of segments, longest first, where there is a QR.

        That is where a sequence ends, where its counting begins, and between blocks.
        """
        lengths, sequences, starts = _table(segments)
        begins = np.clip(self._skipped[sequences] - starts, 0, lengths)
        firsts = -(-np.arange(len(self.steps)) * self._total // len(self.steps))
        between = (firsts - (self._starts[sequences] + starts)[:, np.newaxis]).ravel()
        bounds = np.unique(np.concatenate([[0], begins, lengths, between]))
        return [int(bound) for bound in bounds if 0 <= bound <= lengths[0]]

    def _carry(self, segments: Sequence[SequenceSegment], directions: Array) -> Array:
        """Propagate directions, (B, k, H), along segments with the same weights, longest first."""
        weights = segments[0].weights
        assert weights is not None
        recurrent = np.ascontiguousarray(np.asarray(weights["weight_hh"], np.float64).T)
        keeps, gates = _padded(segments, weights, recurrent.shape[0])
        for start, stop in pairwise(self._bounds(segments)):
            active = [segment for segment in segments if len(segment) > start]
            part = keeps[start:stop, : len(active)], gates[start:stop, : len(active)]
            directions = self._advance(active, part, recurrent, directions[: len(active)], start)
        return directions

    def _advance(
        self,
        segments: Sequence[SequenceSegment],
        step_factors: tuple[Array, Array],
        recurrent: Array,
        directions: Array,
        start: int,
    ) -> Array:
        """Propagate directions along the steps of these factors, (T, B, H) and (T, B, 3, H)."""
        step, steps = 0, len(step_factors[0])
        with (
            single_blas_thread(),
            np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"),
        ):
            while step < steps:
                length = min(self._interval, steps - step)
                part = [factor[step : step + length] for factor in step_factors]
                after = _multiply(recurrent, part, directions)
                orthonormal, upper = np.linalg.qr(after.transpose(0, 2, 1))
                logs = np.log(np.abs(np.diagonal(upper, axis1=1, axis2=2)))
                if self._adaptive and not self._adapt(logs, length):
                    continue
                directions = np.ascontiguousarray(orthonormal.transpose(0, 2, 1))
                self._count(segments, start + step, length, logs)
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

    def _count(
        self, segments: Sequence[SequenceSegment], step: int, length: int, logs: Array
    ) -> None:
        """Add the logs, (B, k), of `length` steps from this one on, which are in one block each."""
        _, sequences, starts = _table(segments)
        steps = starts + step
        counted = steps >= self._skipped[sequences]
        blocks = (self._starts[sequences] + steps)[counted] * len(self.steps) // self._total
        np.add.at(self.logs, blocks, logs[counted])
        np.add.at(self.steps, blocks, length)


def _table(segments: Sequence[SequenceSegment]) -> tuple[Integers, Integers, Integers]:
    """Lengths, sequences and first steps of segments: (B,) each."""
    rows = [(len(segment), segment.sequence, segment.start) for segment in segments]
    lengths, sequences, starts = np.array(rows).T
    return lengths, sequences, starts


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
