"""From what was observed in one module to the records that a sink takes."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.continuity import Assignment, Continuity
from grutrace.capture.observe import Observation
from grutrace.capture.sites import Selection, numpy_type
from grutrace.capture.versions import WeightVersions
from grutrace.errors import GrutraceWarning, UnsupportedError
from grutrace.gru.harvest import Harvest, is_recognized
from grutrace.gru.kernel import Layer
from grutrace.gru.proof import prove
from grutrace.gru.rounding import coarsest, largest, precision, spacing, tolerance
from grutrace.gru.shadow import Shadow
from grutrace.record import WEIGHTS, Array, Block, Record, Site, SiteRows, Weights


@dataclass(frozen=True)
class Recorded:
    """A call that has gone to the sink: its block, and where its sequences stood before it."""

    block: Block
    assignment: Assignment


class _Check(NamedTuple):
    """The last fields of `SiteRows`."""

    residual: float
    tolerance: float
    precision: float


class ModuleRecorder:
    """Turns the observations of one module into blocks, and announces its weights.

    Args:
        index: The module's place in the header.
        selection: The module, and what is recorded of it.
        append: Where records go.
        deferred: Whether to replay nothing: what is recorded is copied.
    """

    def __init__(
        self,
        index: int,
        selection: Selection,
        append: Callable[[Record], None],
        *,
        deferred: bool = False,
    ) -> None:
        self._index = index
        self._deferred = deferred
        self.description = selection.description
        self._append = append
        stored: torch.dtype = getattr(torch, self.description.dtype)
        self._stored, self._dtype = stored, np.dtype(self.description.dtype)
        self._no_states = np.empty((0, self.description.hidden_size), self._dtype)
        self._shadows = {
            site.suffix: Shadow(selection.module, site.layer, site.reverse, stored)
            for site in self.description.sites
        }
        #: Whether the kernel's own gates are wanted, where they can be had.
        self.harvests = not deferred and is_recognized()
        self._continuity = Continuity()
        self._versions = WeightVersions()
        self._lock = threading.Lock()
        self._rounds = False

    def record(self, observation: Observation, tag: str | None) -> Recorded:
        """Append an observed call, replayed or, where gates are derived later, copied.

        Raises:
            UnsupportedError: What a layer read is not recorded, and can no longer be told.
        """
        taken = self._take(observation)
        with self._lock:
            return self._store(observation, tag, *taken)

    def _store(
        self,
        observation: Observation,
        tag: str | None,
        rows: dict[str, dict[str, Array]],
        checks: dict[str, _Check],
    ) -> Recorded:
        """Number a call and append it; what was numbered is forgotten if that fails."""
        self._announce_weights(observation)
        lengths = observation.steps.lengths
        before = self._continuity.state
        try:
            assignment = self._continuity.assign(*_ends(observation), lengths)
            block = Block(
                module=self._index,
                time=time.time(),
                tag=tag,
                training=observation.training,
                weights=self._versions.count - 1,
                steps=lengths.astype(np.uint32),
                sequences=assignment.sequences,
                forks=assignment.forks,
                sites={
                    site.suffix: SiteRows(
                        rows[site.suffix],
                        self._initial(observation, site, assignment),
                        *checks[site.suffix],
                    )
                    for site in self.description.sites
                },
            )
            self._append(block)
        except BaseException:
            self._continuity.state = before
            raise
        return Recorded(block, assignment)

    def _take(
        self, observation: Observation
    ) -> tuple[dict[str, dict[str, Array]], dict[str, _Check]]:
        rows: dict[str, dict[str, Array]] = {}
        checks: dict[str, _Check] = {}
        inputs: dict[int, Array] = {}
        call, steps = observation.call, observation.steps
        for site in self.description.sites:
            layer = observation.layers[site.layer]
            hidden = _direction(layer.output, site.reverse, call.directions)
            self._mind_rounding(hidden)
            if layer.gates is not None and self.harvests:
                gates, checks[site.suffix] = self._harvest(observation, site, layer, hidden)
            else:
                gates, checks[site.suffix] = self._replay(observation, site, layer, hidden)
            kept = {name: gates[name] for name in site.quantities if name in gates}
            if "hidden" in site.quantities and "hidden" not in kept:
                kept["hidden"] = steps.in_sequences(hidden, self._dtype)
            if "input" in site.quantities:
                # Both directions of a layer read the same rows, so they share one array.
                if site.layer not in inputs:
                    inputs[site.layer] = steps.in_sequences(layer.input, self._dtype)
                kept["input"] = inputs[site.layer]
            rows[site.suffix] = kept
        return rows, checks

    def _harvest(
        self, observation: Observation, site: Site, layer: Layer, hidden: Tensor
    ) -> tuple[dict[str, Array], _Check]:
        """Return the kernel's own gates and the states, and what a check needs."""
        steps, dtype = observation.steps, self._dtype
        harvest = cast("list[Harvest]", layer.gates)[int(site.reverse)]
        wanted = {"update", "candidate", *site.quantities}
        rows = {
            name: steps.joined(values, dtype)
            for name, values in harvest._asdict().items()
            if name in wanted
        }
        rows["hidden"] = steps.in_sequences(hidden, dtype)
        initial = observation.call.cell_initial(site.layer, site.reverse)
        found = prove(
            rows["update"],
            rows["candidate"],
            rows["hidden"],
            steps.in_batch_order(initial),
            steps.lengths,
            reverse=site.reverse,
        )
        computed = coarsest(self._stored, hidden.dtype)
        allowed = tolerance(computed, 0, max(1.0, largest(initial)), 0.0, 0.0)
        return rows, _Check(found, allowed, spacing(computed))

    def _replay(
        self, observation: Observation, site: Site, layer: Layer, hidden: Tensor
    ) -> tuple[dict[str, Array], _Check]:
        """Return the gates, none where they are derived when read, and what a check needs."""
        call = observation.call
        weights = call.cell_weights(site.layer, site.reverse)
        if self._deferred:
            if call.drops and site.layer and site.derived and "input" not in site.quantities:
                raise UnsupportedError(
                    f"{site.name} had no dropout before it when it was attached, and has now: what "
                    "it reads is not kept, so its gates could not be derived. Make a new tracer"
                )
            found = precision(layer.input, hidden, weights.weight_ih, self._stored)
            return {}, _Check(math.nan, math.nan, found)
        replay = self._shadows[site.suffix].replay(
            layer.input,
            hidden,
            call.cell_initial(site.layer, site.reverse),
            observation.steps,
            weights,
        )
        rows = {
            name: observation.steps.in_sequences(values, self._dtype)
            for name, values in replay.gates._asdict().items()
            if name in site.quantities
        }
        return rows, _Check(replay.residual, replay.tolerance, replay.precision)

    def _mind_rounding(self, hidden: Tensor) -> None:
        if hidden.dtype == self._stored or self._rounds:
            return
        computed, kept = numpy_type(hidden.dtype), self._dtype
        if not np.can_cast(computed, kept):
            self._rounds = True
            warnings.warn(
                f"{self.description.path or 'the model'} computes in {computed} by now, and was "
                f"in {kept} when it was attached: its rows are rounded to {kept}",
                GrutraceWarning,
                stacklevel=2,
            )

    def _initial(self, observation: Observation, site: Site, assignment: Assignment) -> Array:
        if not np.count_nonzero(assignment.begun):
            return self._no_states
        initial = observation.call.cell_initial(site.layer, site.reverse)
        in_order = observation.steps.in_batch_order(initial)
        states = np.empty(in_order.shape, self._dtype)
        torch.from_numpy(states).copy_(in_order)
        return states[assignment.begun]

    def _announce_weights(self, observation: Observation) -> None:
        before = self._versions.state
        copies = self._versions.changed(observation.call.weights)
        if copies is None:
            return
        try:
            self._append(self._weights(observation, copies))
        except BaseException:
            self._versions.state = before
            raise

    def _weights(self, observation: Observation, copies: list[Tensor]) -> Weights:
        dtype = self.description.weights_dtype
        each = 4 if observation.call.bias else 2
        directions = observation.call.directions
        sites = {}
        for site in self.description.sites:
            first = (site.layer * directions + site.reverse) * each
            tensors = zip(WEIGHTS, copies[first : first + each], strict=False)
            sites[site.suffix] = {
                name: _to_numpy(tensor).astype(dtype, copy=False) for name, tensor in tensors
            }
        return Weights(self._index, self._versions.count - 1, sites)


def _direction(output: Tensor, reverse: bool, directions: int) -> Tensor:
    """Return one direction's part of a layer's output, (..., H) of (..., D * H)."""
    return output if directions == 1 else output.chunk(directions, -1)[int(reverse)]


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


def _to_numpy(values: Tensor) -> Array:
    values = values.detach().cpu()
    if str(values.dtype).removeprefix("torch.") != numpy_type(values.dtype):
        values = values.float()
    array: Array = values.numpy()
    return array
