"""Two sites, one of each trace, and which of their rows and columns are of the same thing.

Sequences correspond by their number and steps by theirs, so calls may have been made of the same
sequences in other batches; units correspond by their number. N rows, S sequences, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice
from grutrace.storage.read.site import SiteTrace
from grutrace.storage.read.snapshot import TraceSnapshot

#: How much of each trace is brought into memory at once. Bytes.
BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Side:
    """A site as one of the traces has it, at one moment.

    Attributes:
        moment: Of the trace.
        number: Place of its module in the header.
        site: The site.
    """

    snapshot: TraceSnapshot
    number: int
    site: Site

    @property
    def module(self) -> ModuleInfo:
        """The module that the site is in."""
        return self.snapshot.header.modules[self.number]

    @property
    def index(self) -> SequenceIndex:
        """The pieces of the module, by sequence."""
        return self.snapshot.index(self.number)

    @property
    def trace(self) -> SiteTrace:
        """What was recorded there."""
        return SiteTrace(lambda: self.snapshot, self.number, self.site)

    def units(self) -> tuple[int, ...]:
        """Which units are recorded, in the order of the columns."""
        return self.site.units or tuple(range(self.module.hidden_size))


class Block(NamedTuple):
    """Values of both traces that correspond.

    Attributes:
        sequences: (n,) whose they are.
        steps: (n,) of which step; -1 of the states that sequences began from.
        a: (n, U) of the one trace.
        b: (n, U) of the other.
    """

    sequences: Integers
    steps: Integers
    a: Array
    b: Array


class Pair:
    """A site in both traces.

    Args:
        a: As the one trace has it.
        b: As the other has it.

    Attributes:
        common: (U,) numbers of the units that both have, rising.
        sequences: How many sequences both have, S.
    """

    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        units_a, units_b = np.array(a.units(), np.int64), np.array(b.units(), np.int64)
        self.common, *self._columns = np.intersect1d(units_a, units_b, return_indices=True)
        self.sequences = min(len(a.index), len(b.index))

    def rows(self, quantity: str) -> Iterator[Block]:
        """Yield all rows that correspond, some at a time, in the order of the one trace."""
        a, b = (side.snapshot.rows(side.number, side.site, quantity) for side in (self.a, self.b))
        lengths = self.b.index.lengths[: self.sequences]
        firsts = self.b.index.first_positions
        index = self.a.index
        for start, stop in _blocks(a, b):
            rows = np.arange(start, stop)
            pieces = index.pieces_of(rows)
            sequences = index.sequences[pieces]
            steps = index.steps_before[pieces] + rows - index.starts[pieces]
            there = sequences < self.sequences
            there[there] = steps[there] < lengths[sequences[there]]
            rows, sequences, steps = rows[there], sequences[there], steps[there]
            of_b = self.b.index.sequential_rows(firsts[sequences] + steps)
            yield self._block(quantity, sequences, steps, a[as_slice(rows)], b[as_slice(of_b)])

    def initial(self) -> Iterator[Block]:
        """Yield the states that the sequences of both began from, some at a time."""
        a, b = self.a.trace.initial, self.b.trace.initial
        for start, stop in _blocks(a, b, self.sequences):
            sequences, part = np.arange(start, stop), slice(start, stop)
            steps = np.full(stop - start, -1)
            yield self._block("initial", sequences, steps, a[part], b[part])

    def _block(
        self, quantity: str, sequences: Integers, steps: Integers, a: Array, b: Array
    ) -> Block:
        if quantity != "input" and self.a.units() != self.b.units():
            a, b = a[:, self._columns[0]], b[:, self._columns[1]]
        return Block(sequences, steps, np.asarray(a), np.asarray(b))


def _blocks(a: Rows, b: Rows, count: int | None = None) -> Iterator[tuple[int, int]]:
    count = len(a) if count is None else count
    width = max(rows.shape[1] * rows.dtype.itemsize for rows in (a, b))
    each = max(1, BLOCK_BYTES // max(1, width))
    for start in range(0, count, each):
        yield start, min(start + each, count)
