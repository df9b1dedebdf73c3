"""Compute gates in the background, from copies, for many calls at once.

The model's call only copies states and input, as with deferred gates. (The kernel's own gates are
copied if that costs much less than a replay. Then only their check remains.) The records are
completed on the thread that writes a file, or when a trace in memory is read. Calls with the same
weights are computed together.

`limit_torch_threads` restricts torch to one thread in the writer thread. torch creates a pool of
OpenMP threads for each thread that calls it. With more threads than cores, OpenMP threads sleep
instead of spinning while they wait: a model's layers, which wait at every step, took two to five
times as long once the writer thread had computed gates.

N rows of all calls, B sequences of a call, I input size, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from grutrace.capture.recording.weight_versions import MAX_VERSIONS
from grutrace.gru.gate_copies import GateCopyPlan
from grutrace.gru.recompute import RecomputedGates, recompute, row_residuals, tolerances
from grutrace.gru.residual import ResidualViolation, find_violations
from grutrace.records import (
    GATES,
    Array,
    CallBatch,
    CallRecord,
    CallSeries,
    ModuleInfo,
    Record,
    Site,
    SiteRows,
    WeightsRecord,
)


class _ThreadLimit(threading.local):
    is_set = False


_local = _ThreadLimit()


def limit_torch_threads() -> None:
    """Make torch use a single thread in the calling thread from now on."""
    if _local.is_set:
        return
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    # The call above also changes the default for threads that use torch later. This restores it.
    again = threading.Thread(target=torch.set_num_threads, args=(number,))
    again.start()
    again.join()
    _local.is_set = True


@dataclass(frozen=True)
class PendingCall(CallRecord):
    """A call whose states and input were copied, and whose gates are not computed yet.

    Attributes:
        starts: By suffix, (B, H), the initial state of each batch row.
        wait_for_copies: Waits until the copies are complete; None if they are complete.
        weights_record: The version of the weights that the call used.
        ambiguity: The largest difference from the gates of another version that leads to the same
            states; 0 if there is none.
    """

    starts: Mapping[str, Array] = field(default_factory=dict)
    wait_for_copies: Callable[[], None] | None = None
    weights_record: WeightsRecord | None = None
    ambiguity: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return super().nbytes + sum(array.nbytes for array in self.starts.values())


@dataclass(frozen=True)
class PendingSeries(CallSeries):
    """Similar calls whose states and input were copied, and whose gates are not computed yet.

    Attributes:
        starts: By suffix, a list (n,) with `PendingCall.starts` of each call.
        weights_record: The version of the weights that the calls used.
    """

    starts: Mapping[str, Sequence[Array]] = field(default_factory=dict)
    weights_record: WeightsRecord | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        starts = (array for arrays in self.starts.values() for array in arrays)
        return super().nbytes + sum(array.nbytes for array in starts)

    def calls(self) -> list[CallRecord]:
        """Return the calls as single records."""
        return [
            PendingCall(
                **{name: getattr(call, name) for name in CallRecord.__dataclass_fields__},
                starts={suffix: arrays[index] for suffix, arrays in self.starts.items()},
                weights_record=self.weights_record,
            )
            for index, call in enumerate(super().calls())
        ]


class BackgroundReplay:
    """Completes pending calls with their gates. Only one thread may use it at a time.

    Args:
        modules: The modules of the trace.
        own_thread: Whether it runs in a thread of its own.

    Attributes:
        calls: Number of calls in the trace.
    """

    def __init__(self, modules: Sequence[ModuleInfo], *, own_thread: bool = False) -> None:
        self._modules, self._own_thread = modules, own_thread
        # The latest versions, by module and number.
        self._weights: dict[int, dict[int, WeightsRecord]] = {}
        self._violations: list[ResidualViolation] = []
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Return the records to store: single calls with their gates."""
        if self._own_thread:
            limit_torch_threads()
        records = [
            call
            for record in records
            for call in (record.calls() if isinstance(record, CallBatch) else (record,))
        ]
        whole = list(records)
        waiting: dict[int, list[int]] = {}
        for index, record in enumerate(records):
            if isinstance(record, WeightsRecord):
                self._complete_records(whole, waiting.pop(record.module, []))
                known = self._weights.setdefault(record.module, {})
                known[record.version] = record
                # More than a recorder keeps, because a recorder can return to an earlier version.
                while len(known) > MAX_VERSIONS + 2:
                    del known[next(iter(known))]
            elif isinstance(record, PendingCall):
                waiting.setdefault(record.module, []).append(index)
        for indices in waiting.values():
            self._complete_records(whole, indices)
        self._note_violations(whole)
        return whole

    def _note_violations(self, records: Sequence[Record]) -> None:
        news: list[ResidualViolation] = []
        for record in records:
            if isinstance(record, CallRecord):
                news += find_violations(self._modules[record.module], record, self.calls)
                self.calls += 1
        if news:
            with self._lock:
                self._violations += news

    def reset(self) -> None:
        """Start again from an empty trace."""
        with self._lock:
            self._weights, self._violations, self.calls = {}, [], 0

    def pop_violations(self) -> list[ResidualViolation]:
        """Return the violations since the last call. Safe to use from any thread."""
        if not self._violations:
            return []
        with self._lock:
            violations, self._violations = self._violations, []
        return violations

    def _complete_records(self, records: list[Record], indices: Sequence[int]) -> None:
        """Replace the pending calls at these indices, which belong to one module."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for index in indices:
            block = records[index]
            assert isinstance(block, PendingCall)
            key = (block.weights, *((s.precision, *s.rows) for s in block.sites.values()))
            alike.setdefault(key, []).append(index)
        for same in alike.values():
            blocks = [
                record
                for record in map(records.__getitem__, same)
                if isinstance(record, PendingCall)
            ]
            for index, block in zip(same, self._complete(blocks), strict=True):
                records[index] = block

    def _complete(self, blocks: Sequence[PendingCall]) -> list[CallRecord]:
        """Add the gates to calls that used the same weights."""
        for block in blocks:
            if block.wait_for_copies is not None:
                block.wait_for_copies()
        module, known = self._modules[blocks[0].module], self._weights[blocks[0].module]
        weights = blocks[0].weights_record or known[blocks[0].weights]
        calls = _replay_calls(module, blocks, weights)
        # Weights can change and change back between two comparisons. The states show which
        # version the call used.
        return [
            whole if whole.is_proven else self._other_version(module, copied, whole)
            for copied, whole in zip(blocks, calls, strict=True)
        ]

    def _other_version(
        self, module: ModuleInfo, copied: PendingCall, doubtful: CallRecord
    ) -> CallRecord:
        for number, weights in reversed(self._weights[copied.module].items()):
            if number != copied.weights:
                other = replace(copied, weights=number, weights_record=weights)
                (call,) = _replay_calls(module, [other], weights)
                if call.is_proven:
                    return call
        return doubtful


def _replay_calls(
    module: ModuleInfo, blocks: Sequence[PendingCall], weights: WeightsRecord
) -> list[CallRecord]:
    """Add the gates to calls that used these weights."""
    joined = JoinedCalls(module, blocks)
    by_site = {
        site.suffix: _site_rows(module, site, joined, weights.sites[site.suffix])
        for site in module.sites
    }
    return [
        CallRecord(
            module=block.module,
            time=block.time,
            tag=block.tag,
            training=block.training,
            weights=block.weights,
            steps=block.steps,
            sequences=block.sequences,
            sites={suffix: rows[call] for suffix, rows in by_site.items()},
            forks=block.forks,
            origins=block.origins,
        )
        for call, block in enumerate(blocks)
    ]


def _site_rows(
    module: ModuleInfo, site: Site, joined: JoinedCalls, weights: Mapping[str, Array]
) -> list[SiteRows]:
    """Return the rows of each call at a site."""
    copied = [block.sites[site.suffix] for block in joined.blocks]
    checks = [(site_copy.residual, site_copy.tolerance) for site_copy in copied]
    columns = {name: joined.rows_of(site, name) for name in ("hidden", *site.quantities)}
    dtype = np.dtype(module.dtype)
    if any(name in GATES for name in site.quantities):
        gates = joined.recompute(site, weights, dtype)
        columns |= gates.gates
        checks = joined.checks(site, gates)
    checks = [
        (max(residual, block.ambiguity), allowed)
        for (residual, allowed), block in zip(checks, joined.blocks, strict=True)
    ]
    stored = {name: _as(dtype, columns[name]) for name in site.quantities}
    return [
        SiteRows(
            {name: rows[joined.rows(call)] for name, rows in stored.items()},
            _as(dtype, site_copy.initial),
            *checks[call],
            site_copy.precision,
        )
        for call, site_copy in enumerate(copied)
    ]


class JoinedCalls:
    """The concatenated rows of several calls of one module."""

    def __init__(self, module: ModuleInfo, blocks: Sequence[PendingCall]) -> None:
        self.blocks = blocks
        self._module = module
        self._lengths = np.concatenate([block.steps for block in blocks]).astype(np.int64)
        counts = np.array([int(block.steps.sum()) for block in blocks], np.int64)
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        self._filled = np.flatnonzero(counts)

    def rows(self, call: int) -> slice:
        """Return the range of a call's rows."""
        return slice(int(self._begins[call]), int(self._ends[call]))

    def checks(self, site: Site, gates: RecomputedGates) -> list[tuple[float, float]]:
        """Return residual and tolerance of each call."""
        module = self._module
        precisions = [block.sites[site.suffix].precision for block in self.blocks]
        residuals = self.max_per_call(gates.residual)
        allowed = tolerances(
            np.array(precisions),
            site.input_size + module.hidden_size,
            self.max_start_state(site),
            self.max_per_call(gates.product),
            self.max_per_call(gates.recurrent),
            np.dtype(module.dtype),
            self.max_per_call(gates.abs_sum_bounds),
        )
        return list(zip(residuals.tolist(), allowed.tolist(), strict=True))

    def recompute(
        self, site: Site, weights: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> RecomputedGates:
        """Return the gates of all calls at a site. Copied gates are only checked."""
        hidden, input = self.rows_of(site, "hidden"), self.rows_of(site, "input")
        if set(GATES) & set(self.blocks[0].sites[site.suffix].rows):
            return self._prove(site, hidden)
        precision = self.blocks[0].sites[site.suffix].precision
        return recompute(input, self._previous(site, hidden), hidden, weights, precision, dtype)

    def _prove(self, site: Site, hidden: Array) -> RecomputedGates:
        asked = [name for name in GATES if name in site.quantities]
        plan = GateCopyPlan.of(asked, range(hidden.shape[-1]))
        assert plan is not None
        units = slice(plan.check_units.start, plan.check_units.stop, plan.check_units.step)
        update, candidate = (
            gate if gate.shape[-1] == len(plan.check_units) else gate[:, units]
            for gate in (self.rows_of(site, "update"), self.rows_of(site, "candidate"))
        )
        residual = row_residuals(
            update, candidate, self._previous(site, hidden)[:, units], hidden[:, units]
        )
        # The gates are the kernel's own, so no product was summed in another order.
        nothing = np.zeros(len(residual))
        return RecomputedGates({}, residual, nothing, nothing, nothing)

    def max_per_call(self, values: Array) -> Array:
        """Return (calls,), the largest of each call's values (N,); 0 for a call without rows."""
        maxima = np.zeros(len(self.blocks))
        if len(self._filled):
            maxima[self._filled] = np.maximum.reduceat(values, self._begins[self._filled])
        return maxima

    def max_start_state(self, site: Site) -> Array:
        """Return (calls,), the largest finite initial state of each call."""
        return np.array(
            [
                np.nan_to_num(np.abs(block.starts[site.suffix]), nan=0.0, posinf=0.0).max(
                    initial=0.0
                )
                for block in self.blocks
            ]
        )

    def rows_of(self, site: Site, quantity: str) -> Array:
        """Return (N, H) or (N, I) of all calls. An input may be the states of the layer below.

        The array is empty if the quantity was not copied.
        """
        if quantity in self.blocks[0].sites[site.suffix].rows:
            return _concatenated([block.sites[site.suffix].rows[quantity] for block in self.blocks])
        below = [
            lower_site for lower_site in self._module.sites if lower_site.layer == site.layer - 1
        ]
        if quantity != "input" or not below:
            return np.empty((0, 0))
        return np.concatenate([self.rows_of(lower_site, "hidden") for lower_site in below], axis=1)

    def _previous(self, site: Site, hidden: Array) -> Array:
        """Return (N, H), the state before each row. Rows are sorted by sequence, then by step."""
        previous = np.empty_like(hidden)
        if site.reverse:
            previous[:-1] = hidden[1:]
        else:
            previous[1:] = hidden[:-1]
        ends = np.cumsum(self._lengths)
        first = ends - 1 if site.reverse else ends - self._lengths
        starts = _concatenated([block.starts[site.suffix] for block in self.blocks])
        stepping = self._lengths > 0
        previous[first[stepping]] = starts[stepping]
        return previous


def _as(dtype: np.dtype[Any], rows: Array) -> Array:
    # Overflow was reported when the values were copied.
    with np.errstate(over="ignore"):
        return rows.astype(dtype, copy=False)


def _concatenated(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
