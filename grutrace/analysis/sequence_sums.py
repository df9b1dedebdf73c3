"""Mean, variance, and the standard error of a mean whose steps come in sequences.

Steps of a sequence resemble each other, so N of them say less than N. The error here takes whole
sequences as what was drawn: with s and T the sum and the number of steps of each of S sequences and
m the mean of all N steps,

    error^2 = S / (S - 1) * sum over sequences of (s - T m)^2 / N^2

(the linearised variance of a ratio; Cochran 1977, "Sampling techniques", 3rd edition, section 6.3).

H columns.
"""

from __future__ import annotations

import numpy as np

from grutrace.record import Array


class Sums:
    """What is kept of steps. Sums are of the distance from an origin, so that little is lost.

    Args:
        origin: (H,) some value of each column, near its others.

    Attributes:
        count: N.
        sequences: S, those with steps.
    """

    def __init__(self, origin: Array) -> None:
        self._origin = origin
        self.count = self.sequences = 0
        self._total, self._squares = np.zeros_like(origin), np.zeros_like(origin)
        # Of whole sequences: sums of s^2, of s T and of T^2; and s and T of the one at hand.
        self._sum_squares, self._sum_steps = np.zeros_like(origin), np.zeros_like(origin)
        self._steps_squares = 0.0
        self._own, self._steps = np.zeros_like(origin), 0

    def add(self, distance: Array, ends: bool) -> None:
        """Take in steps of one sequence, the next ones of it or the first of another.

        Args:
            distance: (n, H) values less the origin.
            ends: Whether they are the last of their sequence.
        """
        total = distance.sum(0)
        self.count += len(distance)
        self._total += total
        self._squares += np.einsum("nh,nh->h", distance, distance)
        self._own += total
        self._steps += len(distance)
        if ends:
            self.sequences += 1
            self._sum_squares += self._own**2
            self._sum_steps += self._own * self._steps
            self._steps_squares += float(self._steps) ** 2
            self._own, self._steps = np.zeros_like(self._own), 0

    def merge(self, later: Sums) -> None:
        """Take in those of later sequences."""
        self.count += later.count
        self.sequences += later.sequences
        self._total += later._total
        self._squares += later._squares
        self._sum_squares += later._sum_squares
        self._sum_steps += later._sum_steps
        self._steps_squares += later._steps_squares

    @property
    def shift(self) -> Array:
        """(H,) mean distance from the origin; not a number where there are no steps."""
        return np.asarray(self._total / (self.count or np.nan))

    @property
    def mean(self) -> Array:
        """(H,)"""
        return np.asarray(self._origin + self.shift)

    @property
    def variance(self) -> Array:
        """(H,) over all steps, with N."""
        of_squares = self._squares / (self.count or np.nan)
        return np.asarray(np.maximum(of_squares - self.shift**2, 0.0))

    @property
    def error(self) -> Array:
        """(H,) standard error of the mean; not a number of fewer than two sequences."""
        if self.sequences < 2:
            return np.full_like(self._origin, np.nan)
        apart = (
            self._sum_squares
            - 2 * self.shift * self._sum_steps
            + self.shift**2 * self._steps_squares
        )
        factor = self.sequences / (self.sequences - 1)
        return np.asarray(np.sqrt(np.maximum(apart, 0.0) * factor) / self.count)
