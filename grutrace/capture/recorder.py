"""From what was observed in one module to the records that a sink takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.capture.background import CopiedBlock
from grutrace.capture.continuity import Assignment, Continuity
from grutrace.capture.deferral import defer
from grutrace.capture.kept import KeptSteps, only_kept
from grutrace.capture.limits import Limits
from grutrace.capture.observe import Observation
from grutrace.capture.options import Options
from grutrace.capture.rowtype import RowType, to_numpy
from grutrace.capture.site_recorder import Check, SiteRecorder
from grutrace.capture.sites import Selection
from grutrace.capture.versions import WeightVersions
from grutrace.gru.gather import NOTHING, together
from grutrace.gru.harvest import is_recognized
from grutrace.record import WEIGHTS, Array, Block, Record, SiteRows, Weights

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
        block: What has gone to the sink; None if none of its steps is kept.
    """

    module: int
    assignment: Assignment
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    start: int = 0
    stop: int | None = None
    block: Block | None = None


class ModuleRecorder:
    """Turns the observations of one module into blocks, and announces its weights.

    Args:
        index: The module's place in the header.
        selection: The module, and what is recorded of it.
        append: Where records go.
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
        append: Callable[[Record], None],
        options: Options,
        limits: Limits,
        state_memory: int,
    ) -> None:
        self._index, self._limits, self._append = index, limits, append
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
        self._continuity = Continuity(state_memory)
        steps = options.steps
        self._kept = None if steps is None else KeptSteps(steps.start, steps.stop)
        self._versions = WeightVersions()
        self._lock = threading.Lock()
        wishes = [site.asked for site in self._sites]
        # Of some steps the replay costs less than the whole call's harvest.
        wanted = self._kept is None and all(each.columns for each in wishes)
        self.asked = NOTHING
        if wanted and is_recognized():
            self.asked = together(wishes, self.description.hidden_size)

    def record(
        self,
        observation: Observation,
        tag: str | None,
        names: Sequence[Hashable] | None = None,
    ) -> Recorded:
        """Append an observed call: harvested, replayed or, where gates come later, copied.

        Args:
            observation: The call.
            tag: The user's name for this part of the run.
            names: (B,) the user's names of the sequences; None to go by the states.

        Raises:
            UnsupportedError: What a layer read is not recorded, and can no longer be told.
            LimitReached: It goes beyond what the trace may become. Nothing was recorded.
        """
        taken = self._take(observation) if self._kept is None else None
        with self._lock:
            return self._number(observation, tag, taken, names)

    def _number(
        self,
        observation: Observation,
        tag: str | None,
        taken: Taken | None,
        names: Sequence[Hashable] | None,
    ) -> Recorded:
        """Number a call and append it. If that fails, the numbers are not used up."""
        lengths = observation.steps.lengths
        assignment = self._continuity.assign(*_ends(observation), lengths, names)
        if self._kept is None:
            numbers = assignment.roots.view(np.int64)
            recorded = Recorded(self._index, assignment, lengths, numbers)
            block = self._append_block(observation, assignment, tag, taken)
        else:
            kept, block = self._kept.of(assignment, lengths), None
            bounds = self._kept.start, self._kept.stop
            recorded = Recorded(self._index, assignment, lengths, kept.numbers, *bounds)
            if kept.assignment is not None:
                layers = [each.site.layer for each in self._sites]
                narrowed = only_kept(observation, kept, layers)
                block = self._append_block(narrowed, kept.assignment, tag, None)
            self._kept.accept(kept, self._continuity)
        self._continuity.accept()
        return recorded._replace(block=block)

    def _append_block(
        self, observation: Observation, assignment: Assignment, tag: str | None, taken: Taken | None
    ) -> Block:
        block = self._announced(observation, assignment, tag, taken or self._take(observation))
        self._append(block)
        return block

    def _announced(
        self, observation: Observation, assignment: Assignment, tag: str | None, taken: Taken
    ) -> Block:
        """Return the block of a call, its weights having been appended if they are new."""
        before = self._versions.state
        try:
            weights = self._new_weights(observation)
            block = self._block(observation, assignment, tag, taken)
            self._limits.take(partial(self._bytes, block, weights))
            if weights is not None:
                self._append(weights)
        except BaseException:
            self._versions.state = before
            raise
        return block

    def _block(
        self, observation: Observation, assignment: Assignment, tag: str | None, taken: Taken
    ) -> Block:
        starts = {each.site.suffix: each.starts(observation) for each in self._copying}
        sites = {}
        for each in self._sites:
            rows, check = taken[each.site.suffix]
            begun = each.begun(observation, assignment, starts.get(each.site.suffix))
            sites[each.site.suffix] = SiteRows(rows, begun, *check)
        fields = (
            self._index,
            time.time(),
            tag,
            observation.training,
            self._versions.count - 1,
            observation.steps.lengths.astype(np.uint32),
            assignment.sequences,
            sites,
            assignment.forks,
            assignment.origins,
        )
        if not self._copying:
            return Block(*fields)
        return CopiedBlock(*fields, starts, self._rows.take_ready())

    def _bytes(self, block: Block, weights: Weights | None) -> int:
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
        announced = 0 if weights is None else weights.nbytes
        return values * np.dtype(module.dtype).itemsize + announced

    def _take(self, observation: Observation) -> Taken:
        inputs: dict[int, Array] = {}
        return {each.site.suffix: each.take(observation, inputs) for each in self._sites}

    def _new_weights(self, observation: Observation) -> Weights | None:
        """Return the weights of a call if they are a version that was not announced."""
        copies = self._versions.changed(observation.call.weights)
        if copies is None:
            return None
        dtype = self.description.weights_dtype
        each = 4 if observation.call.bias else 2
        directions = observation.call.directions
        sites = {}
        for site in self.description.sites:
            first = (site.layer * directions + site.reverse) * each
            tensors = zip(WEIGHTS, copies[first : first + each], strict=False)
            sites[site.suffix] = {
                name: to_numpy(tensor).astype(dtype, copy=False) for name, tensor in tensors
            }
        return Weights(self._index, self._versions.count - 1, sites)


def _ends(observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """Return the states before and after a call, (B, L * H), where one can lead to the other.

    The reverse direction ends at a sequence's first step, so nothing goes on from there.
    """
    call, steps = observation.call, observation.steps
    if call.bidirectional:
        return None, None
    final = _side_by_side([steps.final(each.output, reverse=False) for each in observation.layers])
    if not observation.given_state:
        return None, final
    return _side_by_side([steps.in_batch_order(state) for state in call.initial]), final


def _side_by_side(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, -1)
