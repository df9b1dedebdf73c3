"""Gates that are recomputed on reading, from inputs, previous states and weights.

This module imports torch when gates are recomputed, because the equations are in `gru`.

N rows, I input size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grutrace.errors import NotRecordedError
from grutrace.records import Array, ModuleInfo, Site
from grutrace.storage.format.tables import ModuleCounts, Tables
from grutrace.storage.interfaces import SnapshotReader
from grutrace.storage.read.annotations import SetGates
from grutrace.storage.read.lazy_rows import LazyRows, block_slices
from grutrace.storage.read.proofs import CallVersions, StepData
from grutrace.storage.read.sequence_index import Integers, SequenceIndex, as_slice

if TYPE_CHECKING:
    from grutrace.gru.recompute import StepRecomputation

#: Bytes of memory that recomputing a block of rows takes.
BLOCK = 16 * 1024 * 1024

#: Arrays of 3H values per row that a recomputation holds at once: products, their parts, gates.
_ARRAYS = 4


class GateInputs(NamedTuple):
    """The inputs of a block of consecutive requested rows that used the same weights.

    Attributes:
        block: Position of the block within the requested rows.
        rows: (n,) row numbers.
        calls: (n,) call of each row, counted within the module.
        input: (n, I) input of each row.
        previous: (n, H) previous state of each row.
        weights: Weights by name.
        precision: Machine epsilon of the type in which the kernel computed.
    """

    block: slice
    rows: Integers
    calls: Integers
    input: Array
    previous: Array
    weights: dict[str, Array]
    precision: float


class SiteGateInputs:
    """Reads the inputs, previous states and weights from which the gates of a site follow.

    Args:
        reader: Reader of the trace.
        index: Index of the module's sequences.
        counts: Counts of the module.
        tables: Tables of the trace.
        module: The module.
        number: Index of the module in the header.
        site: The site.
    """

    def __init__(
        self,
        reader: SnapshotReader,
        index: SequenceIndex,
        counts: ModuleCounts,
        tables: Tables,
        module: ModuleInfo,
        number: int,
        site: Site,
    ) -> None:
        self._reader, self._index, self._counts = reader, index, counts
        self._calls, self._tables = tables.calls[index.call_numbers], tables
        self._module, self._number, self._site = module, number, site
        self._latest: tuple[int, dict[str, Array]] = -1, {}

    @property
    def missing_reason(self) -> str:
        """The reason why gates cannot be recomputed; empty if they can."""
        if "hidden" not in self._site.quantities:
            return "the hidden states were not recorded"
        if self._site.units is not None:
            return (
                f"only {len(self._site.units)} of {self._module.hidden_size} units were recorded, "
                "and recomputing a gate needs the states of all units"
            )
        if not self._input_sites:
            return "the input was not recorded"
        return ""

    @cached_property
    def _input_sites(self) -> tuple[Site, ...]:
        """The sites whose rows are the input: the site itself, or the layer below.

        The states of the layer below are the input only without dropout between the layers.
        """
        if "input" in self._site.quantities:
            return (self._site,)
        if self._module.dropout and self._calls["training"].any():
            return ()
        return layer_below(self._module, self._site)

    def input(self, rows: Integers, columns: slice = slice(None)) -> Array:
        """Return the input of these rows, (n, I).

        Raises:
            NotRecordedError: The input was not recorded.
        """
        if not self._input_sites:
            raise NotRecordedError(f"{self._site.name!r}: the input was not recorded")
        if self._input_sites == (self._site,):
            return np.asarray(self._stored(self._site, "input")[as_slice(rows), columns])
        states = [
            np.asarray(self._stored(site, "hidden")[as_slice(rows)]) for site in self._input_sites
        ]
        return np.concatenate(states, axis=1)[:, columns]

    def previous(self, rows: Integers) -> Array:
        """Return the previous state of each of these rows, (n, H), or (n, U) of selected units.

        Raises:
            NotRecordedError: The hidden states were not recorded.
        """
        index, site = self._index, self._site
        if "hidden" not in site.quantities:
            raise NotRecordedError(f"{site.name!r}: the hidden states were not recorded")
        hidden = self._stored(site, "hidden")
        pieces = index.pieces_of(rows)
        starts = index.starts[pieces]
        if site.reverse:
            is_last = rows == starts + index.steps[pieces] - 1
            previous_rows = np.where(is_last, -1, rows + 1)
        else:
            previous_rows = np.where(rows == starts, index.last_rows_before[pieces], rows - 1)
        previous = np.empty((len(rows), hidden.shape[1]), hidden.dtype)
        is_initial = previous_rows < 0
        previous[~is_initial] = hidden[as_slice(previous_rows[~is_initial])]
        initial = self._reader.initial(self._number, site.suffix, index.segment_count)
        previous[is_initial] = initial[index.segments[pieces[is_initial]]]
        return previous

    @cached_property
    def set_gates(self) -> SetGates:
        """The gates that an intervention has set."""
        size = self._module.hidden_size
        return SetGates(self._tables, self._number, self._index, self._site.suffix, size)

    def iter_blocks(self, rows: Integers) -> Iterator[GateInputs]:
        """Yield the inputs of the rows in order, in blocks of one weight version each.

        Raises:
            NotRecordedError: The hidden states or the input were not recorded.
        """
        if self.missing_reason:
            raise NotRecordedError(
                f"the gates of {self._site.name!r} cannot be recomputed: {self.missing_reason}"
            )
        calls = np.searchsorted(
            self._index.call_numbers, self._index.calls[self._index.pieces_of(rows)]
        )
        self.versions.resolve(calls)
        versions, precisions = self.versions.versions[calls], self._checks["precision"][calls]
        changes = (versions[1:] != versions[:-1]) | (precisions[1:] != precisions[:-1])
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(rows)]
        width = self._site.input_size + (2 + 3 * _ARRAYS) * self._module.hidden_size
        for group_start, group_stop in pairwise(bounds):
            for part in block_slices(group_stop - group_start, BLOCK, 8 * width):
                block = slice(group_start + part.start, group_start + part.stop)
                yield GateInputs(
                    block,
                    rows[block],
                    calls[block],
                    self.input(rows[block]),
                    self.previous(rows[block]),
                    self._weights(int(versions[group_start])),
                    float(precisions[group_start]),
                )

    @cached_property
    def versions(self) -> CallVersions:
        """The weight version of each call."""
        return CallVersions(
            self._site.name,
            self._checks,
            self._calls["weights"].astype(np.int64),
            self._index.call_numbers,
            self._index.call_steps,
            lambda rows: StepData(
                self.input(rows),
                self.previous(rows),
                np.asarray(self._stored(self._site, "hidden")[as_slice(rows)]),
            ),
            self._weights,
            self._counts.versions,
        )

    @cached_property
    def _checks(self) -> Array:
        return self._reader.checks(self._number, self._site.suffix, self._counts.calls)

    def weights_of_call(self, call: int) -> dict[str, Array]:
        """Return the weights that a call of the module used, by name.

        Args:
            call: Number of the call within the module.
        """
        self.versions.resolve(np.array([call]))
        return self._weights(int(self.versions.versions[call]))

    def _weights(self, version: int) -> dict[str, Array]:
        """Return one version of the weights. The last one is cached."""
        latest = self._latest
        if latest[0] != version:
            latest = version, self._reader.weights(self._number, self._site.suffix, version)
            self._latest = latest
        return latest[1]

    def _stored(self, site: Site, quantity: str) -> Any:
        return self._reader.rows(self._number, site.suffix, quantity, self._counts.rows)


def layer_below(module: ModuleInfo, site: Site) -> tuple[Site, ...]:
    """Return the sites of the layer below, whose concatenated states are the input of a site.

    Empty for the first layer, or if a site below was not recorded with all its units.
    """
    sites_below = tuple(other for other in module.sites if other.layer == site.layer - 1)
    has_all_directions = len(sites_below) == (2 if module.bidirectional else 1)
    has_all_states = all(
        "hidden" in other.quantities and other.units is None for other in sites_below
    )
    return sites_below if has_all_directions and has_all_states else ()


_ALL = slice(None)


class RecomputedRows(LazyRows):
    """Gates, or their pre-activations, of the rows of a site, (N, H). Indexing recomputes them.

    Args:
        gate_inputs: Inputs of the site's gates.
        quantity: Name of the gate.
        shape: (N, H)
        dtype: Storage type of the gates.
        preactivation: Whether to stop before the sigmoid or tanh.
    """

    _location = "recomputed when they are read"

    def __init__(
        self,
        gate_inputs: SiteGateInputs,
        quantity: str,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        *,
        preactivation: bool = False,
    ) -> None:
        super().__init__(shape, dtype)
        self._gate_inputs, self._quantity = gate_inputs, quantity
        self._preactivation = preactivation

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._take(np.arange(*rows.indices(len(self))), columns)

    def _take(self, rows: Array, columns: slice) -> Array:
        width = len(range(self.shape[1])[columns])
        array = np.empty((len(rows), width), self.dtype)
        for inputs, recomputation in iter_recomputed(self._gate_inputs, rows, columns):
            values = recomputation.preactivation if self._preactivation else recomputation.gate
            array[inputs.block] = values(self._quantity)
        return array


class LowerLayerInput(LazyRows):
    """The input of a layer above the first, (N, I), from the states of the layer below.

    Args:
        gate_inputs: Inputs of the site's gates.
        shape: (N, I)
        dtype: Type of the states.
    """

    _location = "read from the states of the layer below"

    def __init__(
        self, gate_inputs: SiteGateInputs, shape: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        super().__init__(shape, dtype)
        self._gate_inputs = gate_inputs

    def _read(self, rows: slice, columns: slice) -> Array:
        return self._take(np.arange(*rows.indices(len(self))), columns)

    def _take(self, rows: Array, columns: slice) -> Array:
        return self._gate_inputs.input(rows, columns)


def iter_recomputed(
    gate_inputs: SiteGateInputs, rows: Integers, units: slice = _ALL
) -> Iterator[tuple[GateInputs, StepRecomputation]]:
    """Recompute rows of a site in the precision of the kernel, block by block.

    Raises:
        NotRecordedError: The hidden states or the input were not recorded.
    """
    from grutrace.gru.recompute import StepRecomputation

    for inputs in gate_inputs.iter_blocks(rows):
        recomputation = StepRecomputation(
            inputs.input, inputs.previous, inputs.weights, inputs.precision, units
        )
        recomputation.set_gates(gate_inputs.set_gates.at(inputs.rows, units))
        yield inputs, recomputation
