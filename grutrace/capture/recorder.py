"""From what was observed in one module to the records that a sink takes."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.capture.continuity import Assignment, Continuity
from grutrace.capture.kept import KeptSteps, only_kept
from grutrace.capture.limits import Limits
from grutrace.capture.observe import Observation
from grutrace.capture.options import Options
from grutrace.capture.rowtype import RowType, to_numpy
from grutrace.capture.selection import partial_shadow
from grutrace.capture.sites import Selection
from grutrace.capture.versions import KeptRows, WeightVersions
from grutrace.errors import UnsupportedError
from grutrace.gru.kernel import CellWeights, Layer
from grutrace.gru.partial import Columns, PartialReplay, PartialShadow
from grutrace.gru.rounding import precision
from grutrace.gru.shadow import Shadow
from grutrace.gru.steps import Steps
from grutrace.record import WEIGHTS, Array, Block, Record, Site, SiteRows, Weights


@dataclass(frozen=True)
class Recorded:
    """A call that was heard, and what of it has gone to the sink.

    Attributes:
        module: Place of the module in the header.
        assignment: Its sequences, as they were told, and where they stood before it.
        lengths: (B,) all steps that it made of each.
        numbers: (B,) the number of each sequence in the trace; -1 for none.
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

    @classmethod
    def whole(cls, module: int, assignment: Assignment, lengths: npt.NDArray[np.int64]) -> Recorded:
        """A call of which all steps are kept."""
        return cls(module, assignment, lengths, assignment.sequences.astype(np.int64))


class _Check(NamedTuple):
    """The last fields of `SiteRows`."""

    residual: float
    tolerance: float
    precision: float


class _Part:
    """Replays a part of a site, and keeps the rows of the weights that it takes."""

    def __init__(self, shadow: PartialShadow) -> None:
        self._shadow, self._rows = shadow, KeptRows(shadow.rows)

    def replay(
        self, input: Tensor, hidden: Tensor, initial: Tensor, steps: Steps, weights: CellWeights
    ) -> PartialReplay:
        """As for `PartialShadow.replay`, with the whole weights."""
        return self._shadow.replay(input, hidden, initial, steps, self._rows.of(weights))


class ModuleRecorder:
    """Turns the observations of one module into blocks, and announces its weights.

    Args:
        index: The module's place in the header.
        selection: The module, and what is recorded of it.
        append: Where records go.
        options: Of the tracer. Where gates are deferred, nothing is replayed but only copied.
        limits: How much the trace may become.
    """

    def __init__(
        self,
        index: int,
        selection: Selection,
        append: Callable[[Record], None],
        options: Options,
        limits: Limits,
    ) -> None:
        self._index = index
        self._deferred = options.gates == "deferred"
        self._limits = limits
        self.description = selection.description
        self._append = append
        stored: torch.dtype = getattr(torch, self.description.dtype)
        self._shadows = {
            site.suffix: Shadow(selection.module, site.layer, site.reverse, stored)
            for site in self.description.sites
        }
        self._parts = {
            site.suffix: _Part(shadow)
            for site in self.description.sites
            if (shadow := partial_shadow(self.description, site)) is not None
        }
        self._units = {
            site.suffix: Columns(site.units)
            for site in self.description.sites
            if site.units is not None
        }
        self._continuity = Continuity()
        steps = options.steps
        self._kept = None if steps is None else KeptSteps(steps.start, steps.stop)
        self._versions = WeightVersions()
        self._lock = threading.Lock()
        self._rows = RowType(self.description, chosen=options.dtype is not None)

    @torch.no_grad()
    def record(self, observation: Observation, tag: str | None) -> Recorded:
        """Append an observed call, replayed or, where gates are derived later, copied.

        Raises:
            UnsupportedError: What a layer read is not recorded, and can no longer be told.
            LimitReached: It goes beyond what the trace may become. Nothing was recorded.
        """
        lengths = observation.steps.lengths
        taken = self._take(observation) if self._kept is None else None
        with self._lock, self._undone_on_error("_continuity"), self._undone_on_error("_kept"):
            assignment = self._continuity.assign(*_ends(observation), lengths)
            if self._kept is None:
                recorded = Recorded.whole(self._index, assignment, lengths)
                kept: Assignment | None = assignment
            else:
                found = self._kept.of(assignment, lengths)
                bounds = self._kept.start, self._kept.stop
                recorded = Recorded(self._index, assignment, lengths, found.numbers, *bounds)
                kept = found.assignment
                if kept is not None:
                    layers = [site.layer for site in self.description.sites]
                    observation = only_kept(observation, found, layers)
                    taken = self._take(observation)
            if kept is None or taken is None:
                return recorded
            with self._undone_on_error("_versions"):
                weights = self._new_weights(observation)
                block = self._block(observation, kept, tag, *taken)
                self._limits.take(block, weights)
                if weights is not None:
                    self._append(weights)
            self._append(block)
        return replace(recorded, block=block)

    def _block(
        self,
        observation: Observation,
        assignment: Assignment,
        tag: str | None,
        rows: dict[str, dict[str, Array]],
        checks: dict[str, _Check],
    ) -> Block:
        return Block(
            module=self._index,
            time=time.time(),
            tag=tag,
            training=observation.training,
            weights=self._versions.count - 1,
            steps=observation.steps.lengths.astype(np.uint32),
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

    @contextmanager
    def _undone_on_error(self, name: str) -> Iterator[None]:
        """Forget what an attribute has counted if the record of it does not reach the sink."""
        before = copy.copy(getattr(self, name))
        try:
            yield
        except BaseException:
            setattr(self, name, before)
            raise

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
            gates, checks[site.suffix] = self._replay(observation, site, layer, hidden)
            kept = {
                name: self._rows.of(steps.in_sequences(values))
                for name, values in gates.items()
                if name in site.quantities
            }
            if "hidden" in site.quantities:
                states = self._of_units(site, hidden)
                kept["hidden"] = self._rows.of(_copied(steps.in_sequences(states), hidden))
            if "input" in site.quantities:
                # Both directions of a layer read the same rows, so they share one array.
                if site.layer not in inputs:
                    copied = _copied(steps.in_sequences(layer.input), layer.input)
                    inputs[site.layer] = self._rows.of(copied)
                kept["input"] = inputs[site.layer]
            rows[site.suffix] = kept
        return rows, checks

    def _replay(
        self, observation: Observation, site: Site, layer: Layer, hidden: Tensor
    ) -> tuple[dict[str, Tensor], _Check]:
        """Return the gates, none where they are derived when read, and what a check needs."""
        call = observation.call
        weights = call.cell_weights(site.layer, site.reverse)
        if self._deferred:
            if call.drops and site.layer and site.derived and "input" not in site.quantities:
                raise UnsupportedError(
                    f"{site.name} had no dropout before it when it was attached, and has now: what "
                    "it reads is not kept, so its gates could not be derived. Make a new tracer"
                )
            found = precision(layer.input, hidden, weights.weight_ih)
            return {}, _Check(math.nan, math.nan, found)
        initial = call.cell_initial(site.layer, site.reverse)
        given = layer.input, hidden, initial, observation.steps
        if site.suffix in self._parts:
            part = self._parts[site.suffix].replay(*given, weights)
            return part.gates, _Check(part.residual, part.tolerance, part.precision)
        replay = self._shadows[site.suffix].replay(*given, weights)
        return replay.gates._asdict(), _Check(replay.residual, replay.tolerance, replay.precision)

    def _of_units(self, site: Site, values: Tensor) -> Tensor:
        """(..., U) of (..., H). May share memory."""
        columns = self._units.get(site.suffix)
        return values if columns is None else columns.of(values)

    def _initial(self, observation: Observation, site: Site, assignment: Assignment) -> Array:
        if not assignment.begun.any():
            return np.empty((0, self.description.unit_count(site)), self.description.dtype)
        initial = self._of_units(site, observation.call.cell_initial(site.layer, site.reverse))
        in_order = self._rows.of(observation.steps.in_batch_order(initial))
        return in_order[assignment.begun]

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


def _copied(rows: Tensor, original: Tensor) -> Tensor:
    """Return rows that do not change when the model changes its own tensor in place."""
    shares = rows.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()
    return rows.clone() if shares else rows


def _direction(output: Tensor, reverse: bool, directions: int) -> Tensor:
    """Return one direction's part of a layer's output, (..., H) of (..., D * H)."""
    return output.chunk(directions, -1)[int(reverse)]


def _ends(observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """Return the states before and after a call, (B, L * H), where one can lead to the other.

    The reverse direction ends at a sequence's first step, so nothing goes on from there.
    """
    call, steps = observation.call, observation.steps
    if call.bidirectional:
        return None, None
    finals = [steps.final(layer.output, reverse=False) for layer in observation.layers]
    final = finals[0] if len(finals) == 1 else torch.cat(finals, -1)
    if not observation.given_state:
        return None, final
    initial = torch.cat([steps.in_batch_order(state) for state in call.initial], -1)
    return initial, final
