"""Alignment of a site in two traces: which rows and columns correspond.

Sequences correspond by number, steps by number, and units by number. The batches of the calls may
differ. N rows, S sequences, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import block_slices
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot

#: Size of a block of each trace in memory, in bytes.
BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Side:
    """A site in one of the traces, at one moment.

    Attributes:
        snapshot: Snapshot of the trace.
        number: Index of the module in the header.
        site: The site.
    """

    snapshot: TraceSnapshot
    number: int
    site: Site

    @property
    def module(self) -> ModuleInfo:
        """The module of the site."""
        return self.snapshot.header.modules[self.number]

    @property
    def index(self) -> SequenceIndex:
        """The index of the module's sequences."""
        return self.snapshot.index(self.number)

    @property
    def trace(self) -> SiteTrace:
        """The recorded data of the site."""
        return SiteTrace(lambda: self.snapshot, self.number, self.site)

    def units(self) -> tuple[int, ...]:
        """Return the numbers of the recorded units, in the order of the columns."""
        return self.site.units or tuple(range(self.module.hidden_size))


class Block(NamedTuple):
    """Corresponding values of both traces.

    Attributes:
        sequences: (n,) number of the sequence.
        steps: (n,) step of the sequence; -1 for initial states.
        a: (n, U) values of the first trace.
        b: (n, U) values of the second trace.
    """

    sequences: Integers
    steps: Integers
    a: Array
    b: Array


class Pair:
    """A site in both traces.

    Args:
        a: The site in the first trace.
        b: The site in the second trace.

    Attributes:
        common: (U,) numbers of the units in both, increasing.
        sequences: S, number of sequences in both.
    """

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        units_a, units_b = np.array(a.units(), np.int64), np.array(b.units(), np.int64)
        self.common, *self._columns = np.intersect1d(units_a, units_b, return_indices=True)
        self.sequences = min(len(a.index), len(b.index))

    def rows(self, quantity: str) -> Iterator[Block]:
        """Yield all corresponding rows in blocks, in the order of the first trace."""
        a, b = (side.snapshot.rows(side.number, side.site, quantity) for side in (self.a, self.b))
        lengths = self.b.index.lengths[: self.sequences]
        firsts = self.b.index.first_positions
        index = self.a.index
        for part in _blocks(a, b, len(a)):
            rows = np.arange(part.start, part.stop)
            pieces = index.pieces_of(rows)
            sequences = index.sequences[pieces]
            steps = index.steps_before[pieces] + rows - index.starts[pieces]
            common = sequences < self.sequences
            common[common] = steps[common] < lengths[sequences[common]]
            rows, sequences, steps = rows[common], sequences[common], steps[common]
            of_b = self.b.index.sequential_rows(firsts[sequences] + steps)
            yield self._block(quantity, sequences, steps, a[as_slice(rows)], b[as_slice(of_b)])

    def initial(self) -> Iterator[Block]:
        """Yield the corresponding initial states in blocks."""
        a, b = self.a.trace.initial, self.b.trace.initial
        for part in _blocks(a, b, self.sequences):
            sequences = np.arange(part.start, part.stop)
            steps = np.full(len(sequences), -1)
            yield self._block("initial", sequences, steps, a[part], b[part])

    def _block(
        self, quantity: str, sequences: Integers, steps: Integers, a: Array, b: Array
    ) -> Block:
        if quantity != "input" and self.a.units() != self.b.units():
            a, b = a[:, self._columns[0]], b[:, self._columns[1]]
        return Block(sequences, steps, np.asarray(a), np.asarray(b))


def _blocks(a: Rows, b: Rows, count: int) -> Iterator[slice]:
    row_bytes = max(rows.shape[1] * rows.dtype.itemsize for rows in (a, b))
    return block_slices(count, BLOCK_BYTES, row_bytes)
