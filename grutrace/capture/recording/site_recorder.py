"""Compute the rows of a call at one site.

The gates are copied from the kernel or replayed. If they are computed later, only the states and
the input are copied.

T steps, B sequences in a batch, I input size, H hidden size, N rows of a call, U recorded units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.arriving_gradients import ArrivingGradients
from grutrace.capture.kernel_calls.observation import Observation
from grutrace.capture.kernel_calls.replacement import GatesAsSet
from grutrace.capture.options import Options
from grutrace.capture.recording.series_buffer import SeriesBuffer
from grutrace.capture.recording.tensor_copy import RowConverter
from grutrace.capture.selection import SelectedModule, make_partial_replay
from grutrace.capture.sequences.assignment import SequenceAssignment
from grutrace.errors import UnsupportedError
from grutrace.gru.gate_copies import NO_GATES, GateCopyPlan, GateRequest
from grutrace.gru.joint_replay import OneStep, calls_at_once, replay_calls
from grutrace.gru.kernel import CellWeights, Layer
from grutrace.gru.kernel_gates import KernelGates
from grutrace.gru.layout import PaddedLayout, SequenceLayout, copy_cast, has_dtype
from grutrace.gru.replay import ColumnSelector, GateReplay
from grutrace.gru.residual import ResidualCheck, check_residual, copy_states, max_residual
from grutrace.gru.tolerance import (
    compute_eps,
    lowest_precision,
    machine_epsilon,
    max_abs,
    storage_rounding,
    tolerance,
)
from grutrace.records import GATES, Array, Site

#: Maximum cost of copying the kernel's gates in the model's thread, relative to the cost of a
#: replay in another thread.
MAX_COPY_COST = 1 / 3

Values = TypeVar("Values", Tensor, Array)


class Replayed(NamedTuple):
    """The gates of a call that was replayed together with other calls.

    Attributes:
        rows: The gates by name, (B, H).
        check: The residual check of the gates.
    """

    rows: dict[str, Array]
    check: ResidualCheck


class SeriesResult(NamedTuple):
    """The rows of n calls of one step at a site.

    Attributes:
        rows: By quantity, (n * B, H or U or I), call by call.
        residuals: (n,) the residual of each call, as in `ResidualCheck`.
        tolerances: (n,) the tolerance of each call.
        precision: The precision of all calls, as in `ResidualCheck`.
    """

    rows: dict[str, Array]
    residuals: npt.NDArray[np.float64]
    tolerances: npt.NDArray[np.float64]
    precision: float


class _CachedWeightRows:
    """Caches selected rows of the weights until the version of the weights changes."""

    def __init__(self, compute_rows: Callable[[CellWeights], CellWeights]) -> None:
        self._compute_rows = compute_rows
        # One attribute, so that another thread never combines rows with the wrong weights.
        self._latest: tuple[Tensor, CellWeights] | None = None

    def of(self, weights: CellWeights) -> CellWeights:
        """Return the selected rows of these weights, which must not change."""
        latest = self._latest
        if latest is None or latest[0] is not weights.weight_ih:
            latest = weights.weight_ih, self._compute_rows(weights)
            self._latest = latest
        return latest[1]


class SiteRecorder:
    """Computes the rows of one site.

    Args:
        selection: The module, with the quantities to record.
        site: The site.
        options: The tracer's options.
        rows: Converts tensors to rows.

    Attributes:
        requested_gates: The kernel's own gates to copy, if that is possible.
    """

    def __init__(
        self, selection: SelectedModule, site: Site, options: Options, rows: RowConverter
    ) -> None:
        self.site, self._rows = site, rows
        self._inline = options.gates == "inline"
        # The quantities stored in the end. If gates are computed in the background, `site` lists
        # the quantities to copy instead.
        stored = next(e for e in selection.description.sites if e.suffix == site.suffix)
        self._stored = {"hidden", *stored.quantities}
        gates = [name for name in GATES if name in (*stored.quantities, *stored.derived)]
        every = range(selection.description.hidden_size)
        plan = GateCopyPlan.of(gates, site.units or every)
        self.requested_gates, self._check_units = NO_GATES, every
        if plan is not None and (self._inline or (options.gates == "background" and gates)):
            max_cost_ratio = 1.0 if self._inline else MAX_COPY_COST
            self.requested_gates, self._check_units = (
                GateRequest(plan.columns, max_cost_ratio),
                plan.check_units,
            )
        self._replay_all = GateReplay(None, site.layer, site.reverse, rows.stored)
        self._partial_replay = make_partial_replay(selection.description, site)
        self._weight_rows = (
            None if self._partial_replay is None else _CachedWeightRows(self._partial_replay.rows)
        )
        self._units = None if site.units is None else ColumnSelector(site.units)
        units = selection.description.unit_count(site)
        self._no_states = np.empty((0, units), rows.dtype)

    def compute_rows(
        self,
        observation: Observation,
        inputs: dict[int, Array],
        is_certain: bool,
        replayed: Replayed | None = None,
        gradients: ArrivingGradients | None = None,
    ) -> tuple[dict[str, Array], ResidualCheck]:
        """Return the rows of a call, by quantity, and their residual check.

        Args:
            observation: The call.
            inputs: Rows of the layers' inputs so far, by layer. This method adds the rows that it
                makes, because both directions of a layer have the same input.
            is_certain: Whether the kernel is known to have used the current weights.
            replayed: The gates, if the call was replayed together with other calls.
            gradients: The gradients that arrived at the call; None if they are not recorded.

        Raises:
            UnsupportedError: The input of the layer is not recorded, and can no longer be computed.
        """
        steps, site = observation.steps, self.site
        quantities: Collection[str] = site.quantities
        layer = observation.layers[site.layer]
        hidden = layer.output
        if observation.call.directions > 1:
            hidden = hidden.chunk(2, -1)[int(site.reverse)]
        gates_as_set = observation.gates_as_set
        if gates_as_set is not None and (directions := gates_as_set[site.layer]) is not None:
            rows, check = self._rows_as_set(observation, directions[int(site.reverse)], hidden)
        elif self.requested_gates.columns and layer.gates is not None:
            kernel_gates = layer.gates[int(site.reverse)]
            if self._inline:
                rows, check = self._gates_from_kernel(observation, kernel_gates, hidden)
            else:
                # They are checked when the background work completes the record.
                rows = self._gate_rows(kernel_gates, steps)
                known = machine_epsilon(lowest_precision(hidden.dtype, kernel_gates.dtype))
                check, quantities = ResidualCheck(math.nan, math.nan, known), self._stored
        elif not self._inline:
            rows, check = dict[str, Array](), self._copy(observation, layer, hidden, is_certain)
        elif replayed is not None:
            rows, check = replayed
        else:
            rows, check = self._replay(observation, layer, hidden)
        if "hidden" in quantities and "hidden" not in rows:
            is_owned = observation.is_kept and self._units is None
            rows["hidden"] = self._rows.convert_steps(
                steps, self._of_units(hidden), is_owned=is_owned
            )
        if "input" in quantities:
            if site.layer not in inputs:
                is_copied = observation.is_kept
                inputs[site.layer] = self._rows.convert_steps(
                    steps, layer.input, is_owned=is_copied
                )
            rows["input"] = inputs[site.layer]
        if gradients is not None and "gradient" in quantities:
            arrived = gradients.at_states(site.layer, site.reverse, steps)
            rows["gradient"] = self._rows.convert_steps(steps, arrived)
        return rows, check

    def replay_together(self, observations: Sequence[Observation]) -> list[Replayed | None]:
        """Replay several calls of one step together. The bits are those of single replays.

        Args:
            observations: At most `grutrace.gru.joint_replay.calls_at_once` calls with the same
                weights, shapes and types, without gates copied from the kernel.

        Returns:
            For each call, the argument `replayed` of `compute_rows`; None if the call must be
            replayed separately.
        """
        site, calls = self.site, []
        for observation in observations:
            layer, initial = (
                observation.layers[site.layer],
                observation.call.cell_initial(site.layer, site.reverse),
            )
            hidden = layer.output
            if observation.call.directions > 1:
                hidden = hidden.chunk(2, -1)[int(site.reverse)]
            calls.append(OneStep(layer.input[0], hidden[0], initial))
        weights = observations[0].call.cell_weights(site.layer, site.reverse)
        rows = self._allocate_gates(len(calls), *calls[0].hidden.shape)
        return [
            None
            if check is None
            else Replayed({name: values[number] for name, values in rows.items()}, check)
            for number, check in enumerate(_replay_steps(calls, weights, rows))
        ]

    def _allocate_gates(self, calls: int, batch: int, size: int) -> dict[str, Array]:
        """Return memory for the stored gates of calls of one step, (calls, B, H) each."""
        return {
            name: np.empty((calls, batch, size), self._rows.dtype)
            for name in GATES
            if name in self.site.quantities
        }

    def compute_series_rows(
        self, series: SeriesBuffer, inputs: dict[int, Array]
    ) -> SeriesResult | None:
        """Return the rows of a series of calls, and the check of each call.

        Args:
            series: Calls of a single layer. All its units are recorded.
            inputs: As for `compute_rows`.

        Returns:
            The rows and checks; None if the calls must be recorded one by one.
        """
        site, count = self.site, series.count
        input, hidden = series.inputs, series.final
        weights = CellWeights(*series.version.weights)
        if self._inline:
            kept = series.gates is not None
            result = self._kept_series(series) if kept else self._replay_series(series, weights)
            if result is None:
                return None
        else:
            certain = np.array(series.are_certain[:count])
            result = SeriesResult(
                {},
                np.full(count, math.nan),
                np.where(certain, 0.0, math.nan),
                compute_eps(input, hidden, weights.weight_ih),
            )
        if "hidden" in site.quantities:
            result.rows["hidden"] = self._rows.convert_series(hidden)
        if "input" in site.quantities:
            if site.layer not in inputs:
                inputs[site.layer] = self._rows.convert_series(input)
            result.rows["input"] = inputs[site.layer]
        return result

    def _kept_series(self, series: SeriesBuffer) -> SeriesResult | None:
        """Return the kernel's own gates; None if a value is not finite."""
        count, gates = series.count, series.gates
        assert gates is not None
        residuals, sizes = series.residuals[:count].copy(), series.state_sizes()
        if not (np.isfinite(residuals).all() and np.isfinite(sizes).all()):
            return None
        dtype = series.final.dtype
        # As in `_gates_from_kernel`.
        allowed = {size: tolerance(dtype, 0, size, 0.0, 0.0) for size in {*sizes.tolist()}}
        return SeriesResult(
            {
                name: self._rows.convert_series(gates[name][:count])
                for name in GATES
                if name in self.site.quantities
            },
            residuals,
            np.array([allowed[size] for size in sizes.tolist()]),
            machine_epsilon(dtype),
        )

    def _replay_series(self, series: SeriesBuffer, weights: CellWeights) -> SeriesResult | None:
        count, (batch, size) = series.count, series.final.shape[1:]
        at_once = calls_at_once(batch, size, series.final.dtype)
        if not at_once:
            return None
        rows = self._allocate_gates(count, batch, size)
        checks: list[ResidualCheck] = []
        for first in range(0, count, at_once):
            numbers = range(first, min(first + at_once, count))
            calls = [
                OneStep(series.inputs[call], series.final[call], series.initial(call))
                for call in numbers
            ]
            part = {name: values[first : numbers.stop] for name, values in rows.items()}
            for check in _replay_steps(calls, weights, part):
                if check is None:
                    return None
                checks.append(check)
        residuals, tolerances, precisions = zip(*checks, strict=True)
        return SeriesResult(
            {name: values.reshape(-1, size) for name, values in rows.items()},
            np.array(residuals),
            np.array(tolerances),
            precisions[0],
        )

    def series_initial_states(self, series: SeriesBuffer, begun: npt.NDArray[np.bool_]) -> Array:
        """Return the initial state of each sequence that starts in a series.

        Args:
            series: The calls.
            begun: (n, B) whether each sequence starts in the call.
        """
        if begun.all() and series.starts_from_zeros:
            return np.zeros((begun.size, self._no_states.shape[1]), self._no_states.dtype)
        states = []
        for call in np.flatnonzero(begun.any(1)).tolist():
            initial = series.initial(call)
            states.append(initial if begun[call].all() else initial[torch.from_numpy(begun[call])])
        return self._rows.of(torch.cat(states)) if states else self._no_states

    def series_start_states(self, series: SeriesBuffer) -> list[Array]:
        """Return the initial states of each call, a list (n,) of (B, H)."""
        states = [series.initial(call) for call in range(series.count)]
        if has_dtype(states[0], self._rows.dtype):
            return [initial.numpy() for initial in states]
        return [self._rows.of(initial) for initial in states]

    @property
    def replays_whole(self) -> bool:
        """Whether all gates are replayed during the call, unless they are copied."""
        return self._inline and self._partial_replay is None

    def new_initial_states(
        self, observation: Observation, assignment: SequenceAssignment, copied: Array | None = None
    ) -> Array:
        """Return the initial state of each sequence that starts in a call, (started, U).

        Args:
            observation: The call.
            assignment: Its sequences.
            copied: The result of `start_states`, if it was called. It is returned if all sequences
                are new.
        """
        count = np.count_nonzero(assignment.begun)
        if not count:
            return self._no_states
        if count == len(assignment.begun):
            return self.start_states(observation) if copied is None else copied
        start_states = self._start_states(observation)
        return self._rows.of(
            start_states[torch.from_numpy(assignment.begun).to(start_states.device)]
        )

    def start_states(self, observation: Observation) -> Array:
        """Return the initial state of each sequence of a call, (B, U), in batch order."""
        return self._rows.of(self._start_states(observation))

    def _start_states(self, observation: Observation) -> Tensor:
        initial = observation.call.cell_initial(self.site.layer, self.site.reverse)
        return observation.steps.unsort_batch(self._of_units(initial))

    def _copy(
        self, observation: Observation, layer: Layer, hidden: Tensor, is_certain: bool
    ) -> ResidualCheck:
        call, site = observation.call, self.site
        if call.has_dropout and site.layer and site.derived and "input" not in site.quantities:
            raise UnsupportedError(
                f"{site.name} had no dropout before it when it was attached, and has now: what "
                "it reads is not kept, so its gates could not be derived. Make a new tracer"
            )
        weight = call.cell_weights(site.layer, site.reverse).weight_ih
        # Nothing was computed, but the weights were compared. See docs/format.md.
        allowed = 0.0 if is_certain else math.nan
        return ResidualCheck(math.nan, allowed, compute_eps(layer.input, hidden, weight))

    def _gate_rows(self, kernel_gates: KernelGates, steps: SequenceLayout) -> dict[str, Array]:
        """Return the copied units of each gate, (N, U)."""
        return {
            name: steps.as_rows(
                _select_columns(kernel_gates.gates[name], kernel_gates.columns[name], columns),
                self._rows.dtype,
            )
            for name, columns in self.requested_gates.columns.items()
        }

    def _gates_from_kernel(
        self, observation: Observation, kernel_gates: KernelGates, hidden: Tensor
    ) -> tuple[dict[str, Array], ResidualCheck]:
        steps, site = observation.steps, self.site
        gates = self._gate_rows(kernel_gates, steps)
        initial = observation.call.cell_initial(site.layer, site.reverse)
        check_units = self._check_units
        update, candidate = (
            _select_columns(gates[name], self.requested_gates.columns[name], check_units)
            for name in ("update", "candidate")
        )
        states = np.empty(update.shape, self._rows.dtype)
        residual = None
        if isinstance(steps, PaddedLayout) and len(check_units) == hidden.shape[-1]:
            residual = copy_states(update, candidate, hidden, initial, states, reverse=site.reverse)
        if residual is None:
            states = self._rows.convert_steps(steps, self._of_units(hidden))
            units = slice(check_units.start, check_units.stop, check_units.step)
            check_states = states
            if len(check_units) < states.shape[-1]:
                check_states = self._rows.convert_steps(steps, hidden[..., units])
            residual = max_residual(
                update,
                candidate,
                check_states,
                steps.unsort_batch(initial[..., units]),
                steps.lengths,
                reverse=site.reverse,
            )
        recorded = {name: gates[name] for name in GATES if name in site.quantities}
        if "hidden" in site.quantities:
            recorded["hidden"] = states
        # The gates are the kernel's own, so no product was summed in another order.
        size = max(1.0, max_abs(initial))
        computed, stored = (
            lowest_precision(hidden.dtype, kernel_gates.dtype),
            self._rows.stored,
        )
        allowed = tolerance(computed, 0, size, 0.0, 0.0)
        if machine_epsilon(stored) > machine_epsilon(computed):
            allowed += storage_rounding(stored, size, 0.0, 0.0)
        return recorded, ResidualCheck(residual, allowed, machine_epsilon(computed))

    def _replay(
        self, observation: Observation, layer: Layer, hidden: Tensor
    ) -> tuple[dict[str, Array], ResidualCheck]:
        call, site, steps = observation.call, self.site, observation.steps
        weights = call.cell_weights(site.layer, site.reverse)
        initial = call.cell_initial(site.layer, site.reverse)
        arguments = layer.input, hidden, initial, steps
        if self._partial_replay is not None and self._weight_rows is not None:
            part = self._partial_replay.replay(*arguments, self._weight_rows.of(weights))
            check = part.check
            return {
                name: self._rows.convert_steps(steps, gate) for name, gate in part.gates.items()
            }, check
        size, dtype = hidden.shape[-1], self._rows.dtype
        buffers = {name: steps.allocate(size, dtype) for name in GATES if name in site.quantities}
        whole = self._replay_all.replay(*arguments, weights, buffers)
        return {name: buffer.rows() for name, buffer in buffers.items()}, whole.check

    def _rows_as_set(
        self, observation: Observation, gates: GatesAsSet, hidden: Tensor
    ) -> tuple[dict[str, Array], ResidualCheck]:
        """Return the gates of all units as an intervention has set them, and their check."""
        call, site, steps = observation.call, self.site, observation.steps
        rows = {
            name: self._rows.convert_steps(steps, self._of_units(gates.gates[name]))
            for name in GATES
            if name in site.quantities
        }
        return rows, check_residual(
            gates.error,
            lowest_precision(hidden.dtype, gates.dtype),
            observation.layers[site.layer].input,
            hidden,
            call.cell_initial(site.layer, site.reverse),
            call.cell_weights(site.layer, site.reverse),
            self._rows.stored,
        )

    def _of_units(self, values: Tensor) -> Tensor:
        """Return the recorded units, (..., U) of (..., H). The result may share memory."""
        return values if self._units is None else self._units.of(values)


def _replay_steps(
    calls: Sequence[OneStep], weights: CellWeights, rows: Mapping[str, Array]
) -> list[ResidualCheck | None]:
    """Replay calls of one step together, and return the check of each, as `replay_calls` does.

    Args:
        calls: The calls.
        weights: The weights that they used.
        rows: Memory for the gates, (calls, B, H) each.
    """
    gates, checks = replay_calls(calls, weights)
    for name, values in rows.items():
        copy_cast(torch.from_numpy(values), getattr(gates, name))
    return checks


def _select_columns(values: Values, there: range, requested_gates: range) -> Values:
    """Return the requested columns of (..., available columns)."""
    if there == requested_gates:
        return values
    bounds = [there.index(requested_gates[0]), there.index(requested_gates[-1])]
    return values[..., bounds[0] : bounds[1] + 1 : max(1, requested_gates.step // there.step)]
