"""`SiteTrace`, one site of a trace: its rows and its sequences."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from grutrace.accessors import Accessor
from grutrace.errors import NotRecordedError
from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.format.tables import ModuleCounts
from grutrace.storage.read.annotations import LabelColumn, annotation_names, row_labels
from grutrace.storage.read.display.html_reprs import site_html
from grutrace.storage.read.display.text_reprs import site_repr
from grutrace.storage.read.lazy_rows import LazyRows, as_rows, block_slices, item_bytes
from grutrace.storage.read.recomputed import SiteGateInputs
from grutrace.storage.read.sequence import QuantityAccess, Sequence
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, ranges
from grutrace.storage.read.snapshot import Restarts, TraceSnapshot

#: Bytes of rows that `SiteTrace.padded` reads at once.
BLOCK = 16 * 1024 * 1024


class SiteTrace(QuantityAccess[LazyRows]):
    """The recorded data of one site. It follows its trace when the trace is refreshed.

    Its quantities are the rows of all sequences, (N, H) or (N, I), in the order of recording. Each
    is a `LazyRows` array, in memory and in a file alike: it supports the indexing, operators and
    methods of NumPy arrays, and returns writable NumPy arrays.

    Attributes:
        site: Name, layer, direction and quantities of the site.
        module: The module that the site belongs to.
        plot: Pictures of the site, see `grutrace.view.site_plots.SitePlots`.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> gru = torch.nn.GRU(input_size=2, hidden_size=3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))  # 5 steps, 4 sequences
        >>> site = trace["l0"]
        >>> site
        <site l0: 4 sequences, 20 steps of reset, update, candidate, hidden>
        >>> site.update.shape, site.update[:10].shape
        ((20, 3), (10, 3))
        >>> len(site), site.lengths
        (4, array([5, 5, 5, 5]))
        >>> padded, lengths = site.padded("hidden")
        >>> padded.shape
        (4, 5, 3)
        >>> list(site.weights())
        ['weight_ih', 'weight_hh', 'bias_ih', 'bias_hh']
    """

    plot = Accessor()

    def __init__(
        self, get_snapshot: Callable[[], TraceSnapshot], module_index: int, site: Site
    ) -> None:
        self._get_snapshot = get_snapshot
        self._module_index = module_index
        self.site = site
        self.module: ModuleInfo = get_snapshot().header.modules[module_index]

    @property
    def name(self) -> str:
        """Full name of the site."""
        return self.site.name

    @property
    def units(self) -> tuple[int, ...] | None:
        """The recorded units, in the order of the columns. None for all units.

        With U selected units, all shapes except those of the weights have U in place of H.
        """
        return self.site.units

    def __len__(self) -> int:
        """Number of sequences."""
        return self.snapshot.extent(self._module_index).sequences

    def __repr__(self) -> str:
        return site_repr(self.snapshot, self._module_index, self.site)

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        return site_html(self.snapshot, self._module_index, self.site, self.residual)

    def __iter__(self) -> Iterator[Sequence]:
        snapshot = self.snapshot
        count = snapshot.extent(self._module_index).sequences
        return (
            Sequence(snapshot, self._module_index, self.site, number) for number in range(count)
        )

    @property
    def extent(self) -> ModuleCounts:
        """Number of calls, rows, sequences and weight versions of the module."""
        return self.snapshot.extent(self._module_index)

    def __getitem__(self, key: int | slice | str) -> Any:
        """Return a sequence by number, a list of sequences by slice, or the rows of a quantity.

        Raises:
            NotRecordedError: There is no sequence of this number, or the quantity was not
                recorded.
        """
        if isinstance(key, str):
            return self.rows(key)
        if isinstance(key, slice):
            return [self.sequence(number) for number in range(len(self))[key]]
        return self.sequence(key)

    def rows(self, quantity: str) -> LazyRows:
        """Return the rows of all sequences, (N, H), or (N, I) for the input.

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        return as_rows(self.snapshot.rows(self._module_index, self.site, quantity))

    def sequence(self, number: int) -> Sequence:
        """Return one sequence by its number. Negative numbers count from the last sequence.

        Raises:
            NotRecordedError: There is no sequence of this number.
        """
        snapshot = self.snapshot
        count = snapshot.extent(self._module_index).sequences
        try:
            number = range(count)[operator.index(number)]
        except IndexError:
            raise NotRecordedError(
                f"there is no sequence {number} at {self.name!r}, which has {count}"
            ) from None
        return Sequence(snapshot, self._module_index, self.site, number)

    def rows_between(self, first: int, last: int) -> slice | Integers:
        """Return the rows of sequences `first` to `last` - 1, as a slice or as row numbers.

        They are in the order of the sequences, each in time order.
        """
        return self._index.rows_between(first, last)

    @property
    def module_index(self) -> int:
        """Index of the module in `TraceHeader.modules`."""
        return self._module_index

    @property
    def snapshot(self) -> TraceSnapshot:
        """An immutable snapshot of the trace, as of now."""
        return self._get_snapshot()

    def frozen(self) -> SiteTrace:
        """Return this site with its present content. It does not follow later refreshes."""
        return SiteTrace(partial(_return, self.snapshot), self._module_index, self.site)

    def padded(self, quantity: str) -> tuple[Array, Integers]:
        """Return all sequences of a quantity, padded with zeros.

        Returns:
            An array (sequences, longest, H), with I in place of H for the input; and the lengths,
            (sequences,).

        Raises:
            NotRecordedError: The quantity was not recorded.
        """
        snapshot = self.snapshot
        index = snapshot.index(self._module_index)
        rows = snapshot.rows(self._module_index, self.site, quantity)
        lengths = index.lengths
        longest = int(lengths.max(initial=0))
        padded = np.zeros((len(index), longest, rows.shape[1]), rows.dtype)
        sequences = np.repeat(index.sequences, index.steps)
        steps = ranges(index.steps_before, index.steps)
        for block in block_slices(len(rows), BLOCK, item_bytes(rows)):
            padded[sequences[block], steps[block]] = rows[block]
        return padded, lengths

    def previous(self, start: int = 0, stop: int | None = None) -> Array:
        """Return the previous states of rows ``start`` to ``stop``, (stop - start, H).

        Raises:
            NotRecordedError: The hidden states were not recorded.
        """
        rows = np.arange(*slice(start, stop).indices(self.extent.rows))
        return self.gate_inputs.previous(rows)

    def preactivation(self, gate: str) -> LazyRows:
        """Return the pre-activation of a gate, the argument of its sigmoid or tanh, (N, H).

        Indexing recomputes it from the hidden states, the input and the weights. Above the first
        layer, the hidden states of the layer below replace an input that was not recorded, unless
        dropout was applied between the layers.

        Args:
            gate: reset, update or candidate.

        Raises:
            OptionError: The gate is unknown.
            NotRecordedError: The hidden states or the input were not recorded.

        Examples:
            >>> import numpy as np
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, record=("update", "hidden", "input")) as trace:
            ...     output, state = gru(torch.randn(5, 4, 2))
            >>> site = trace["l0"]
            >>> recomputed = 1 / (1 + np.exp(-site.preactivation("update")))
            >>> np.allclose(recomputed, site.update, atol=1e-6)
            True
        """
        return as_rows(self.snapshot.preactivation(self._module_index, self.site, gate))

    def gradient(self, quantity: str, *, preactivation: bool = False) -> LazyRows:
        """Return the gradient of the loss with respect to a quantity, (N, H), or (N, I).

        Needs ``record="gradient"``. Indexing computes the gradients, call by call, from those that
        arrived at the states in the backward pass. The gradient of ``hidden`` is the total one,
        through the output of its step and through all later steps of the call; that of a gate goes
        through the state of its step. (``site["gradient"]`` is what arrived.) Rows of calls that no
        backward pass reached are NaN.

        Args:
            quantity: reset, update, candidate, hidden or input.
            preactivation: Return the gradient of the gate's pre-activation instead.

        Raises:
            OptionError: The quantity is unknown.
            NotRecordedError: The gradient was not recorded.

        Examples:
            >>> import torch
            >>> import grutrace
            >>> gru = torch.nn.GRU(2, 3)
            >>> with grutrace.trace(gru, record=("update", "gradient")) as trace:
            ...     output, state = gru(torch.randn(5, 4, 2))
            ...     state.square().sum().backward()
            >>> trace["l0"].gradient("update").shape
            (20, 3)
            >>> first = trace["l0"].sequence(0).gradient("hidden")
            >>> bool((abs(first[-1] - 2 * state[0, 0].detach().numpy()) < 1e-6).all())
            True
        """
        rows = self.snapshot.gradient(
            self._module_index, self.site, quantity, preactivation=preactivation
        )
        return as_rows(rows)

    @property
    def gate_inputs(self) -> SiteGateInputs:
        """Inputs, previous states and weights, from which gates are recomputed."""
        return self.snapshot.gate_inputs(self._module_index, self.site)

    def row_versions(self, rows: slice | Integers) -> Integers:
        """Return the weight version of each of these rows."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.extent.rows))
        snapshot = self.snapshot
        calls = self._index.calls[self._index.pieces_of(rows)]
        return snapshot.tables.calls["weights"][calls].astype(np.int64)

    def row_calls(self, start: int = 0, stop: int | None = None) -> Integers:
        """Return the call of each row from ``start`` to ``stop``, as a row of `Trace.calls`."""
        rows = np.arange(*slice(start, stop).indices(self.snapshot.extent(self._module_index).rows))
        return self._index.calls[self._index.pieces_of(rows)]

    def row_checks(self, start: int = 0, stop: int | None = None) -> Array:
        """Return the `checks` of the call of each row from ``start`` to ``stop``."""
        positions = np.searchsorted(self._index.call_numbers, self.row_calls(start, stop))
        return np.asarray(self.checks[positions])

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the values that were logged beside the gates; ``site["loss"]`` has the rows."""
        return self.snapshot.logged(self._module_index)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the recorded labels, including ``tokens``."""
        return annotation_names(self.snapshot.tables, self._module_index)

    def row_labels(self, name: str) -> LabelColumn:
        """Return the label of each row, in the order of `rows`.

        Args:
            name: Name of the label, or ``tokens``.

        Raises:
            NotRecordedError: There is no label of this name. The message lists the labels.
        """
        snapshot = self.snapshot
        return row_labels(
            snapshot.tables, self._module_index, snapshot.index(self._module_index), name
        )

    def locate(self, row: int) -> tuple[int, int]:
        """Return the sequence of a row, and the step within that sequence."""
        index = self._index
        piece = int(index.pieces_of(np.array([row]))[0])
        step = index.steps_before[piece] + row - index.starts[piece]
        return int(index.sequences[piece]), int(step)

    @property
    def _index(self) -> SequenceIndex:
        return self.snapshot.index(self._module_index)

    @property
    def lengths(self) -> Integers:
        """(sequences,) number of steps of each sequence."""
        return np.array(self._index.lengths)

    @property
    def parents(self) -> Integers:
        """(sequences,) the sequence that each was forked from; -1 for none."""
        return np.array(self._index.parents[0])

    @property
    def initial(self) -> LazyRows:
        """(sequences, H) initial state of each sequence, as a `LazyRows` array."""
        return as_rows(self.snapshot.initial(self._module_index, self.site))

    def restarts(self, first: int, last: int) -> Restarts:
        """Return where sequences `first` to `last` - 1 continue from a changed state."""
        return self.snapshot.restarts(self._module_index, self.site, first, last)

    @property
    def checks(self) -> Array:
        """(calls of the module,) structured array: residual, tolerance and precision of each call.

        Precision is the machine epsilon of the lowest precision in which the kernel computed.
        Residual and tolerance are NaN if the gates are not stored; `grutrace verify` computes them.
        """
        snapshot = self.snapshot
        count = snapshot.extent(self._module_index).calls
        return np.array(snapshot.source.checks(self._module_index, self.site.suffix, count))

    @property
    def residual(self) -> float:
        """The largest ``|replayed h - kernel's h|`` of all calls; 0.0 before the first call.

        NaN if the gates are recomputed when they are read.
        """
        return float(self.checks["residual"].max(initial=0.0))

    def weights(self, version: int = -1) -> dict[str, Array]:
        """Return one version of the weights by name, by default the last.

        Raises:
            NotRecordedError: There is no such version.
        """
        count = self.snapshot.extent(self._module_index).versions
        if not -count <= version < count:
            raise NotRecordedError(
                f"there is no version {version} of the weights of {self.name!r}, which has {count}"
            )
        source = self.snapshot.source
        weights = source.weights(self._module_index, self.site.suffix, version % count)
        return {name: np.array(array) for name, array in weights.items()}


def _return(snapshot: TraceSnapshot) -> TraceSnapshot:
    return snapshot
