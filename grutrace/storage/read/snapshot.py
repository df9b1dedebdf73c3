"""`TraceSnapshot`, the immutable state of a trace, and the selection of sites and quantities."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from grutrace.errors import (
    GLOBS,
    NotRecordedError,
    OptionError,
    require_one_of,
    short_repr,
    string_list,
    suggest_name,
)
from grutrace.records import (
    FORWARD_QUANTITIES,
    GATES,
    LOG_PREFIX,
    QUANTITIES,
    SET_PREFIX,
    Array,
    Site,
)
from grutrace.storage.format.shard_stamp import read_shard
from grutrace.storage.format.tables import ModuleCounts, Tables
from grutrace.storage.interfaces import InMemoryReader, Rows, Source
from grutrace.storage.memory import MemoryCopy
from grutrace.storage.read.annotations import AnnotationIndex, labelled_calls
from grutrace.storage.read.gradients import GradientRows, gradient_sources
from grutrace.storage.read.lazy_rows import SelectedRows
from grutrace.storage.read.proofs import PROOFS, marks
from grutrace.storage.read.recomputed import LowerLayerInput, RecomputedRows, SiteGateInputs
from grutrace.storage.read.sequence_index import (
    Integers,
    JoinedSegments,
    SequenceIndex,
    join_segments,
)

#: One row per call. Strings are Python objects, shared between rows.
CALLS = np.dtype(
    [
        ("module", object),
        ("tag", object),
        ("weights", np.int64),
        ("training", np.bool_),
        ("batch", np.int64),
        ("steps", np.int64),
        ("time", np.float64),
        ("residual", np.float32),
        ("proof", object),
        ("set", object),
        ("attached", np.bool_),
        ("scale", np.float64),
        ("rank", np.int64),
    ]
)

#: One row per sequence of a module.
SEQUENCES = np.dtype(
    [
        ("module", object),
        ("sequence", np.int64),
        ("original", np.int64),
        ("call", np.int64),
        ("place", np.int64),
        ("steps", np.int64),
        ("pieces", np.int64),
        ("parent", np.int64),
        ("parent_steps", np.int64),
        ("origin", object),
        ("tag", object),
        ("rank", np.int64),
    ]
)


class Restarts(NamedTuple):
    """Steps at which sequences continue from a changed state, in order.

    Attributes:
        sequences: (k,) the sequences.
        steps: (k,) the first step after the change.
        states: (k, H) the state before that step.
    """

    sequences: Integers
    steps: Integers
    states: Array


class TraceSnapshot:
    """The immutable state of a trace at the time when its tables were read.

    Args:
        source: Source of the trace.
        tables: Present tables of the source.

    Attributes:
        source: Reader of the rows that the tables count.
        header: Header of the trace.
        stored: The tables as stored, with separate segments.
    """

    def __init__(self, source: Source, tables: Tables) -> None:
        self.source = source.as_of(tables)
        self.header = source.header
        self.stored = tables
        self._indices: dict[int, SequenceIndex] = {}
        self._annotations: dict[int, AnnotationIndex] = {}
        self._gate_inputs: dict[tuple[int, str], SiteGateInputs] = {}
        self._calls: tuple[int, Array] | None = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle the rows too if the trace is in memory."""
        if isinstance(self.source, InMemoryReader):
            source = MemoryCopy(self.header, self.source.all_items(self.stored))
            return TraceSnapshot, (source, self.stored)
        return super().__reduce_ex__(protocol)

    @cached_property
    def _joined(self) -> JoinedSegments:
        return join_segments(self.stored)

    @property
    def tables(self) -> Tables:
        """The tables with the segments of each sequence joined."""
        return self._joined.tables

    def extent(self, module: int) -> ModuleCounts:
        """Return the number of calls, rows, sequences and weight versions of a module."""
        return self.tables.module_counts[module]

    def index(self, module: int) -> SequenceIndex:
        """Return the index of a module's sequences."""
        if module not in self._indices:
            stored = None
            if self._joined.segments[module] is not None:
                stored = self.stored.pieces[module]["sequence"]
            self._indices[module] = SequenceIndex(self.tables, module, stored)
        return self._indices[module]

    def initial(self, module: int, site: Site) -> Rows:
        """Return the initial states of the sequences at a site, (S, H)."""
        count, segments = self.stored.module_counts[module].sequences, self._joined.segments[module]
        initial = self.source.initial(module, site.suffix, count)
        if segments is None:
            return initial
        if isinstance(initial, np.ndarray):
            return initial[segments.first]
        return SelectedRows(initial, segments.first)

    def restarts(self, module: int, site: Site, first: int, last: int) -> Restarts:
        """Return where sequences `first` to `last` - 1 continue from a changed state.

        Args:
            module: Index of the module in the header.
            site: One of its sites.
            first: First sequence.
            last: Last sequence + 1.
        """
        segments = self._joined.segments[module]
        if segments is None:
            none = np.empty(0, np.int64)
            width = self.header.modules[module].unit_count(site)
            return Restarts(none, none, np.empty((0, width)))
        bounds = np.searchsorted(segments.sequences[segments.later], [first, last])
        later = segments.later[bounds[0] : bounds[1]]
        count = self.stored.module_counts[module].sequences
        states = self.source.initial(module, site.suffix, count)[later]
        return Restarts(segments.sequences[later], segments.steps_before[later], np.asarray(states))

    def mark(self, module: int, sequence: int) -> str | None:
        """Return the mark of how a sequence began, or None."""
        return self._joined.marks.get((module, sequence))

    def is_fork(self, module: int) -> Array:
        """Return which sequences of a module began inside another one, (sequences,)."""
        is_fork = self.index(module).parents[0] >= 0
        if self.tables.selected:
            is_fork |= self.tables.selected[module].is_fork
        return np.asarray(is_fork)

    def stored_numbers(self, module: int) -> Integers:
        """Return the number of the stored sequence in which each sequence began, (sequences,)."""
        segments = self._joined.segments[module]
        return np.arange(len(self.index(module))) if segments is None else segments.first

    def original_numbers(self, module: int) -> Integers:
        """Return the numbers of a module's sequences in the trace without selection."""
        if self.tables.selected:
            return np.asarray(self.tables.selected[module].numbers)
        return np.arange(len(self.index(module)))

    def annotations(self, module: int) -> AnnotationIndex:
        """Return the index of a module's annotations."""
        if module not in self._annotations:
            self._annotations[module] = AnnotationIndex(self.tables, module)
        return self._annotations[module]

    def rows(self, module: int, site: Site, quantity: str) -> Rows:
        """Return all rows of a quantity at a site.

        Raises:
            NotRecordedError: The quantity was not recorded at the site.
        """
        count = self.extent(module).rows
        if quantity in site.quantities:
            return self.source.rows(module, site.suffix, quantity, count)
        if quantity in self.logged(module):
            owner = next(other for other in self.header.modules[module].sites if other.logs)
            return self.source.rows(module, owner.suffix, LOG_PREFIX + quantity, count)
        if quantity not in site.derived:
            names = (*site.available_quantities, *self.logged(module))
            recorded = ", ".join(names) or "nothing"
            raise NotRecordedError(
                f"{quantity!r} was not recorded at {site.name!r}; recorded: {recorded}"
            )
        if quantity == "input":
            dtype = np.dtype(self.header.modules[module].dtype)
            return LowerLayerInput(self.gate_inputs(module, site), (count, site.input_size), dtype)
        return self._recomputed_rows(module, site, quantity)

    def logged(self, module: int) -> tuple[str, ...]:
        """Return the names of the values that were logged for the steps of a module."""
        sites = self.header.modules[module].sites
        return tuple(name for site in sites for name, _ in site.logs)

    def preactivation(self, module: int, site: Site, gate: str) -> Rows:
        """Return the pre-activations of a gate at a site, (N, H).

        Raises:
            OptionError: The gate is unknown.
            NotRecordedError: The hidden states or the input were not recorded.
        """
        if gate not in GATES:
            raise OptionError(f"gate: expected one of {', '.join(GATES)}; found {short_repr(gate)}")
        if missing_reason := self.gate_inputs(module, site).missing_reason:
            raise NotRecordedError(f"{site.name!r} has no pre-activations: {missing_reason}")
        return self._recomputed_rows(module, site, gate, preactivation=True)

    def gradient(self, module: int, site: Site, quantity: str, *, preactivation: bool) -> Rows:
        """Return the gradients of a quantity at a site, (N, H), or (N, I) for the input.

        Raises:
            OptionError: The quantity is unknown.
            NotRecordedError: The gradient was not recorded.
        """
        if preactivation:
            require_one_of("gradient: quantity of a pre-activation", quantity, GATES)
        require_one_of("gradient: quantity", quantity, FORWARD_QUANTITIES)
        arriving = self.rows(module, site, "gradient")
        width = site.input_size if quantity == "input" else arriving.shape[1]
        return GradientRows(
            arriving,
            self.gate_inputs(module, site),
            self.backward(module, site)["scale"],
            self.index(module),
            quantity,
            width,
            reverse=site.reverse,
            preactivation=preactivation,
        )

    def gradient_sources(self, module: int, site: Site, sequence: int, step: int) -> Array:
        """Return the parts of the total gradient of a state; see `Sequence.gradient_sources`.

        Raises:
            NotRecordedError: The gradient was not recorded.
        """
        return gradient_sources(
            self.rows(module, site, "gradient"),
            self.gate_inputs(module, site),
            self.backward(module, site),
            self.index(module),
            sequence,
            step,
            reverse=site.reverse,
        )

    def backward(self, module: int, site: Site) -> Array:
        """Return facts about the backward pass of each call, (calls,), `schema.BACKWARD`."""
        return self.source.backward(module, site.suffix, self.extent(module).calls)

    def gate_inputs(self, module: int, site: Site) -> SiteGateInputs:
        """Return the inputs from which the gates of a site are recomputed."""
        key = module, site.suffix
        if key not in self._gate_inputs:
            self._gate_inputs[key] = SiteGateInputs(
                self.source,
                self.index(module),
                self.extent(module),
                self.tables,
                self.header.modules[module],
                module,
                site,
            )
        return self._gate_inputs[key]

    def _recomputed_rows(
        self, module: int, site: Site, gate: str, *, preactivation: bool = False
    ) -> RecomputedRows:
        info = self.header.modules[module]
        shape, dtype = (self.extent(module).rows, info.hidden_size), np.dtype(info.dtype)
        gate_inputs = self.gate_inputs(module, site)
        return RecomputedRows(gate_inputs, gate, shape, dtype, preactivation=preactivation)

    @cached_property
    def tags(self) -> Array:
        """(calls,) tag of each call, or None."""
        labels = np.array([None, *self.tables.texts], object)
        return np.asarray(labels[self.tables.calls["tag"]])

    @cached_property
    def ranks(self) -> Array:
        """(calls,) rank of the recording process of each call; 0 for a single process."""
        shards = self.tables.shards
        if shards:
            return np.repeat([shard.rank for shard in shards], [shard.calls for shard in shards])
        shard = read_shard(self.header)
        return np.full(len(self.tables.calls), shard.rank if shard else 0)

    @property
    def calls(self) -> Array:
        """(calls,) of type `CALLS`."""
        resolved = sum(site.versions.resolved for site in tuple(self._gate_inputs.values()))
        if self._calls is None or self._calls[0] != resolved:
            self._calls = resolved, self._call_rows()
        return self._calls[1]

    @property
    def proof_marks(self) -> Array:
        """(calls,) the mark of each call; see `proofs`. Takes less time than `calls`."""
        found = np.zeros(len(self.tables.calls), np.uint8)
        for number in range(len(self.header.modules)):
            found[self.index(number).call_numbers] = self._marks(number)
        return found

    def _call_rows(self) -> Array:
        tables = self.tables
        calls = np.zeros(len(tables.calls), CALLS)
        for name in ("weights", "batch", "time"):
            calls[name] = tables.calls[name]
        calls["training"] = tables.calls["training"] > 0
        calls["tag"], calls["rank"] = self.tags, self.ranks
        calls["set"] = None
        mark_names = np.array(PROOFS, object)
        for number, module in enumerate(self.header.modules):
            index = self.index(number)
            rows = index.call_numbers
            calls["module"][rows] = module.path
            calls["steps"][rows] = index.call_steps
            calls["residual"][rows] = self._residuals(number)
            calls["proof"][rows] = mark_names[self._marks(number)]
            self._add_set_values(calls["set"], number)
            recorded = [site for site in module.sites if "gradient" in site.quantities]
            if recorded:
                backward = self.backward(number, recorded[0])
                calls["attached"][rows] = backward["attached"] > 0
                calls["scale"][rows] = backward["scale"]
        calls.flags.writeable = False
        return calls

    def _add_set_values(self, column: Array, module: int) -> None:
        """Write to each call of a module what an intervention has set in it, if any has."""
        index = self.index(module)
        for suffix, calls, texts in labelled_calls(self.tables, module, index, SET_PREFIX):
            for call, text in zip(calls.tolist(), texts, strict=True):
                found = f"{suffix}: {text}"
                column[call] = found if column[call] is None else f"{column[call]}; {found}"

    def _marks(self, module: int) -> Array:
        """Return the worst mark of the module's sites for each call; see `proofs`."""
        site_marks = []
        for site in self.header.modules[module].sites:
            gate_inputs = self._gate_inputs.get((module, site.suffix))
            if gate_inputs is None:
                checks = self.source.checks(module, site.suffix, self.extent(module).calls)
                site_marks.append(marks(checks))
            else:
                site_marks.append(gate_inputs.versions.marks)
        return np.asarray(np.max(site_marks, axis=0))

    def _residuals(self, module: int) -> Array:
        """Return the largest residual of the module's sites for each call."""
        count = self.extent(module).calls
        sites = self.header.modules[module].sites
        checks = [self.source.checks(module, site.suffix, count) for site in sites]
        return np.asarray(np.max([check["residual"] for check in checks], axis=0))

    @cached_property
    def sequences(self) -> Array:
        """(sequences of all modules,) of type `SEQUENCES`, module by module."""
        arrays = [self._sequence_rows(module) for module in range(len(self.header.modules))]
        sequences = np.concatenate(arrays) if arrays else np.zeros(0, SEQUENCES)
        sequences.flags.writeable = False
        return sequences

    def _sequence_rows(self, module: int) -> Array:
        index = self.index(module)
        first_pieces = index.first_pieces
        sequences = np.zeros(len(index), SEQUENCES)
        sequences["module"] = self.header.modules[module].path
        sequences["sequence"] = np.arange(len(index))
        sequences["original"] = self.original_numbers(module)
        sequences["call"] = index.calls[first_pieces]
        sequences["place"] = index.batch_indices[first_pieces]
        sequences["steps"] = index.lengths
        sequences["pieces"] = np.diff(index.bounds)
        sequences["parent"], sequences["parent_steps"] = index.parents
        sequences["origin"] = np.where(self.is_fork(module), "fork", "new")
        for (mark_module, sequence), mark in self._joined.marks.items():
            if mark_module == module:
                sequences["origin"][sequence] = mark
        sequences["tag"] = self.tags[sequences["call"]]
        sequences["rank"] = self.ranks[sequences["call"]]
        return sequences


def select_sites(
    snapshot: TraceSnapshot, globs: str | Sequence[str] | None
) -> dict[str, tuple[int, Site]]:
    """Return the selected sites by name, each with the index of its module, in model order.

    Args:
        snapshot: Snapshot of the trace.
        globs: A glob, or several, for names of sites; None for all sites.

    Raises:
        OptionError: `globs` is neither a string nor a list of strings.
    """
    globs = None if globs is None else string_list("sites", globs, GLOBS)
    return {
        site.name: (number, site)
        for number, module in enumerate(snapshot.header.modules)
        for site in module.sites
        if globs is None or any(fnmatchcase(site.name, glob) for glob in globs)
    }


def select_quantities(record: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the selected quantities in the order of `QUANTITIES`; None selects all.

    Raises:
        OptionError: A quantity is unknown.
    """
    if record is None:
        return QUANTITIES
    names = string_list("record", record, f"some of {', '.join(QUANTITIES)}")
    for name in names:
        if name not in QUANTITIES:
            raise OptionError(
                f"record: expected some of {', '.join(QUANTITIES)}; found {short_repr(name)}"
                f"{suggest_name(name, QUANTITIES)}"
            )
    return tuple(name for name in QUANTITIES if name in names)
