"""Turn the observed calls of one module into records for the sink."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.kernel_calls.arriving_gradients import ArrivingGradients
from grutrace.capture.kernel_calls.observation import KernelRun, Observation
from grutrace.capture.logged_values import LoggedValues
from grutrace.capture.options import Options
from grutrace.capture.recording.annotations import RecordedBatches, RecordedCall, set_labels
from grutrace.capture.recording.background import PendingCall, PendingSeries
from grutrace.capture.recording.guarded_sink import RecordingLimits
from grutrace.capture.recording.journal_entry import CheckedWeights, JournalEntry, ReplayGroup
from grutrace.capture.recording.series_buffer import SeriesBuffer
from grutrace.capture.recording.site_recorder import Replayed, SeriesResult, SiteRecorder
from grutrace.capture.recording.step_filter import StepFilter, slice_observation
from grutrace.capture.recording.tensor_copy import CopyBuffer, RowConverter, to_numpy
from grutrace.capture.recording.version_choice import VersionChooser
from grutrace.capture.recording.weight_versions import MAX_VERSIONS, Version, WeightVersionTracker
from grutrace.capture.selection import SelectedModule, defer_gates, records_gradient
from grutrace.capture.sequences.assignment import (
    Commitment,
    SequenceAssignment,
    SeriesAssignment,
)
from grutrace.capture.sequences.tracker import SequenceTracker
from grutrace.gru.gate_copies import NO_GATES, merge_requests
from grutrace.gru.joint_replay import calls_at_once
from grutrace.gru.kernel_gates import kernel_supported
from grutrace.gru.layout import has_dtype
from grutrace.gru.residual import ResidualCheck, ResidualViolation, find_violations
from grutrace.gru.tolerance import machine_epsilon
from grutrace.native.library import load
from grutrace.records import (
    GATES,
    WEIGHTS,
    AnnotationRecord,
    Array,
    CallRecord,
    CallSeries,
    Record,
    SeriesRows,
    SiteRows,
    WeightsRecord,
)

#: Bytes of a label in a file, without its values and its name.
ANNOTATION_BYTES = 33

#: Copies a tensor.
CopyFunction: TypeAlias = Callable[[Tensor], Tensor]

#: Appends a record to the sink; returns the number of the call if it is one.
AppendFunction: TypeAlias = Callable[[Record, Commitment | None], int | None]

#: By suffix, the rows of a call and their check.
SiteResults: TypeAlias = dict[str, tuple[dict[str, Array], ResidualCheck]]


class ModuleRecorder:
    """Turns the observed calls of one module into records, and tracks its weights.

    Args:
        index: Index of the module in the header.
        selection: The module, with the quantities to record.
        append: Appends a record to the sink, as `GuardedSink.append` does.
        options: The tracer's options. If gates are deferred, calls are only copied.
        limits: The limits of the recording.
        state_memory: Bytes of final states that are remembered to identify the sequences.

    Attributes:
        description: The module's entry in the header.
        requested_gates: The kernel's own gates to copy, if that is possible.
        records_gradients: Whether the gradients that arrive at each call are recorded.
        grad_scaler: Scales the loss; None if the loss is not known to be scaled.
        joins_series: Whether similar calls of one step can be recorded as a series.
    """

    def __init__(
        self,
        index: int,
        selection: SelectedModule,
        append: AppendFunction,
        options: Options,
        limits: RecordingLimits,
        state_memory: int,
    ) -> None:
        self._index, self._limits, self._append = index, limits, append
        self._selection, self._options = selection, options
        self.description = selection.description
        background = options.gates == "background"
        copied = defer_gates(self.description) if background else self.description
        self._rows = RowConverter(
            copied,
            chosen=options.dtype is not None,
            copied=background,
            uses_side_stream=options.to_file,
        )
        self._sites = [SiteRecorder(selection, site, options, self._rows) for site in copied.sites]
        # The recorders of these sites also copy the initial states of every call.
        self._copying = self._sites if background else []
        self._set_sites: list[SiteRecorder] = []
        self._version_chooser = VersionChooser(selection, options, self._sites)
        self._steps = options.steps
        self._options = options
        # Held while the weights are compared.
        self._lock = threading.RLock()
        self._state_memory = state_memory
        self.reset()
        self._shares_input, self._shares_output = self._shared()
        self._has_gates = any(
            {*GATES} & {*site.available_quantities} for site in self.description.sites
        )
        requests = [site.requested_gates for site in self._sites]
        # Replaying some steps costs less than copying the gates of the whole call.
        copies_gates = self._step_filter is None and all(request.columns for request in requests)
        stored, computed = self._rows.stored, getattr(torch, self.description.weights_dtype)
        self._gathers = (
            self._step_filter is None
            and all(recorder.replays_whole for recorder in self._sites)
            and machine_epsilon(stored) <= machine_epsilon(computed)
        )
        self.records_gradients = records_gradient([selection])
        self.grad_scaler = options.grad_scaler
        self.joins_series = (
            not self.records_gradients
            and not options.log
            and not (self.description.bidirectional or limits.is_limited)
            and self.description.num_layers == 1
            and self._step_filter is None
            and (options.gates != "inline" or self._gathers)
        )
        self.requested_gates = NO_GATES
        if copies_gates and kernel_supported():
            request = merge_requests(requests, self.description.hidden_size)
            keeps_steps = (
                options.gates == "inline"
                and stored is computed
                and computed in (torch.float32, torch.float64)
                and load() is not None
                and all(
                    len(units) == self.description.hidden_size for units in request.columns.values()
                )
            )
            self.requested_gates = request._replace(keeps_steps=keeps_steps)

    def reset(self) -> None:
        """Start again with an empty trace.

        The next call gets number 0, starts new sequences and stores its weights.
        """
        self._tracker = SequenceTracker(self._state_memory)
        steps = self._steps
        self._step_filter = None if steps is None else StepFilter(steps.start, steps.stop)
        with self._lock:
            self._versions = WeightVersionTracker(self._options.weights)
        self._records: dict[int, WeightsRecord] = {}

    def check_weights(self, run: KernelRun, *, waits: bool) -> CheckedWeights:
        """Compare the weights of a call that has just run.

        Args:
            run: The call.
            waits: Whether the call waits in the journal. If it does not, every byte is compared on
                a CPU, which costs less than copying the call. On a device, the comparison would
                wait for the model, so the call is copied instead.
        """
        with self._lock:
            versions = self._versions
            known = len(versions.new_versions)
            # A replay reads all weights anyway, and needs the version that the call used.
            replays = self._options.gates == "inline" and run.step_gates is None
            exact = replays or (not waits and run.device == "cpu")
            is_certain = versions.check(run.weights, exact=exact)
            is_new = len(versions.new_versions) > known
            return CheckedWeights(versions, versions.present, is_certain, is_new)

    def copy(
        self, run: KernelRun, checked: CheckedWeights, buffer: CopyBuffer, *, waits: bool
    ) -> JournalEntry:
        """Copy the input and output of a call if it waits, or if its weights are uncertain.

        Args:
            run: The call.
            checked: The weights of the call.
            buffer: Memory for the copies.
            waits: Whether the call waits in the journal.
        """
        run.copy_step_gates()
        entry = JournalEntry(self._index, run, checked)
        weights = checked.version.weights
        entry.nbytes = run.nbytes
        if waits or not checked.is_certain:
            entry.is_copied = True
            input, output = self._copies(run, buffer)
            entry.run = run.copied(weights, buffer.copy, input, output)
        else:
            entry.run = run.with_weights(weights)
        entry.nbytes += checked.new_nbytes
        return entry

    def new_series(
        self,
        run: KernelRun,
        checked: CheckedWeights,
        tag: str | None,
        batches: RecordedBatches | None,
        capacity: int,
        buffer: CopyBuffer,
    ) -> SeriesBuffer:
        """Return memory for a series of calls similar to this one."""
        shares_input, shares_output = self._shares_input, self._shares_output
        return SeriesBuffer(
            self._index,
            run,
            checked.version,
            checked.versions,
            tag,
            batches,
            capacity,
            buffer,
            new_nbytes=checked.new_nbytes,
            shares_input=shares_input and has_dtype(run.output, self._rows.dtype),
            shares_output=shares_output and has_dtype(run.output, self._rows.dtype),
            shares_gates=has_dtype(run.output, self._rows.dtype),
        )

    def _copies(self, run: KernelRun, buffer: CopyBuffer) -> tuple[CopyFunction, CopyFunction]:
        """Return the functions that copy the input and the output of a call.

        Copies that can be rows of the trace lie in lasting memory.
        """
        output, shares = run.output, run.steps is None
        # Replayed gates have the same bits only if the values keep the kernel's memory layout.
        if run.is_time_major and self._options.gates == "inline" and output.shape[0] > 1:
            shares = False
        if not (shares and has_dtype(output, self._rows.dtype)):
            return buffer.copy, buffer.copy
        lasting = partial(_by_sequence, buffer) if run.is_time_major else buffer.copy_lasting
        return (
            lasting if self._shares_input else buffer.copy,
            lasting if self._shares_output else buffer.copy,
        )

    def _shared(self) -> tuple[bool, bool]:
        """Whether the copies of the input, and of the output, can be rows without a conversion."""
        if self._step_filter is not None or self.description.bidirectional:
            return False, False
        sites = [recorder.site for recorder in self._sites]
        first, last = 0, self.description.num_layers - 1
        return (
            any(site.layer == first and "input" in site.quantities for site in sites),
            any(
                site.layer == last and "hidden" in site.quantities and site.units is None
                for site in sites
            ),
        )

    def record(self, entry: JournalEntry) -> RecordedCall | None:
        """Record a call: its gates are copied from the kernel, replayed or left for later.

        Args:
            entry: The call.

        Returns:
            The recorded call; None if the trace was cleared since the call.

        Raises:
            UnsupportedError: The input of a layer is not recorded, and can no longer be computed.
            LimitExceeded: The call exceeds the limits of the recording. Nothing was recorded.
            SinkError: The sink cannot store the call.
        """
        if entry.versions is not self._versions:
            return None
        observation = entry.run.observation()
        lengths = observation.steps.lengths
        ours = observation.is_kept
        ends = _boundary_states(observation)
        assignment = self._tracker.assign(*ends, lengths, entry.names, is_owned=ours)
        if self._step_filter is None:
            numbers = assignment.roots.view(np.int64)
            recorded = RecordedCall(self._index, assignment, lengths, numbers)
            block = self._make(entry, observation, assignment)
            block = self._with_set_steps(block, recorded, observation)
            number = self._commit(entry, block)
            return self._with_findings(recorded, block, number)
        selection = self._step_filter.select(assignment, lengths)
        bounds = self._step_filter.start, self._step_filter.stop
        recorded = RecordedCall(self._index, assignment, lengths, selection.numbers, *bounds)
        if selection.assignment is None:
            self._tracker.commit(tuple, Commitment(is_done=True))
        else:
            layers = [recorder.site.layer for recorder in self._sites]
            kept = slice_observation(observation, selection, layers)
            block = self._make(entry, kept, selection.assignment)
            block = self._with_set_steps(block, recorded, kept)
            number = self._commit(entry, block)
            recorded = self._with_findings(recorded, block, number)
        self._step_filter.commit(selection, self._tracker)
        return recorded

    def can_record_series(self, series: SeriesBuffer) -> bool:
        """Whether the calls of a series can be recorded at once."""
        is_known = all(series.are_certain[: series.count]) or (
            series.version is self._versions.present
        )
        return series.versions is self._versions and (is_known or not self._has_gates)

    def series_rows(self, series: SeriesBuffer) -> dict[str, SeriesResult] | None:
        """Return the rows of a series, by suffix; None if it must be recorded call by call."""
        inputs: dict[int, Array] = {}
        results = {}
        for site in self._sites:
            result = site.compute_series_rows(series, inputs)
            if result is None:
                return None
            results[site.site.suffix] = result
        return results

    def assign_series(
        self,
        series: SeriesBuffer,
        rows: Mapping[str, SeriesResult],
        commitment: Commitment,
    ) -> tuple[CallSeries, SeriesAssignment]:
        """Assign a series to sequences. Return its record and its sequences.

        Args:
            series: The calls.
            rows: What `series_rows` returned.
            commitment: Marked as done once the calls are appended.
        """
        assignment = self._tracker.assign_series(series, commitment)
        count = series.count
        sites = {}
        for site in self._sites:
            result = rows[site.site.suffix]
            sites[site.site.suffix] = SeriesRows(
                result.rows,
                site.series_initial_states(series, assignment.begun),
                result.residuals,
                result.tolerances,
                result.precision,
            )
        fields = (
            self._index,
            np.array(series.times[:count]),
            series.tag,
            series.training,
            series.version.number,
            assignment.sequences(),
            assignment.begun.sum(1),
            sites,
            assignment.forks,
            assignment.origins,
        )
        if not self._copying:
            return CallSeries(*fields), assignment
        starts = {site.site.suffix: site.series_start_states(series) for site in self._copying}
        weights = self._record_of(series.version)
        return PendingSeries(*fields, starts, weights), assignment

    def append_weights(self, series: CallSeries) -> None:
        """Append the weights of a series, if they are new."""
        self._append_new_weights(series.weights)

    def series_violations(
        self, series: CallSeries, numbers: Sequence[int]
    ) -> list[ResidualViolation]:
        """Return the sites whose residual exceeds the tolerance, call by call.

        Args:
            series: The calls.
            numbers: Their numbers in the trace.
        """
        if not any((site.residuals > site.tolerances).any() for site in series.sites.values()):
            return []
        return [
            violation
            for call, number in zip(series.calls(), numbers, strict=True)
            for violation in find_violations(self.description, call, number)
        ]

    def pop_precision_losses(self) -> list[str]:
        """Return a sentence for each loss of precision since the last call of this method."""
        return self._rows.pop_precision_losses()

    def gather(self, entries: Sequence[JournalEntry]) -> None:
        """Prepare calls of one step to be replayed together, if that gives the same bits.

        Args:
            entries: Waiting calls of this module.
        """
        if not self._gathers:
            return
        alike: dict[tuple[object, object, object, object], list[JournalEntry]] = {}
        for entry in entries:
            if (shape := _one_step(entry)) is not None:
                alike.setdefault((id(entry.version), *shape), []).append(entry)
        for (_, batch, _, dtype), alike_entries in alike.items():
            most = calls_at_once(
                cast("int", batch), self.description.hidden_size, cast("torch.dtype", dtype)
            )
            # An empty batch has no rows to replay.
            for first in range(0, len(alike_entries) if batch and most > 1 else 0, most):
                group = ReplayGroup(alike_entries[first : first + most], self._sites)
                for entry in alike_entries[first : first + most]:
                    entry.replays = group

    def expect_changes(self) -> None:
        """Compare every byte of the weights at the next call."""
        with self._lock:
            self._versions.expect_changes()

    def recheck(self) -> None:
        """Compare every byte of the current weights."""
        with self._lock:
            self._versions.recheck()

    def logged_values(self, run: KernelRun) -> LoggedValues | None:
        """Return what takes the values that are logged for a call; None if nothing is logged."""
        if not self._options.log:
            return None
        lengths = run.observation().steps.lengths
        return LoggedValues(self.description, lengths, is_packed=run.steps is not None)

    def _make(
        self, entry: JournalEntry, observation: Observation, assignment: SequenceAssignment
    ) -> CallRecord:
        """Return the record of a call, with the values that were logged for it."""
        block = self._make_block(entry, observation, assignment)
        if entry.logged is None:
            return block
        first = self.description.sites[0].suffix
        site = block.sites[first]
        rows = {**site.rows, **entry.logged.rows()}
        return replace(block, sites={**block.sites, first: replace(site, rows=rows)})

    def _make_block(
        self, entry: JournalEntry, observation: Observation, assignment: SequenceAssignment
    ) -> CallRecord:
        """Return the record of a call, without logged values."""
        if observation.gates_as_set is not None:
            # An intervention set the gates, so the weights do not explain the states.
            sites = self._recorders_of_set_gates()
            results = self._compute_rows(observation, entry.is_certain, {}, entry.gradients, sites)
            return self._block(entry, observation, assignment, results, sites)
        replayed = None if entry.replays is None else entry.replays.of(entry)
        results = self._compute_rows(observation, entry.is_certain, replayed or {}, entry.gradients)
        block = self._block(entry, observation, assignment, results)
        is_known = entry.is_certain or entry.version is self._versions.present
        if is_known or not self._has_gates:
            return block
        # The call's own version first. If two versions fit, the states do not depend on the
        # weights that differ.
        versions = {
            version.number: self._record_of(version)
            for version in (entry.version, *self._versions.known)
        }
        return self._version_chooser.choose(observation, block, list(versions.values()))

    def _recorders_of_set_gates(self) -> list[SiteRecorder]:
        """Return recorders that compute all rows now, if other gates are computed in background."""
        if self._options.gates != "background":
            return self._sites
        if not self._set_sites:
            options = copy(self._options)
            options.gates = "inline"
            rows = RowConverter(self.description, chosen=options.dtype is not None)
            self._set_sites = [
                SiteRecorder(self._selection, site, options, rows)
                for site in self.description.sites
            ]
        return self._set_sites

    def _with_set_steps(
        self, block: CallRecord, recorded: RecordedCall, observation: Observation
    ) -> CallRecord:
        """Return the record of a call with labels for the steps that an intervention has set."""
        if observation.gates_as_set is None:
            return block
        labels: list[AnnotationRecord] = []
        for site in self.description.sites:
            directions = observation.gates_as_set[site.layer]
            if directions is not None:
                labels += set_labels(
                    recorded,
                    site.suffix,
                    directions[int(site.reverse)],
                    observation.steps,
                    # Gates that are recomputed on reading do not follow from states and weights.
                    self._rows.dtype if {*GATES} & {*site.derived} else None,
                )
        return replace(block, annotations=tuple(labels))

    def _commit(self, entry: JournalEntry, block: CallRecord) -> int | None:
        append = partial(self._append_call, entry, block)
        return self._tracker.commit(append, entry.commitment)

    def _append_call(self, entry: JournalEntry, block: CallRecord) -> int | None:
        """Append a call, after its weights if they are new."""
        self._limits.charge(partial(self._bytes, block))
        self._append_new_weights(block.weights)
        return self._append(block, entry.commitment)

    def _with_findings(
        self, recorded: RecordedCall, block: CallRecord, number: int | None
    ) -> RecordedCall:
        # Gates in the background are checked when they are computed.
        violations = (
            () if self._copying else tuple(find_violations(self.description, block, number))
        )
        return recorded._replace(
            violations=violations, precision_losses=self._rows.pop_precision_losses()
        )

    def _append_new_weights(self, number: int) -> None:
        """Append the versions of the weights up to this number that are not appended yet."""
        made = self._versions.new_versions
        while made and made[0].number <= number:
            self._append(self._record_of(made[0]), None)
            made.popleft()

    def _block(
        self,
        entry: JournalEntry,
        observation: Observation,
        assignment: SequenceAssignment,
        results: SiteResults,
        recorders: Sequence[SiteRecorder] | None = None,
    ) -> CallRecord:
        copying = self._copying if recorders is None else []
        starts = {recorder.site.suffix: recorder.start_states(observation) for recorder in copying}
        gradients, sites = entry.gradients, {}
        backward = () if gradients is None else (gradients.is_attached, gradients.scale)
        for recorder in self._sites if recorders is None else recorders:
            rows, check = results[recorder.site.suffix]
            begun = recorder.new_initial_states(
                observation, assignment, starts.get(recorder.site.suffix)
            )
            sites[recorder.site.suffix] = SiteRows(rows, begun, *check, *backward)
        fields = (
            self._index,
            entry.time,
            entry.tag,
            observation.training,
            entry.version.number,
            observation.steps.lengths.astype(np.uint32),
            assignment.sequences,
            sites,
            assignment.forks,
            assignment.origins,
        )
        if not copying:
            return CallRecord(*fields)
        weights = self._record_of(entry.version)
        return PendingCall(
            *fields,
            starts=starts,
            wait_for_copies=self._rows.pop_sync(),
            weights_record=weights,
        )

    def _bytes(self, block: CallRecord) -> int:
        """Return the bytes of a stored call, with the new weights that it needs."""
        module, rows = self.description, int(block.steps.sum())
        width = sum(
            module.unit_count(site) * len([name for name in site.quantities if name != "input"])
            for site in module.sites
        )
        # Both directions of a layer share its input.
        inputs = {s.layer: s.input_size for s in module.sites if "input" in s.quantities}
        begun = sum(site_rows.initial.size for site_rows in block.sites.values())
        values = rows * (width + sum(inputs.values())) + begun
        announced = sum(self._record_of(version).nbytes for version in self._versions.new_versions)
        labels = sum(ANNOTATION_BYTES + 8 * len(each.values) for each in block.annotations)
        return values * np.dtype(module.dtype).itemsize + announced + labels

    def _compute_rows(
        self,
        observation: Observation,
        is_certain: bool,
        replayed: Mapping[str, Replayed | None],
        gradients: ArrivingGradients | None = None,
        recorders: Sequence[SiteRecorder] | None = None,
    ) -> SiteResults:
        inputs: dict[int, Array] = {}
        results = {}
        for recorder in self._sites if recorders is None else recorders:
            suffix = recorder.site.suffix
            results[suffix] = recorder.compute_rows(
                observation, inputs, is_certain, replayed.get(suffix), gradients
            )
        return results

    def _record_of(self, version: Version) -> WeightsRecord:
        """Return the record of a version: the weights of the recorded sites."""
        record = self._records.get(version.number)
        if record is None:
            record = self._records[version.number] = self._made_record(version)
            while len(self._records) > MAX_VERSIONS + 1:
                del self._records[next(iter(self._records))]
        return record

    def _made_record(self, version: Version) -> WeightsRecord:
        dtype = self.description.weights_dtype
        directions = 2 if self.description.bidirectional else 1
        weights_per_cell = 4 if self.description.bias else 2
        sites = {}
        for site in self.description.sites:
            first = (site.layer * directions + site.reverse) * weights_per_cell
            tensors = zip(WEIGHTS, version.weights[first : first + weights_per_cell], strict=False)
            sites[site.suffix] = {
                name: to_numpy(tensor).astype(dtype, copy=False) for name, tensor in tensors
            }
        return WeightsRecord(self._index, version.number, sites)


def _one_step(entry: JournalEntry) -> tuple[object, object, object] | None:
    """Return a key shared by calls that can be replayed together; None if this call cannot."""
    run = entry.run
    if not entry.is_copied or entry.autocast is not None:
        return None
    if run.gates is not None or run.gates_as_set is not None:
        return None
    input, output = run.arguments[0], run.output
    if run.steps is not None or run.device != "cpu" or not output.numel():
        return None
    if output.dim() == 3 and output.shape[1 if not run.is_time_major else 0] != 1:
        return None
    weights = run.weights[0]
    if not input.dtype == output.dtype == weights.dtype:
        return None
    return run.batch, input.shape, input.dtype


def _by_sequence(buffer: CopyBuffer, values: Tensor) -> Tensor:
    """Copy (T, B, width) so that the steps of a sequence lie one after another."""
    return buffer.copy_lasting(values.transpose(0, 1)).transpose(0, 1)


def _boundary_states(observation: Observation) -> tuple[Tensor | None, Tensor | None]:
    """Return the states before and after a call, (B, L * H); None for a bidirectional module.

    The reverse direction ends at a sequence's first step, so no call can continue it.
    """
    call, steps = observation.call, observation.steps
    if call.bidirectional:
        return None, None
    final = _concat_layers(
        [steps.final(layer.output, reverse=False) for layer in observation.layers]
    )
    return _concat_layers([steps.unsort_batch(state) for state in call.initial]), final


def _concat_layers(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, -1)
