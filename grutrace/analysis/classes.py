"""A label as classes: few enough to count, whatever it was.

N rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grutrace.errors import OptionError
from grutrace.record import Array
from grutrace.storage.index import Integers
from grutrace.storage.labels import RowLabels

#: More values than these are put together: texts by how frequent they are, numbers by size.
MOST = 20

#: Into how many groups of about equal size numbers are put.
GROUPS = 8

#: What the texts are called that are put together.
OTHERS = "(others)"


@dataclass(frozen=True, eq=False)
class Classes:
    """The class of each row.

    Attributes:
        names: (C,) of each class: a number, a text, or for numbers that were grouped the range.
        codes: (N,) the class of each row; -1 for rows without.
    """

    names: tuple[str | float, ...]
    codes: Integers

    @property
    def counts(self) -> Integers:
        """(C,) how many rows each has."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))


def classes_of(labels: RowLabels, most: int = MOST) -> Classes:
    """Put the values of a label into classes.

    Each value is a class. If there are more than `most` of them: numbers are grouped by size into
    `GROUPS` of about as many rows each; of texts, and of a mixture, the most frequent stay, and the
    others are one class.

    Raises:
        OptionError: No two rows differ in it.
    """
    codes, values = labels.codes.astype(np.int64), labels.values
    if len(values) < 2:
        raise OptionError(
            f"label: expected one with at least two values; {labels.name!r} has "
            f"{', '.join(map(repr, values)) or 'none'}"
        )
    if len(values) <= most:
        return Classes(values, codes)
    counts = np.bincount(codes[codes >= 0], minlength=len(values))
    if any(isinstance(value, str) for value in values):
        kept = np.sort(np.argsort(-counts, kind="stable")[: most - 1])
        names = (*(values[place] for place in kept.tolist()), OTHERS)
        to = np.full(len(values), most - 1)
        to[kept] = np.arange(most - 1)
    else:
        # By the place of the middle of each value among all rows: equal values stay together.
        middle = np.cumsum(counts) - counts / 2
        to = np.minimum((middle * GROUPS / counts.sum()).astype(np.int64), GROUPS - 1)
        used, to = np.unique(to, return_inverse=True)
        names = tuple(_range(np.array(values)[to == group]) for group in range(len(used)))
    return Classes(names, _mapped(codes, to))


def _mapped(codes: Integers, to: Array) -> Integers:
    # The last one is what -1 picks.
    return np.append(to, -1)[codes].astype(np.int64)


def _range(values: Array) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"
