"""From what was observed in one module to the records that a sink takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.capture.background import CopiedBlock, choose_version
from grutrace.capture.continuity import Assignment, Continuity
from grutrace.capture.deferral import defer
from grutrace.capture.doubt import Doubt, find_doubts
from grutrace.capture.kept import KeptSteps, only_kept
from grutrace.capture.limits import Limits
from grutrace.capture.observe import Observation
from grutrace.capture.options import Options
from grutrace.capture.pending import HeldCall, PendingRecords
from grutrace.capture.rowtype import RowType, to_numpy
from grutrace.capture.site_recorder import Check, SiteRecorder
from grutrace.capture.sites import Selection
from grutrace.capture.versions import KEPT_VERSIONS, Version, WeightVersions
from grutrace.errors import UnsupportedError
from grutrace.gru.gather import NOTHING, together
from grutrace.gru.harvest import is_recognized
from grutrace.record import GATES, WEIGHTS, Array, Block, Module, Site, SiteRows, Weights

#: By suffix, the rows of a call and what a check of them needs.
Taken: TypeAlias = dict[str, tuple[dict[str, Array], Check]]


class Recorded(NamedTuple):
    """A call that was heard, and what of it has gone to the sink.

    Attributes:
        module: Place of the module in the header.
        assignment: Its sequences, as they were told, and where they stood before it.
        lengths: (B,) all steps that it made of each.
        numbers: (B,) the number that each sequence began under in the trace; -1 for none.
        start: The first step of every sequence that is kept.
        stop: The first one after those; None for no end.
        block: What was recorded; None if none of its steps is kept.
        number: Of the call in the trace, counted through all of this recording; None where that
            is not known yet.
    """

    module: int
    assignment: Assignment
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    start: int = 0
    stop: int | None = None
    block: Block | None = None
    number: int | None = None


class _Computed(NamedTuple):
    """What was worked out of a call.

    Attributes:
        taken: Its rows.
        version: The version of the weights that it used.
        is_certain: Whether that is sure: every byte was compared, or the states say so.
    """

    taken: Taken
    version: Version
    is_certain: bool


class _Held(HeldCall):
    """A call of this module that waits.

    Attributes:
        version: The version of the weights that was known when it ran.
        evidence: What its gates follow from.
    """

    def __init__(self, block: Block, version: Version, evidence: CopiedBlock) -> None:
        super().__init__(block)
        self.version, self.evidence = version, evidence


class ModuleRecorder:
    """Turns the observations of one module into blocks, and announces its weights.

    Args:
        index: The module's place in the header.
        selection: The module, and what is recorded of it.
        pending: Where records go.
        options: Of the tracer. Where gates are deferred, nothing is replayed but only copied.
        limits: How much the trace may become.
        state_memory: Bytes of states that are remembered, to tell which sequence a call goes on
            with.

    Attributes:
        description: What is recorded of the module.
        asked: Which of the kernel's own gates are wanted, where they can be had.
    """

    def __init__(
        self,
        index: int,
        selection: Selection,
        pending: PendingRecords,
        options: Options,
        limits: Limits,
        state_memory: int,
    ) -> None:
        self._index, self._limits, self._pending = index, limits, pending
        self._selection, self._options = selection, options
        self.description = selection.description
        background = options.gates == "background"
        copied = defer(self.description) if background else self.description
        self._rows = RowType(
            copied,
            chosen=options.dtype is not None,
            copied=background,
            beside=options.to_file,
        )
        self._sites = [SiteRecorder(selection, site, options, self._rows) for site in copied.sites]
        # Of these, what each sequence started a call from is copied as well.
        self._copying = self._sites if background else []
        self._steps = options.steps
        #: Held while a call is numbered and handed on.
        self.lock = threading.RLock()
        self._state_memory = state_memory
        self.forget()
        self._has_gates = any({*GATES} & {*each.readable} for each in self.description.sites)
        wishes = [site.asked for site in self._sites]
        # Of some steps the replay costs less than the whole call's harvest.
        wanted = self._kept is None and all(each.columns for each in wishes)
        self.asked = NOTHING
        if wanted and is_recognized():
            self.asked = together(wishes, self.description.hidden_size)

    def forget(self) -> None:
        """Number the next call as the first. For whoever holds `lock`, once the trace is empty.

        Its sequences begin anew, from the states that it is given, and its weights are announced.
        """
        self._continuity = Continuity(self._state_memory)
        steps = self._steps
        self._kept = None if steps is None else KeptSteps(steps.start, steps.stop)
        # What is replayed with the call reads all weights anyway, and has to read the right ones.
        is_exact = self._options.weights == "exact" or self._options.gates == "inline"
        self._versions = WeightVersions("exact" if is_exact else "auto")
        self._records: dict[int, Weights] = {}
        self._held: list[_Held] = []
        #: Calls that turned out to be unproven, and were not said to be yet.
        self.doubts: list[Doubt] = []

    def record(
        self,
        observation: Observation,
        tag: str | None,
        names: Sequence[Hashable] | None = None,
    ) -> Recorded:
        """Record an observed call: harvested, replayed or, where gates come later, copied.

        Args:
            observation: The call.
            tag: The user's name for this part of the run.
            names: (B,) the user's names of the sequences; None to go by the states.

        Raises:
            UnsupportedError: What a layer read is not recorded, and can no longer be told.
            LimitReached: It goes beyond what the trace may become. Nothing was recorded.
            SinkError: The sink cannot take it.
        """
        with self.lock:
            versions = self._versions
            is_certain = versions.look(observation.call.weights, observation.seconds)
            version = versions.present
            if is_certain and self._held:
                self._settle()
        computed = None
        if self._kept is None:
            computed = self._compute(observation, version, is_certain)
        with self.lock:
            if self._versions is not versions:
                # The trace was emptied meanwhile, and its weights are numbered anew.
                is_certain = self._versions.look(observation.call.weights, observation.seconds)
                version = self._versions.present
                if self._kept is None:
                    computed = self._compute(observation, version, is_certain)
            return self._number(observation, tag, names, version, is_certain, computed)

    def expect_changes(self) -> None:
        """Compare the weights at the next call, whatever that costs."""
        with self.lock:
            self._versions.expect_changes()

    def settle(self) -> None:
        """Find out which weights the calls used that wait, and hand them on.

        Raises:
            SinkError: The sink cannot take them.
        """
        with self.lock:
            if self._held:
                self._versions.recheck()
                self._settle()

    def _settle(self) -> None:
        """Decide which weights the calls used that wait, every byte having been compared now."""
        held, self._held = self._held, []
        present = self._versions.present
        changed = [each for each in held if each.version is not present]
        try:
            if changed:
                self._announce()
                records = {each.number: self._record_of(each) for each in self._versions.known}
                for each in changed:
                    each.block = self._decide(each, records)
        finally:
            for each in held:
                each.is_settled = True
        self._pending.drain()
        if self._options.gates == "deferred":
            # Others are found out when their gates are made.
            for each in changed:
                self.doubts += find_doubts(self.description, each.block, each.number)

    def _decide(self, held: _Held, versions: Mapping[int, Weights]) -> Block:
        """Return a call with the weights that lead to its states, and with what was found."""
        # Its own version first: of two that fit, the weights differ where nothing depends on it.
        numbers = sorted(versions, key=lambda number: number != held.version.number)
        module = defer(replace(self.description, sites=_all_units(self.description)))
        chosen = choose_version(module, held.evidence, [versions[each] for each in numbers])
        if isinstance(held.block, CopiedBlock):
            return replace(
                held.block,
                weights=chosen.weights.version,
                of_version=chosen.weights,
                doubt=chosen.doubt,
            )
        sites = {
            suffix: replace(
                rows,
                residual=max(chosen.checks[suffix][0], chosen.doubt),
                tolerance=chosen.checks[suffix][1],
            )
            for suffix, rows in held.block.sites.items()
        }
        return replace(held.block, weights=chosen.weights.version, sites=sites)

    def _compute(self, observation: Observation, version: Version, is_certain: bool) -> _Computed:
        """Work out the rows of a call with the copies of the weights that it is thought to use."""
        taken = self._take(observation, version, is_certain)
        if not self._is_replayed(observation):
            return _Computed(taken, version, is_certain)
        if all(check.residual <= check.tolerance for _, check in taken.values()):
            return _Computed(taken, version, True)
        if not is_certain:
            with self.lock:
                self._versions.compare(observation.call.weights)
                present = self._versions.present
            if present is not version:
                return _Computed(self._take(observation, present, True), present, True)
        return _Computed(taken, version, True)

    def _is_replayed(self, observation: Observation) -> bool:
        """Whether the gates of all sites were computed from the weights, and lead to the states."""
        return (
            self._options.gates == "inline"
            and not any(layer.gates for layer in observation.layers)
            and all({*GATES} & {*each.quantities} for each in self.description.sites)
        )

    def _number(
        self,
        observation: Observation,
        tag: str | None,
        names: Sequence[Hashable] | None,
        version: Version,
        is_certain: bool,
        computed: _Computed | None,
    ) -> Recorded:
        """Number a call and hand it on. If that fails, the numbers are not used up."""
        lengths = observation.steps.lengths
        assignment = self._continuity.assign(*_ends(observation), lengths, names)
        if self._kept is None:
            numbers = assignment.roots.view(np.int64)
            recorded = Recorded(self._index, assignment, lengths, numbers)
            assert computed is not None
            block = self._block(observation, assignment, tag, computed)
            number = self._continuity.accept(partial(self._hand_on, observation, block, computed))
            return recorded._replace(block=block, number=number)
        kept = self._kept.of(assignment, lengths)
        bounds = self._kept.start, self._kept.stop
        recorded = Recorded(self._index, assignment, lengths, kept.numbers, *bounds)
        hand_on: Callable[[], int | None] = _nothing
        if kept.assignment is not None:
            layers = [each.site.layer for each in self._sites]
            narrowed = only_kept(observation, kept, layers)
            computed = self._compute(narrowed, version, is_certain)
            block = self._block(narrowed, kept.assignment, tag, computed)
            hand_on = partial(self._hand_on, narrowed, block, computed)
            recorded = recorded._replace(block=block)
        number = self._continuity.accept(hand_on)
        self._kept.accept(kept, self._continuity)
        return recorded._replace(number=number)

    def _hand_on(self, observation: Observation, block: Block, computed: _Computed) -> int | None:
        """Hand a call on, or have it wait, its weights having been announced if they are new."""
        self._limits.take(partial(self._bytes, block))
        self._announce()
        evidence = None
        if self._has_gates and not computed.is_certain:
            evidence = self._evidence(observation, block)
        if evidence is None:
            return self._pending.append(block)
        held = _Held(block, computed.version, evidence)
        self._held.append(held)
        self._pending.hold(held)
        return None

    def _announce(self) -> None:
        """Hand on the versions of the weights that were found and not handed on yet."""
        while self._versions.made:
            self._pending.append_now(self._record_of(self._versions.made[0]))
            self._versions.made.popleft()

    def _evidence(self, observation: Observation, block: Block) -> CopiedBlock | None:
        """Return what the gates of a call follow from, for all units; None if it cannot be had."""
        has_gates = any({*GATES} & {*each.rows} for each in block.sites.values())
        if isinstance(block, CopiedBlock) and not has_gates:
            return block
        try:
            if self._options.gates == "deferred":
                # It has everything but the states that its sequences started from.
                starts = {each.site.suffix: each.starts(observation) for each in self._sites}
                return self._as_copied(block, block.sites, starts)
            return self._copied(observation, block)
        except UnsupportedError:
            return None

    def _copied(self, observation: Observation, block: Block) -> CopiedBlock:
        inputs: dict[int, Array] = {}
        sites, starts = {}, {}
        for each in self._evidence_sites:
            rows, check = each.take(observation, inputs, False)
            starts[each.site.suffix] = each.starts(observation)
            sites[each.site.suffix] = SiteRows(rows, starts[each.site.suffix][:0], *check)
        return self._as_copied(block, sites, starts)

    def _as_copied(
        self, block: Block, sites: Mapping[str, SiteRows], starts: Mapping[str, Array]
    ) -> CopiedBlock:
        return CopiedBlock(
            block.module,
            block.time,
            block.tag,
            block.training,
            block.weights,
            block.steps,
            block.sequences,
            sites,
            block.forks,
            block.origins,
            starts,
        )

    @cached_property
    def _evidence_sites(self) -> list[SiteRecorder]:
        whole = replace(self.description, sites=_all_units(self.description))
        module = defer(whole)
        rows = RowType(module, chosen=True, copied=True)
        selection = replace(self._selection, description=whole)
        options = Options(gates="deferred")
        return [SiteRecorder(selection, site, options, rows) for site in module.sites]

    def _block(
        self,
        observation: Observation,
        assignment: Assignment,
        tag: str | None,
        computed: _Computed,
    ) -> Block:
        starts = {each.site.suffix: each.starts(observation) for each in self._copying}
        sites = {}
        for each in self._sites:
            rows, check = computed.taken[each.site.suffix]
            begun = each.begun(observation, assignment, starts.get(each.site.suffix))
            sites[each.site.suffix] = SiteRows(rows, begun, *check)
        fields = (
            self._index,
            time.time(),
            tag,
            observation.training,
            computed.version.number,
            observation.steps.lengths.astype(np.uint32),
            assignment.sequences,
            sites,
            assignment.forks,
            assignment.origins,
        )
        if not self._copying:
            return Block(*fields)
        weights = self._record_of(computed.version)
        return CopiedBlock(*fields, starts, self._rows.take_ready(), weights)

    def _bytes(self, block: Block) -> int:
        """Bytes of what is stored of a call in the end, with the weights that it announces."""
        module, rows = self.description, int(block.steps.sum())
        width = sum(
            module.unit_count(site) * len([name for name in site.quantities if name != "input"])
            for site in module.sites
        )
        # Both directions of a layer share its input.
        inputs = {s.layer: s.input_size for s in module.sites if "input" in s.quantities}
        begun = sum(each.initial.size for each in block.sites.values())
        values = rows * (width + sum(inputs.values())) + begun
        announced = sum(self._record_of(each).nbytes for each in self._versions.made)
        return values * np.dtype(module.dtype).itemsize + announced

    def _take(self, observation: Observation, version: Version, is_certain: bool) -> Taken:
        inputs: dict[int, Array] = {}
        call = observation.call._replace(weights=version.weights)
        observation = observation._replace(call=call)
        return {
            each.site.suffix: each.take(observation, inputs, is_certain) for each in self._sites
        }

    def _record_of(self, version: Version) -> Weights:
        """Return a version as it is stored: the weights of the recorded sites."""
        found = self._records.get(version.number)
        if found is None:
            found = self._records[version.number] = self._made_record(version)
            while len(self._records) > KEPT_VERSIONS + 1:
                del self._records[next(iter(self._records))]
        return found

    def _made_record(self, version: Version) -> Weights:
        dtype = self.description.weights_dtype
        directions = 2 if self.description.bidirectional else 1
        each = 4 if self.description.bias else 2
        sites = {}
        for site in self.description.sites:
            first = (site.layer * directions + site.reverse) * each
            tensors = zip(WEIGHTS, version.weights[first : first + each], strict=False)
            sites[site.suffix] = {
                name: to_numpy(tensor).astype(dtype, copy=False) for name, tensor in tensors
            }
        return Weights(self._index, version.number, sites)


def _nothing() -> None:
    pass


def _all_units(module: Module) -> tuple[Site, ...]:
    """The sites of a module with all of their units and gates."""
    return tuple(
        replace(site, units=None, quantities=GATES + ("hidden",), derived=())
        for site in module.sites
    )


def _ends(observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """Return the states before and after a call, (B, L * H), where one can lead to the other.

    The reverse direction ends at a sequence's first step, so nothing goes on from there.
    """
    call, steps = observation.call, observation.steps
    if call.bidirectional:
        return None, None
    final = _side_by_side([steps.final(each.output, reverse=False) for each in observation.layers])
    return _side_by_side([steps.in_batch_order(state) for state in call.initial]), final


def _side_by_side(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, -1)
