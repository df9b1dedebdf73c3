"""Labels given to other steps, so that what is found then is chance.

A label may not be moved from step to step as one likes: neighbouring steps resemble each other, in
the states and in the label. What is moved here keeps that. Where a label changes within sequences,
the labels of each sequence are rotated within it, by a number of steps drawn for it: right if what
the sequence does does not depend on where in it one is. Where a label is the same all along every
sequence, sequences get those of others: right if the sequences are independent of one another.

N rows, S sequences, P arrangements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from grutrace.record import Array
from grutrace.storage.index import Integers


class Arrangements:
    """Other arrangements of the labels of a site's rows. Asked twice, they are the same.

    Args:
        codes: (N,) the label of each row as a number; negative for rows without, which keep none.
        sequences: (N,) the sequence of each row.
        places: (N,) which of its steps it is.
        total: S.
        count: P.
        seed: Other arrangements for another one.

    Attributes:
        count: P.
        kind: ``rotated`` or ``swapped``.
    """

    def __init__(
        self, codes: Array, sequences: Integers, places: Integers, total: int, count: int, seed: int
    ) -> None:
        self.count, self._seed = count, seed
        some = np.flatnonzero(codes >= 0)
        order = some[np.lexsort((places[some], sequences[some]))]
        # Of the steps with a label, sequence after sequence.
        self._in_order = codes[order]
        self._own = np.bincount(sequences[order], minlength=total)
        self._begin = np.cumsum(self._own) - self._own
        self._sequences = sequences
        self._at = np.full(len(codes), -1, np.int64)
        self._at[order] = np.arange(len(order))
        changes = self._in_order[1:] != self._in_order[:-1]
        within = sequences[order][1:] == sequences[order][:-1]
        self.kind = "rotated" if np.any(changes & within) else "swapped"

    def labelled(self, rows: Integers) -> npt.NDArray[np.bool_]:
        """Which of these rows have a label; they do in every arrangement."""
        return np.asarray(self._at[rows] >= 0)

    def codes(self, rows: Integers, numbers: range) -> Integers:
        """(arrangements, rows) the label of each in arrangements of these numbers.

        Args:
            rows: Of rows that have a label.
            numbers: Of the arrangements, from 0 to P - 1.
        """
        sequences, at = self._sequences[rows], self._at[rows]
        found = np.empty((len(numbers), len(rows)), np.int64)
        here, place = np.unique(sequences, return_inverse=True)
        for own, number in zip(found, numbers, strict=True):
            if self.kind == "swapped":
                own[:] = self._swapped(number)[here][place]
            else:
                length, begin = self._own[here], self._begin[here]
                by = (_drawn(self._seed, number, here) * length).astype(np.int64)
                own[:] = self._in_order[
                    begin[place] + (at - begin[place] + by[place]) % length[place]
                ]
        return found

    def _swapped(self, number: int) -> Array:
        """(S,) the label that each sequence gets, where it has steps with a label."""
        having = np.flatnonzero(self._own)
        labels = self._in_order[self._begin[having]]
        drawn = np.argsort(_drawn(self._seed, number, having), kind="stable")
        found = np.zeros(len(self._own), self._in_order.dtype)
        found[having] = labels[drawn]
        return found


def _drawn(seed: int, number: int, of: Integers) -> Array:
    """Evenly in [0, 1), a value for each of these; the same whoever asks, in whatever order.

    The mixing function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators").
    """
    with np.errstate(over="ignore"):
        mixed = _mixed(np.uint64(seed % 2**64))
        mixed = _mixed(mixed + np.uint64(number))
        mixed = _mixed(mixed + of.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)


def _mixed(value: Array | np.uint64) -> Array:
    value = (value + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
