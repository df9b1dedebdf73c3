"""Labels as a small number of classes, and label permutations for a null distribution.

Labels cannot be shuffled step by step: neighbouring steps resemble each other, in their states and
in their labels, and so do steps at the same position of a sequence. The permutations here keep that
structure. Sequences swap their labels with other sequences of the same number of steps, which is
exact if sequences are independent. Where fewer than `MIN_EXCHANGEABLE` sequences have the same
number of steps, the labels of a sequence are rotated by a random number of steps. That is exact if
nothing depends on the position in the sequence, and nearly exact if the sequence is much longer
than its memory, because the last label meets the first. A label that is constant within every
sequence can go to any other sequence.

N rows, C classes, S sequences, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grutrace.errors import OptionError
from grutrace.records import Array
from grutrace.storage.read.annotations import LabelColumn
from grutrace.storage.read.sequence_index import Integers

#: Largest number of classes. More texts are merged by frequency, more numbers by size.
MAX_CLASSES = 20

#: Number of groups of about equal size for numbers.
NUMERIC_GROUPS = 8

#: Name of the class of the merged texts.
OTHERS_NAME = "(others)"


@dataclass(frozen=True, eq=False)
class LabelClasses:
    """The class of each row.

    Attributes:
        names: (C,) a number or a text for each class; for grouped numbers, their range.
        codes: (N,) class of each row; -1 for rows without a label.
    """

    names: tuple[str | float, ...]
    codes: Integers

    @property
    def counts(self) -> Integers:
        """(C,) number of rows of each class."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))


def encode_classes(labels: LabelColumn, max_classes: int = MAX_CLASSES) -> LabelClasses:
    """Encode the values of a label as classes.

    Each value is a class if there are at most `max_classes`. More numbers are grouped by size into
    `NUMERIC_GROUPS` groups of about equal size. Of more texts, or of a mixture, the most frequent
    keep their class, and all others share one.

    Raises:
        OptionError: The label has fewer than two values.
    """
    codes, values = labels.codes.astype(np.int64), labels.values
    if len(values) < 2:
        raise OptionError(
            f"label: expected one with at least two values; {labels.name!r} has "
            f"{', '.join(map(repr, values)) or 'none'}"
        )
    if len(values) <= max_classes:
        return LabelClasses(values, codes)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    if any(isinstance(value, str) for value in values):
        frequent = np.sort(np.argsort(-counts, kind="stable")[: max_classes - 1])
        names = (*(values[group] for group in frequent.tolist()), OTHERS_NAME)
        to = np.full(len(values), max_classes - 1)
        to[frequent] = np.arange(max_classes - 1)
    else:
        # By the middle rank of each value, so that equal values stay together.
        middle = np.cumsum(counts) - counts / 2
        to = np.minimum(
            (middle * NUMERIC_GROUPS / counts.sum()).astype(np.int64), NUMERIC_GROUPS - 1
        )
        used, to = np.unique(to, return_inverse=True)
        names = tuple(_range(np.array(values)[to == group]) for group in range(len(used)))
    return LabelClasses(names, _recode(codes, to))


def _recode(codes: Integers, to: Array) -> Integers:
    # Index -1 selects the appended entry.
    return np.append(to, -1)[codes].astype(np.int64)


def _range(values: Array) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"


#: Smallest number of sequences of one length that swap labels: 3.6 million permutations.
MIN_EXCHANGEABLE = 10


class LabelPermutations:
    """Permutations of the labels of a site's rows, for a null distribution. Reproducible by seed.

    Args:
        codes: (N,) the label of each row as a number; negative for rows without one, which keep
            none.
        sequences: (N,) the sequence of each row.
        steps: (N,) the step of each row within its sequence.
        total: S.
        count: P.
        seed: Seed of the permutations.

    Attributes:
        count: P.
        total: S.
        kind: ``swapped`` between sequences, ``rotated`` within them, or ``both``.
    """

    def __init__(
        self, codes: Array, sequences: Integers, steps: Integers, total: int, count: int, seed: int
    ) -> None:
        self.count, self.total, self._seed = count, total, seed
        labelled = np.flatnonzero(codes >= 0)
        order = labelled[np.lexsort((steps[labelled], sequences[labelled]))]
        # Only labelled steps, sequence after sequence.
        self._in_order = codes[order]
        self._own = np.bincount(sequences[order], minlength=total)
        self._begin = np.cumsum(self._own) - self._own
        self._sequences = sequences
        self._at = np.full(len(codes), -1, np.int64)
        self._at[order] = np.arange(len(order))
        changes = self._in_order[1:] != self._in_order[:-1]
        same_sequence = sequences[order][1:] == sequences[order][:-1]
        self._constant = not np.any(changes & same_sequence)
        with_labels = np.flatnonzero(self._own)
        lengths = np.zeros_like(with_labels) if self._constant else self._own[with_labels]
        _, group, size = np.unique(lengths, return_inverse=True, return_counts=True)
        exchangeable = (size >= MIN_EXCHANGEABLE)[group] | self._constant
        self._swapped, self._group = with_labels[exchangeable], group[exchangeable]
        rotated = bool(len(self._swapped) < len(with_labels))
        self.kind = "both" if rotated and len(self._swapped) else _KINDS[rotated]

    def labelled(self, rows: Integers) -> npt.NDArray[np.bool_]:
        """Return which of these rows have a label, in every permutation."""
        return np.asarray(self._at[rows] >= 0)

    def sources(self, numbers: range) -> npt.NDArray[np.int32]:
        """Return the sequence whose labels each sequence gets: (permutations, S).

        Args:
            numbers: Numbers of the permutations.
        """
        sources = np.tile(np.arange(self.total, dtype=np.int32), (len(numbers), 1))
        for own, number in zip(sources, numbers, strict=True):
            drawn = _hash_uniform(self._seed, number, self._swapped)
            # Both sides are sorted by group, the right one randomly within it.
            own[self._swapped[np.argsort(self._group, kind="stable")]] = self._swapped[
                np.lexsort((drawn, self._group))
            ]
        return sources

    def codes(self, rows: Integers, numbers: range, sources: npt.NDArray[np.int32]) -> Integers:
        """Return the permuted labels: (permutations, rows).

        Args:
            rows: Numbers of rows that have a label.
            numbers: Numbers of the permutations, from 0 to P - 1.
            sources: The result of `sources` for these numbers.
        """
        here, group = np.unique(self._sequences[rows], return_inverse=True)
        step = self._at[rows] - self._begin[here][group]
        rotated = ~np.isin(here, self._swapped)
        permuted = np.empty((len(numbers), len(rows)), np.int64)
        for own, number, source in zip(permuted, numbers, sources, strict=True):
            begin = self._begin[source[here]]
            if self._constant:
                own[:] = self._in_order[begin][group]
                continue
            moved = step
            if rotated.any():
                length = self._own[here]
                by = (_hash_uniform(self._seed, number, here) * length).astype(np.int64) * rotated
                moved = (step + by[group]) % length[group]
            own[:] = self._in_order[begin[group] + moved]
        return permuted


_KINDS = {True: "rotated", False: "swapped"}


def _hash_uniform(seed: int, number: int, of: Integers) -> Array:
    """Hash each number to a uniform value in [0, 1), independent of the order of calls.

    The mixing function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators").
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(np.uint64(seed % 2**64))
        mixed = _splitmix64(mixed + np.uint64(number))
        mixed = _splitmix64(mixed + of.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)


def _splitmix64(value: Array | np.uint64) -> Array:
    value = (value + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
