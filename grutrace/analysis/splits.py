"""Sequences for training and sequences for testing. N rows, S sequences, n rows that are used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from grutrace.analysis.beside import Beside
from grutrace.analysis.fold import fold_rows
from grutrace.analysis.material import Material
from grutrace.errors import OptionError
from grutrace.record import Array
from grutrace.storage.index import Integers
from grutrace.storage.labels import RowLabels


def split(
    of: Material,
    sequences: Integers,
    labels: RowLabels,
    test: float,
    steps: int,
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows to train on, and which to test on.

    Args:
        of: The site.
        sequences: (N,) the sequence of each row.
        labels: Rows without a label are not used.
        test: Share of the labelled rows that are for testing, about; at least one sequence.
        steps: At most so many are used for either.
        random: What to draw by.

    Returns:
        (N,) which rows are used, and (N,) which are of sequences for testing.

    Raises:
        OptionError: The label lies in fewer than two sequences that do not go back to one.
    """
    families = _families(of.parents).astype(sequences.dtype)[sequences]
    labelled = labels.codes >= 0
    counts = np.bincount(families, labelled, len(of.lengths)).astype(np.int64)
    having = random.permutation(np.flatnonzero(counts))
    if len(having) < 2:
        raise OptionError(
            f"label: expected {labels.name!r} in at least two sequences, one to train on and one "
            f"to test on; found it in {len(having)}"
        )
    ends = np.cumsum(counts[having])
    # At least one sequence for either.
    some = int(np.clip(1 + np.searchsorted(ends, test * ends[-1]), 1, len(having) - 1))
    for_test = np.isin(families, having[:some])
    used = np.zeros(len(labelled), bool)
    for rows in (np.flatnonzero(labelled & for_test), np.flatnonzero(labelled & ~for_test)):
        used[rows if len(rows) <= steps else random.choice(rows, steps, replace=False)] = True
    return used, for_test


def _families(parents: Integers) -> Integers:
    """(S,) of each sequence the one that it goes back to, over all that began from a middle."""
    roots = np.where(parents >= 0, parents, np.arange(len(parents)))
    while np.any((further := roots[roots]) != roots):
        roots = further
    return roots


def gathered(of: Material, quantity: str, used: npt.NDArray[np.bool_]) -> tuple[Array, Integers]:
    """The rows that are used and finite, (n, H), and their numbers, (n,)."""
    found = fold_rows(Beside(of, {"used": used[:, np.newaxis]}), (quantity, "used"), _Kept)
    kept = of.rows(quantity)
    states = np.concatenate([np.empty((0, kept.shape[1]), kept.dtype), *found.states])
    rows = np.flatnonzero(used)
    finite = np.isfinite(states).all(1)
    return (states, rows) if finite.all() else (states[finite], rows[finite])


class _Kept:
    """The rows that are used."""

    def __init__(self) -> None:
        self.states: list[Array] = []

    def add(self, rows: Mapping[str, Array]) -> None:
        (values,) = (block for name, block in rows.items() if name != "used")
        self.states.append(values[rows["used"][:, 0]])

    def merge(self, later: _Kept) -> None:
        self.states += later.states
