"""One site of a trace: its rows, and its sequences."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.records import Array, ModuleInfo, Site
from grutrace.reprs import wrapped
from grutrace.storage.format.tables import ModuleCounts
from grutrace.storage.read.lazy_rows import LazyRows, as_rows
from grutrace.storage.read.recomputed import SiteGateInputs
from grutrace.storage.read.row_labels import LabelColumn, annotation_names, row_labels
from grutrace.storage.read.sequence import QuantityAccess, Sequence
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, ranges
from grutrace.storage.read.snapshot import Restarts, TraceSnapshot

#: Rows that are brought into memory at once on their way into a padded array. Bytes.
BLOCK = 16 * 1024 * 1024


class SiteTrace(QuantityAccess[LazyRows]):
    """What was recorded at one site. It goes along when its trace is refreshed.

    Its quantities are the rows of all sequences, (N, H) or (N, I), in the order in which they were
    recorded. In memory and from a file they are the same kind of object: it takes the indexes, the
    operators and the methods of a NumPy array, and gives arrays that may be written to.

    Attributes:
        site: Which site it is.
        module: The module that the site is in.
    """

    def __init__(self, get_snapshot: Callable[[], TraceSnapshot], number: int, site: Site) -> None:
        self._get_snapshot = get_snapshot
        self._module_index = number
        self.site = site
        self.module: ModuleInfo = get_snapshot().header.modules[number]

    @property
    def name(self) -> str:
        """Full name of the site."""
        return self.site.name

    @property
    def units(self) -> tuple[int, ...] | None:
        """The units that were recorded, in the order of the columns; None for all of them.

        Where there are some, read U, their number, for H in the shapes of all but the weights.
        """
        return self.site.units

    def __len__(self) -> int:
        """Number of sequences."""
        return self._get_snapshot().extent(self._module_index).sequences

    def __repr__(self) -> str:
        rows = self._get_snapshot().extent(self._module_index).rows
        recorded = ", ".join(self.site.available_quantities)
        return wrapped(f"<site {self.name}: {len(self)} sequences, {rows} steps of {recorded}>")

    def __iter__(self) -> Iterator[Sequence]:
        snapshot = self._get_snapshot()
        count = snapshot.extent(self._module_index).sequences
        return (
            Sequence(snapshot, self._module_index, self.site, number) for number in range(count)
        )

    @property
    def extent(self) -> ModuleCounts:
        """How many calls, rows, sequences and versions of the weights its module has."""
        return self._get_snapshot().extent(self._module_index)

    def __getitem__(self, key: int | slice | str) -> Any:
        """A sequence by its number, a list of them by a slice, or the rows of a quantity by name.

        Raises:
            NotRecordedError: There is none of this number, or the quantity was not recorded.
        """
        if isinstance(key, str):
            return self.rows(key)
        if isinstance(key, slice):
            return [self.sequence(number) for number in range(len(self))[key]]
        return self.sequence(key)

    def rows(self, quantity: str) -> LazyRows:
        """The rows of all sequences, (N, H), or (N, I) for the input.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        return as_rows(self._get_snapshot().rows(self._module_index, self.site, quantity))

    def sequence(self, number: int) -> Sequence:
        """One sequence, by its number; negative numbers count from the last.

        Raises:
            NotRecordedError: There is none of this number.
        """
        snapshot = self._get_snapshot()
        count = snapshot.extent(self._module_index).sequences
        try:
            number = range(count)[operator.index(number)]
        except IndexError:
            raise NotRecordedError(
                f"there is no sequence {number} at {self.name!r}, which has {count}"
            ) from None
        return Sequence(snapshot, self._module_index, self.site, number)

    def rows_between(self, first: int, last: int) -> slice | Integers:
        """Where the steps of the sequences from `first` up to before `last` lie among all rows.

        They come sequence by sequence, each in time order.
        """
        return self._index.rows_between(first, last)

    @property
    def number(self) -> int:
        """Place of its module in the header."""
        return self._module_index

    @property
    def snapshot(self) -> TraceSnapshot:
        """What there is now, which does not change."""
        return self._get_snapshot()

    def frozen(self) -> SiteTrace:
        """This site as it is now, which does not go along when its trace is refreshed."""
        return SiteTrace(partial(_same, self._get_snapshot()), self._module_index, self.site)

    def padded(self, quantity: str) -> tuple[Array, Integers]:
        """All sequences, with zeros after the end of each.

        Returns:
            (sequences, longest, H), or I for the input; and the (sequences,) lengths.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        snapshot = self._get_snapshot()
        index, rows = (
            snapshot.index(self._module_index),
            snapshot.rows(self._module_index, self.site, quantity),
        )
        lengths = index.lengths
        longest = int(lengths.max(initial=0))
        padded = np.zeros((len(index), longest, rows.shape[1]), rows.dtype)
        sequences = np.repeat(index.sequences, index.steps)
        steps = ranges(index.steps_before, index.steps)
        block = max(1, BLOCK // max(1, rows.shape[1] * rows.dtype.itemsize))
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            padded[sequences[part], steps[part]] = rows[part]
        return padded, lengths

    def previous(self, start: int = 0, stop: int | None = None) -> Array:
        """The states that rows ``start`` to ``stop`` started from, (stop - start, H).

        Raises:
            NotRecordedError: The hidden states were not recorded.
        """
        rows = np.arange(*slice(start, stop).indices(self.extent.rows))
        return self.gate_inputs.previous(rows)

    def preactivation(self, gate: str) -> LazyRows:
        """What the sigmoid or tanh of a gate was applied to, (N, H), derived when it is indexed.

        It is there whenever the hidden states are, and the input: recorded, or, above the first
        layer where nothing was dropped out, as the states of the layer below.

        Args:
            gate: reset, update or candidate.

        Raises:
            OptionError: There is no such gate.
            NotRecordedError: Something that it follows from was not recorded.
        """
        return as_rows(self._get_snapshot().preactivation(self._module_index, self.site, gate))

    @property
    def gate_inputs(self) -> SiteGateInputs:
        """What the gates follow from, as of now."""
        return self._get_snapshot().gate_inputs(self._module_index, self.site)

    def row_versions(self, rows: slice | Integers) -> Integers:
        """The version of the weights that made each of these rows."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.extent.rows))
        snapshot = self._get_snapshot()
        calls = self._index.calls[self._index.pieces_of(rows)]
        return snapshot.tables.calls["weights"][calls].astype(np.int64)

    def row_calls(self, start: int = 0, stop: int | None = None) -> Integers:
        """The calls, as rows of `Trace.calls`, that made rows ``start`` to ``stop``."""
        rows = np.arange(
            *slice(start, stop).indices(self._get_snapshot().extent(self._module_index).rows)
        )
        return self._index.calls[self._index.pieces_of(rows)]

    def row_checks(self, start: int = 0, stop: int | None = None) -> Array:
        """The `checks` of the calls that made rows ``start`` to ``stop``."""
        positions = np.searchsorted(self._index.call_numbers, self.row_calls(start, stop))
        return np.asarray(self.checks[positions])

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels that some of its rows have; ``tokens`` among them."""
        return annotation_names(self._get_snapshot().tables, self._module_index)

    def row_labels(self, name: str) -> LabelColumn:
        """The label of every row, or its token, ``tokens``; rows as in `rows`.

        Raises:
            NotRecordedError: No row has one of this name; the message says which there are.
        """
        snapshot = self._get_snapshot()
        return row_labels(
            snapshot.tables, self._module_index, snapshot.index(self._module_index), name
        )

    def locate(self, row: int) -> tuple[int, int]:
        """The sequence that a row belongs to, and which of its steps it is."""
        index = self._index
        piece = int(index.pieces_of(np.array([row]))[0])
        step = index.steps_before[piece] + row - index.starts[piece]
        return int(index.sequences[piece]), int(step)

    @property
    def _index(self) -> SequenceIndex:
        return self._get_snapshot().index(self._module_index)

    @property
    def lengths(self) -> Integers:
        """(sequences,) the steps of each sequence so far."""
        return np.array(self._index.lengths)

    @property
    def parents(self) -> Integers:
        """(sequences,) the sequence from whose middle each began; -1 where it did not."""
        return np.array(self._index.parents[0])

    @property
    def initial(self) -> LazyRows:
        """(sequences, H) the state that each sequence began from. Read as the quantities are."""
        return as_rows(self._get_snapshot().initial(self._module_index, self.site))

    def restarts(self, first: int, last: int) -> Restarts:
        """Where sequences `first` to `last` - 1 go on from another state than they ended with."""
        return self._get_snapshot().restarts(self._module_index, self.site, first, last)

    @property
    def checks(self) -> Array:
        """(calls of the module,) with the fields residual, tolerance and precision.

        Precision is the spacing at 1 of the coarsest type in which the kernel computed. Residual
        and tolerance are not a number where the gates are not stored: `grutrace verify` finds them.
        """
        snapshot = self._get_snapshot()
        count = snapshot.extent(self._module_index).calls
        return np.array(snapshot.source.checks(self._module_index, self.site.suffix, count))

    @property
    def residual(self) -> float:
        """The largest ``|replayed h - kernel's h|`` so far; 0.0 before the first call.

        Not a number where gates are derived when read: nothing has been replayed.
        """
        return float(self.checks["residual"].max(initial=0.0))

    def weights(self, version: int = -1) -> dict[str, Array]:
        """One version of the weights, the last unless asked otherwise, by name.

        Raises:
            NotRecordedError: There is no such version.
        """
        count = self._get_snapshot().extent(self._module_index).versions
        if not -count <= version < count:
            raise NotRecordedError(
                f"there is no version {version} of the weights of {self.name!r}, which has {count}"
            )
        found = self._get_snapshot().source.weights(
            self._module_index, self.site.suffix, version % count
        )
        return {name: np.array(array) for name, array in found.items()}


def _same(snapshot: TraceSnapshot) -> TraceSnapshot:
    return snapshot
