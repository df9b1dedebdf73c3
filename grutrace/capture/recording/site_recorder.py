"""What one call did at one site, as rows: harvested, replayed, or just copied.

T steps, B sequences in a batch, I input size, H hidden size, N rows of a call, U units kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.observation import Observation
from grutrace.capture.options import Options
from grutrace.capture.recording.sequence_tracking import Assignment
from grutrace.capture.recording.tensor_copy import RowType
from grutrace.capture.selection import Selection, partial_shadow
from grutrace.errors import UnsupportedError
from grutrace.gru.kernel import CellWeights, Layer
from grutrace.gru.kernel_gates import NOTHING, Asked, Harvest, Wish
from grutrace.gru.layout import Steps, copy_rounded
from grutrace.gru.replay import Columns, OneStep, Shadow, replay_calls
from grutrace.gru.residual import prove
from grutrace.gru.tolerance import coarsest, largest, precision, rounded, spacing, tolerance
from grutrace.records import GATES, Array, Site

#: What part of a replay's cost a harvest may be, if the replay would be another thread's.
SHARE = 1 / 3

Values = TypeVar("Values", Tensor, Array)


class Check(NamedTuple):
    """The last fields of `SiteRows`."""

    residual: float
    tolerance: float
    precision: float


class Replayed(NamedTuple):
    """Gates of a call that were replayed together with those of others.

    Attributes:
        rows: By name, (B, H).
        check: What a check of them needs.
    """

    rows: dict[str, Array]
    check: Check


class _KeptRows:
    """Some rows of weights, taken anew only for another version of the weights."""

    def __init__(self, take: Callable[[CellWeights], CellWeights]) -> None:
        self._take = take
        # In one, so that another thread never sees rows of other weights.
        self._latest: tuple[Tensor, CellWeights] | None = None

    def of(self, weights: CellWeights) -> CellWeights:
        """Return the rows of these weights, which nobody changes."""
        latest = self._latest
        if latest is None or latest[0] is not weights.weight_ih:
            latest = weights.weight_ih, self._take(weights)
            self._latest = latest
        return latest[1]


class SiteRecorder:
    """Makes the rows of one site.

    Args:
        selection: The module, and what is recorded of it.
        site: Which of its sites.
        options: Of the tracer.
        rows: The type of the rows.

    Attributes:
        asked: Which of the kernel's own gates are wanted, where they can be had.
    """

    def __init__(self, selection: Selection, site: Site, options: Options, rows: RowType) -> None:
        self.site, self._rows = site, rows
        self._inline = options.gates == "inline"
        # What is stored in the end; of gates in the background, `site` says what they follow from.
        stored = next(e for e in selection.description.sites if e.suffix == site.suffix)
        self._wanted = {"hidden", *stored.quantities}
        gates = [name for name in GATES if name in (*stored.quantities, *stored.derived)]
        every = range(selection.description.hidden_size)
        wish = Wish.of(gates, site.units or every)
        self.asked, self._proof = NOTHING, every
        if wish is not None and (self._inline or (options.gates == "background" and gates)):
            share = 1.0 if self._inline else SHARE
            self.asked, self._proof = Asked(wish.columns, share), wish.proof
        self._shadow = Shadow(None, site.layer, site.reverse, rows.stored)
        self._part = partial_shadow(selection.description, site)
        self._kept = None if self._part is None else _KeptRows(self._part.rows)
        self._units = None if site.units is None else Columns(site.units)
        units = selection.description.unit_count(site)
        self._no_states = np.empty((0, units), rows.dtype)

    def take(
        self,
        observation: Observation,
        inputs: dict[int, Array],
        is_certain: bool,
        replayed: Replayed | None = None,
    ) -> tuple[dict[str, Array], Check]:
        """Return the rows of a call, by quantity, and what a check needs.

        Args:
            observation: The call.
            inputs: Rows that were made of the layers' inputs; what is made of one is added, since
                both directions of a layer read the same.
            is_certain: Whether the weights are known to be those that the kernel used.
            replayed: The gates, where they were replayed together with those of other calls.

        Raises:
            UnsupportedError: What the layer read is not recorded, and can no longer be told.
        """
        steps, site = observation.steps, self.site
        quantities: Collection[str] = site.quantities
        layer = observation.layers[site.layer]
        hidden = layer.output
        if observation.call.directions > 1:
            hidden = hidden.chunk(2, -1)[int(site.reverse)]
        if self.asked.columns and layer.gates is not None:
            harvest = layer.gates[int(site.reverse)]
            if self._inline:
                rows, check = self._harvest(observation, harvest, hidden)
            else:
                # Whoever stores them proves them.
                rows = self._rows_of(harvest, steps)
                known = spacing(coarsest(hidden.dtype, harvest.dtype))
                check, quantities = Check(math.nan, math.nan, known), self._wanted
        elif not self._inline:
            rows, check = dict[str, Array](), self._copy(observation, layer, hidden, is_certain)
        elif replayed is not None:
            rows, check = replayed
        else:
            rows, check = self._replay(observation, layer, hidden)
        if "hidden" in quantities and "hidden" not in rows:
            is_ours = observation.is_kept and self._units is None
            rows["hidden"] = self._rows.of_steps(steps, self._of_units(hidden), is_ours=is_ours)
        if "input" in quantities:
            if site.layer not in inputs:
                kept = observation.is_kept
                inputs[site.layer] = self._rows.of_steps(steps, layer.input, is_ours=kept)
            rows["input"] = inputs[site.layer]
        return rows, check

    def replay_together(self, observations: Sequence[Observation]) -> list[Replayed | None]:
        """Replay several calls of one step at once: each gives the same bits as on its own.

        Args:
            observations: Calls with the same weights, of the same shapes and types, not more than
                `grutrace.gru.replay.calls_at_once`, of which nothing was harvested.

        Returns:
            Of each call, what `take` is to be given; None where it has to be replayed on its own.
        """
        site, calls = self.site, []
        for each in observations:
            layer, initial = (
                each.layers[site.layer],
                each.call.cell_initial(site.layer, site.reverse),
            )
            hidden = layer.output
            if each.call.directions > 1:
                hidden = hidden.chunk(2, -1)[int(site.reverse)]
            calls.append(OneStep(layer.input[0], hidden[0], initial))
        weights = observations[0].call.cell_weights(site.layer, site.reverse)
        gates, checks = replay_calls(calls, weights)
        rows = {}
        for name in GATES:
            if name in site.quantities:
                values = getattr(gates, name)
                rows[name] = np.empty(values.shape, self._rows.dtype)
                copy_rounded(torch.from_numpy(rows[name]), values)
        return [
            None
            if check is None
            else Replayed({name: each[number] for name, each in rows.items()}, Check(*check))
            for number, check in enumerate(checks)
        ]

    @property
    def replays_whole(self) -> bool:
        """Whether the gates of all units are replayed with the call, if they are not harvested."""
        return self._inline and self._part is None

    def begun(
        self, observation: Observation, assignment: Assignment, copied: Array | None = None
    ) -> Array:
        """Return the state that each sequence that a call began started from, (begun, U).

        Args:
            observation: The call.
            assignment: Its sequences.
            copied: What `starts` returned, if it was asked already: all of them may be the same.
        """
        count = np.count_nonzero(assignment.begun)
        if not count:
            return self._no_states
        if count == len(assignment.begun):
            return self.starts(observation) if copied is None else copied
        starts = self._starts(observation)
        return self._rows.of(starts[torch.from_numpy(assignment.begun).to(starts.device)])

    def starts(self, observation: Observation) -> Array:
        """Return the state that each sequence of a call started from, (B, U), in its order."""
        return self._rows.of(self._starts(observation))

    def _starts(self, observation: Observation) -> Tensor:
        initial = observation.call.cell_initial(self.site.layer, self.site.reverse)
        return observation.steps.in_batch_order(self._of_units(initial))

    def _copy(
        self, observation: Observation, layer: Layer, hidden: Tensor, is_certain: bool
    ) -> Check:
        call, site = observation.call, self.site
        if call.drops and site.layer and site.derived and "input" not in site.quantities:
            raise UnsupportedError(
                f"{site.name} had no dropout before it when it was attached, and has now: what "
                "it reads is not kept, so its gates could not be derived. Make a new tracer"
            )
        weight = call.cell_weights(site.layer, site.reverse).weight_ih
        # See docs/format.md: nothing was computed, but the weights were compared.
        allowed = 0.0 if is_certain else math.nan
        return Check(math.nan, allowed, precision(layer.input, hidden, weight))

    def _rows_of(self, harvest: Harvest, steps: Steps) -> dict[str, Array]:
        """Return what was taken of each gate, (N, U)."""
        return {
            name: steps.as_rows(
                _at(harvest.gates[name], harvest.columns[name], columns), self._rows.dtype
            )
            for name, columns in self.asked.columns.items()
        }

    def _harvest(
        self, observation: Observation, harvest: Harvest, hidden: Tensor
    ) -> tuple[dict[str, Array], Check]:
        steps, site = observation.steps, self.site
        found = self._rows_of(harvest, steps)
        initial = observation.call.cell_initial(site.layer, site.reverse)
        states = self._rows.of_steps(steps, self._of_units(hidden))
        proof = self._proof
        units = slice(proof.start, proof.stop, proof.step)
        proven = states
        if len(proof) < states.shape[-1]:
            proven = self._rows.of_steps(steps, hidden[..., units])
        update, candidate = (
            _at(found[name], self.asked.columns[name], proof) for name in ("update", "candidate")
        )
        residual = prove(
            update,
            candidate,
            proven,
            steps.in_batch_order(initial[..., units]),
            steps.lengths,
            reverse=site.reverse,
        )
        kept = {name: found[name] for name in GATES if name in site.quantities}
        if "hidden" in site.quantities:
            kept["hidden"] = states
        # The gates being the kernel's own, there are no products that were made in another order.
        size = max(1.0, largest(initial))
        computed, stored = coarsest(hidden.dtype, harvest.dtype), self._rows.stored
        allowed = tolerance(computed, 0, size, 0.0, 0.0)
        if spacing(stored) > spacing(computed):
            allowed += rounded(stored, size, 0.0, 0.0)
        return kept, Check(residual, allowed, spacing(computed))

    def _replay(
        self, observation: Observation, layer: Layer, hidden: Tensor
    ) -> tuple[dict[str, Array], Check]:
        call, site, steps = observation.call, self.site, observation.steps
        weights = call.cell_weights(site.layer, site.reverse)
        initial = call.cell_initial(site.layer, site.reverse)
        given = layer.input, hidden, initial, steps
        if self._part is not None and self._kept is not None:
            part = self._part.replay(*given, self._kept.of(weights))
            check = Check(part.residual, part.tolerance, part.precision)
            return {
                name: self._rows.of_steps(steps, gate) for name, gate in part.gates.items()
            }, check
        size, dtype = hidden.shape[-1], self._rows.dtype
        rooms = {name: steps.room(size, dtype) for name in GATES if name in site.quantities}
        whole = self._shadow.replay(*given, weights, rooms)
        check = Check(whole.residual, whole.tolerance, whole.precision)
        return {name: room.rows() for name, room in rooms.items()}, check

    def _of_units(self, values: Tensor) -> Tensor:
        """(..., U) of (..., H). May share memory."""
        return values if self._units is None else self._units.of(values)


def _at(values: Values, there: range, asked: range) -> Values:
    """(..., asked) of (..., there), of which they are a part."""
    if there == asked:
        return values
    places = [there.index(asked[0]), there.index(asked[-1])]
    return values[..., places[0] : places[1] + 1 : max(1, asked.step // there.step)]
