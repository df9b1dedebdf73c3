"""Gates that the model does not wait for: made from copies, of many calls at once.

A call is recorded as where gates are deferred: its states and input are copied. (Where that costs
a fraction of what would have to be computed, its gates are harvested, and only their proof is left
to make.) What comes out is the block that an inline trace would have made, when it is needed: on
the thread that writes a file, or when a trace in memory is looked at. Calls that used the same
weights are computed together.

N rows of all calls, B sequences of a call, I input size, H hidden size.

Keeping torch to one thread in a thread of ours.

torch shares its work among a team of threads, and every thread that calls it gets a team of its
own. Once there are more of them than cores, OpenMP has all of them sleep where they would wait for
each other, be anything going on or not: a model's layers, which wait at every step, took two to
five times as long from when on the thread that writes a file had computed gates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from grutrace.capture.recording.weight_versions import KEPT_VERSIONS
from grutrace.gru.kernel_gates import Wish
from grutrace.gru.recompute import Recomputed, prove, recompute, tolerances
from grutrace.gru.residual import Doubt, find_doubts
from grutrace.records import (
    GATES,
    Array,
    CallRecord,
    ModuleInfo,
    Record,
    Site,
    SiteRows,
    WeightsRecord,
)


class _Kept(threading.local):
    done = False


_here = _Kept()


def keep_to_one_thread() -> None:
    """Have torch make no team for the calling thread, from now on."""
    if _here.done:
        return
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    # It also is what threads get that are new to torch from now on: they get what they would have.
    again = threading.Thread(target=torch.set_num_threads, args=(number,))
    again.start()
    again.join()
    _here.done = True


@dataclass(frozen=True)
class CopiedBlock(CallRecord):
    """A call of which what the gates follow from was copied.

    Attributes:
        starts: By suffix, (B, H), the state that each batch row started the call from.
        ready: Waits until the copies are whole; None if they are.
        of_version: The version of the weights that the call used.
        doubt: How far the gates of another version are from these that leads to the same states,
            if it may have been that; 0 if not.
    """

    starts: Mapping[str, Array] = field(default_factory=dict)
    ready: Callable[[], None] | None = None
    of_version: WeightsRecord | None = None
    doubt: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return super().nbytes + sum(array.nbytes for array in self.starts.values())


class Background:
    """Turns copied blocks into whole ones. For one thread at a time.

    Args:
        modules: Of the trace.
        own_thread: Whether it runs in a thread that is not the model's, nor a reader's.

    Attributes:
        calls: How many calls the trace has so far.
    """

    def __init__(self, modules: Sequence[ModuleInfo], *, own_thread: bool = False) -> None:
        self._modules, self._own_thread = modules, own_thread
        # By module, then by version: the last ones.
        self._weights: dict[int, dict[int, WeightsRecord]] = {}
        self._doubts: list[Doubt] = []
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Return the records as they are to be stored."""
        if self._own_thread:
            keep_to_one_thread()
        whole = list(records)
        waiting: dict[int, list[int]] = {}
        for place, record in enumerate(records):
            if isinstance(record, WeightsRecord):
                self._make(whole, waiting.pop(record.module, []))
                known = self._weights.setdefault(record.module, {})
                known[record.version] = record
                # Some more than a recorder keeps, which can come back to an earlier one.
                while len(known) > KEPT_VERSIONS + 2:
                    del known[next(iter(known))]
            elif isinstance(record, CopiedBlock):
                waiting.setdefault(record.module, []).append(place)
        for places in waiting.values():
            self._make(whole, places)
        self._note_doubts(whole)
        return whole

    def _note_doubts(self, records: Sequence[Record]) -> None:
        news: list[Doubt] = []
        for record in records:
            if isinstance(record, CallRecord):
                news += find_doubts(self._modules[record.module], record, self.calls)
                self.calls += 1
        if news:
            with self._lock:
                self._doubts += news

    def forget(self) -> None:
        """Begin anew: the trace was emptied."""
        with self._lock:
            self._weights, self._doubts, self.calls = {}, [], 0

    def take_doubts(self) -> list[Doubt]:
        """Return what rounding does not explain, each once. From any thread."""
        if not self._doubts:
            return []
        with self._lock:
            found, self._doubts = self._doubts, []
        return found

    def _make(self, records: list[Record], places: Sequence[int]) -> None:
        """Replace the copied blocks in these places, which are of one module."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for place in places:
            block = records[place]
            assert isinstance(block, CopiedBlock)
            key = (block.weights, *((s.precision, *s.rows) for s in block.sites.values()))
            alike.setdefault(key, []).append(place)
        for same in alike.values():
            blocks = [
                each for each in map(records.__getitem__, same) if isinstance(each, CopiedBlock)
            ]
            for place, block in zip(same, self._whole(blocks), strict=True):
                records[place] = block

    def _whole(self, blocks: Sequence[CopiedBlock]) -> list[CallRecord]:
        """Return calls that used the same weights with their gates."""
        for block in blocks:
            if block.ready is not None:
                block.ready()
        module, known = self._modules[blocks[0].module], self._weights[blocks[0].module]
        weights = blocks[0].of_version or known[blocks[0].weights]
        found = _computed(module, blocks, weights)
        # Weights can change and change back unseen: the states tell which were used.
        return [
            whole if whole.is_proven else self._other_version(module, copied, whole)
            for copied, whole in zip(blocks, found, strict=True)
        ]

    def _other_version(
        self, module: ModuleInfo, copied: CopiedBlock, doubtful: CallRecord
    ) -> CallRecord:
        for number, weights in reversed(self._weights[copied.module].items()):
            if number != copied.weights:
                other = replace(copied, weights=number, of_version=weights)
                (found,) = _computed(module, [other], weights)
                if found.is_proven:
                    return found
        return doubtful


class ChosenVersion(NamedTuple):
    """The version of the weights that a call used.

    Attributes:
        weights: The first that leads to its states, or the first one if none does.
        checks: By suffix, the residual, and the residual that rounding explains.
        doubt: How far the gates of another version that leads to the same states are from these, in
            the way that a residual is; 0 if no other does, or with the same gates.
    """

    weights: WeightsRecord
    checks: dict[str, tuple[float, float]]
    doubt: float = 0.0


def choose_version(
    module: ModuleInfo, block: CopiedBlock, versions: Sequence[WeightsRecord]
) -> ChosenVersion:
    """Find out which version of the weights leads to the states of a call.

    Args:
        module: The module, with gates derived and what they follow from stored, of all units.
        block: The call.
        versions: In the order in which they are tried.

    Returns:
        What was found. States can be the same where gates are not: from a state of zeros without a
        bias, the reset gate has no influence.
    """
    joined = _Joined(module, [block])
    first: ChosenVersion | None = None
    fitting: list[tuple[ChosenVersion, dict[str, Recomputed]]] = []
    for weights in versions:
        made = {
            site.suffix: joined.recompute(site, weights.sites[site.suffix], np.dtype(module.dtype))
            for site in module.sites
        }
        checks = {site.suffix: joined.checks(site, made[site.suffix])[0] for site in module.sites}
        found = ChosenVersion(weights, checks)
        first = first or found
        if all(residual <= allowed for residual, allowed in checks.values()):
            fitting.append((found, made))
    if not fitting:
        assert first is not None
        return first
    chosen, made = fitting[0]
    doubt = 0.0
    for _, others in fitting[1:]:
        for suffix, (_, allowed) in chosen.checks.items():
            pairs = zip(made[suffix].gates.values(), others[suffix].gates.values(), strict=True)
            apart = max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs)
            if apart > allowed:
                doubt = max(doubt, apart)
    return chosen._replace(doubt=doubt)


def _computed(
    module: ModuleInfo, blocks: Sequence[CopiedBlock], weights: WeightsRecord
) -> list[CallRecord]:
    """Return calls that used these weights with their gates."""
    joined = _Joined(module, blocks)
    by_site = {
        site.suffix: _site(module, site, joined, weights.sites[site.suffix])
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


def _site(
    module: ModuleInfo, site: Site, joined: _Joined, weights: Mapping[str, Array]
) -> list[SiteRows]:
    """Return the rows of each call at a site."""
    copied = [block.sites[site.suffix] for block in joined.blocks]
    checks = [(each.residual, each.tolerance) for each in copied]
    columns = {name: joined.column(site, name) for name in ("hidden", *site.quantities)}
    dtype = np.dtype(module.dtype)
    if any(name in GATES for name in site.quantities):
        found = joined.recompute(site, weights, dtype)
        columns |= found.gates
        checks = joined.checks(site, found)
    checks = [
        (max(residual, block.doubt), allowed)
        for (residual, allowed), block in zip(checks, joined.blocks, strict=True)
    ]
    stored = {name: _as(dtype, columns[name]) for name in site.quantities}
    return [
        SiteRows(
            {name: rows[joined.rows(call)] for name, rows in stored.items()},
            _as(dtype, each.initial),
            *checks[call],
            each.precision,
        )
        for call, each in enumerate(copied)
    ]


class _Joined:
    """Calls of one module, end to end."""

    def __init__(self, module: ModuleInfo, blocks: Sequence[CopiedBlock]) -> None:
        self.blocks = blocks
        self._module = module
        self._lengths = np.concatenate([block.steps for block in blocks]).astype(np.int64)
        counts = np.array([int(block.steps.sum()) for block in blocks], np.int64)
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts
        self._filled = np.flatnonzero(counts)

    def rows(self, call: int) -> slice:
        """Where the rows of a call are."""
        return slice(int(self._begins[call]), int(self._ends[call]))

    def checks(self, site: Site, found: Recomputed) -> list[tuple[float, float]]:
        """Return residual and tolerance of each call."""
        module = self._module
        precisions = [block.sites[site.suffix].precision for block in self.blocks]
        residuals = self.largest(found.off)
        allowed = tolerances(
            np.array(precisions),
            site.input_size + module.hidden_size,
            self.largest_start(site),
            self.largest(found.product),
            self.largest(found.recurrent),
            np.dtype(module.dtype),
            self.largest(found.sums),
        )
        return list(zip(residuals.tolist(), allowed.tolist(), strict=True))

    def recompute(
        self, site: Site, weights: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> Recomputed:
        """The gates of all calls at a site; of harvested ones just the proof."""
        hidden, input = self.column(site, "hidden"), self.column(site, "input")
        if set(GATES) & set(self.blocks[0].sites[site.suffix].rows):
            return self._prove(site, hidden)
        precision = self.blocks[0].sites[site.suffix].precision
        return recompute(input, self._previous(site, hidden), hidden, weights, precision, dtype)

    def _prove(self, site: Site, hidden: Array) -> Recomputed:
        asked = [name for name in GATES if name in site.quantities]
        wish = Wish.of(asked, range(hidden.shape[-1]))
        assert wish is not None
        units = slice(wish.proof.start, wish.proof.stop, wish.proof.step)
        update, candidate = (
            gate if gate.shape[-1] == len(wish.proof) else gate[:, units]
            for gate in (self.column(site, "update"), self.column(site, "candidate"))
        )
        off = prove(update, candidate, self._previous(site, hidden)[:, units], hidden[:, units])
        # The gates being the kernel's own, there are no products that were made in another order.
        nothing = np.zeros(len(off))
        return Recomputed({}, off, nothing, nothing, nothing)

    def largest(self, values: Array) -> Array:
        """(calls,) the largest of the values (N,) of each call; 0 where it has no rows."""
        found = np.zeros(len(self.blocks))
        if len(self._filled):
            found[self._filled] = np.maximum.reduceat(values, self._begins[self._filled])
        return found

    def largest_start(self, site: Site) -> Array:
        """(calls,) the largest finite state that a sequence of each call started from."""
        return np.array(
            [
                np.nan_to_num(np.abs(block.starts[site.suffix]), nan=0.0, posinf=0.0).max(
                    initial=0.0
                )
                for block in self.blocks
            ]
        )

    def column(self, site: Site, quantity: str) -> Array:
        """(N, H) or (N, I) of all calls; an input may be the states of the layer below.

        Empty for what was not copied.
        """
        if quantity in self.blocks[0].sites[site.suffix].rows:
            return _concatenated([block.sites[site.suffix].rows[quantity] for block in self.blocks])
        below = [each for each in self._module.sites if each.layer == site.layer - 1]
        if quantity != "input" or not below:
            return np.empty((0, 0))
        return np.concatenate([self.column(each, "hidden") for each in below], axis=1)

    def _previous(self, site: Site, hidden: Array) -> Array:
        """(N, H) the state before each row, rows being in time order, sequence by sequence."""
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
    # What does not fit was said when it was copied.
    with np.errstate(over="ignore"):
        return rows.astype(dtype, copy=False)


def _concatenated(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
