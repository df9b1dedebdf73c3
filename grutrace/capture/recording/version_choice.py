"""Find the version of the weights that a call used, if they changed between two comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from grutrace.capture.kernel_calls.observation import Observation
from grutrace.capture.options import Options
from grutrace.capture.recording.background import JoinedCalls, PendingCall
from grutrace.capture.recording.site_recorder import SiteRecorder
from grutrace.capture.recording.tensor_copy import RowConverter
from grutrace.capture.selection import SelectedModule, defer_gates
from grutrace.errors import UnsupportedError
from grutrace.gru.recompute import RecomputedGates
from grutrace.records import GATES, Array, CallRecord, ModuleInfo, Site, SiteRows, WeightsRecord


class _ChosenVersion(NamedTuple):
    """The version of the weights that a call used.

    Attributes:
        weights: The first version that leads to the call's states; the first of all if none does.
        checks: By suffix, the residual and the tolerance.
        ambiguity: The largest difference from the gates of another version that leads to the same
            states; 0 if there is none.
    """

    weights: WeightsRecord
    checks: dict[str, tuple[float, float]]
    ambiguity: float = 0.0


class VersionChooser:
    """Finds the version of one module's weights that leads to the states of a call.

    Args:
        selection: The module, with the quantities to record.
        options: The tracer's options.
        sites: The recorders of the module's sites.
    """

    def __init__(
        self, selection: SelectedModule, options: Options, sites: Sequence[SiteRecorder]
    ) -> None:
        self._selection, self._sites = selection, sites
        self._is_deferred = options.gates == "deferred"
        description = selection.description
        self._whole = replace(description, sites=_all_units(description))
        self._module = defer_gates(self._whole)

    def choose(
        self, observation: Observation, block: CallRecord, versions: Sequence[WeightsRecord]
    ) -> CallRecord:
        """Return a call with the version of the weights that leads to its states.

        Args:
            observation: The call.
            block: The record of the call.
            versions: The versions, in the order in which they are tried.
        """
        evidence = self._replay_inputs(observation, block)
        if evidence is None:
            return block
        gates = {suffix: self._kernel_gates(rows) for suffix, rows in block.sites.items()}
        chosen = _choose_version(self._module, evidence, versions, gates)
        if isinstance(block, PendingCall):
            return replace(
                block,
                weights=chosen.weights.version,
                weights_record=chosen.weights,
                ambiguity=chosen.ambiguity,
            )
        sites = {
            suffix: replace(
                rows,
                residual=max(chosen.checks[suffix][0], chosen.ambiguity),
                tolerance=chosen.checks[suffix][1],
            )
            for suffix, rows in block.sites.items()
        }
        return replace(block, weights=chosen.weights.version, sites=sites)

    def _kernel_gates(self, rows: SiteRows) -> dict[str, Array]:
        """Return the gates of all units that were copied from the kernel, by name."""
        size = self._module.hidden_size
        return {
            name: values
            for name, values in rows.rows.items()
            if name in GATES and values.shape[-1] == size
        }

    def _replay_inputs(self, observation: Observation, block: CallRecord) -> PendingCall | None:
        """Return a call with the inputs of its gates, for all units; None if they are unknown."""
        has_gates = any({*GATES} & {*site_rows.rows} for site_rows in block.sites.values())
        if isinstance(block, PendingCall) and not has_gates:
            return block
        try:
            if self._is_deferred:
                # The record lacks only the initial states of the sequences.
                starts = {
                    recorder.site.suffix: recorder.start_states(observation)
                    for recorder in self._sites
                }
                return _as_copied(block, block.sites, starts)
            return self._copied(observation, block)
        except UnsupportedError:
            return None

    def _copied(self, observation: Observation, block: CallRecord) -> PendingCall:
        inputs: dict[int, Array] = {}
        sites, starts = {}, {}
        for recorder in self._all_sites:
            rows, check = recorder.compute_rows(observation, inputs, False)
            starts[recorder.site.suffix] = recorder.start_states(observation)
            sites[recorder.site.suffix] = SiteRows(rows, starts[recorder.site.suffix][:0], *check)
        return _as_copied(block, sites, starts)

    @cached_property
    def _all_sites(self) -> list[SiteRecorder]:
        rows = RowConverter(self._module, chosen=True, copied=True)
        selection = replace(self._selection, description=self._whole)
        options = Options(gates="deferred")
        return [SiteRecorder(selection, site, options, rows) for site in self._module.sites]


def _choose_version(
    module: ModuleInfo,
    block: PendingCall,
    versions: Sequence[WeightsRecord],
    kernel_gates: Mapping[str, Mapping[str, Array]],
) -> _ChosenVersion:
    """Find the version of the weights that leads to the states and the copied gates of a call.

    Args:
        module: The module, with the inputs of all gates stored, for all units.
        block: The call.
        versions: The versions, in the order in which they are tried.
        kernel_gates: By suffix and name, gates that were copied from the kernel.

    Returns:
        The version. Two versions can lead to the same states with different gates: the reset gate
        has no effect if the state before the step is zero and there is no bias.
    """
    joined = JoinedCalls(module, [block])
    first: _ChosenVersion | None = None
    matching: list[tuple[_ChosenVersion, dict[str, RecomputedGates]]] = []
    for weights in versions:
        made = {
            site.suffix: joined.recompute(site, weights.sites[site.suffix], np.dtype(module.dtype))
            for site in module.sites
        }
        checks = {site.suffix: joined.checks(site, made[site.suffix])[0] for site in module.sites}
        choice = _ChosenVersion(weights, checks)
        first = first or choice
        is_match = all(residual <= allowed for residual, allowed in checks.values()) and all(
            _max_difference(made[suffix].gates[name], values) <= checks[suffix][1]
            for suffix, gates in kernel_gates.items()
            for name, values in gates.items()
        )
        if is_match:
            matching.append((choice, made))
    if not matching:
        assert first is not None
        return first
    chosen, made = matching[0]
    ambiguity = 0.0
    for _, others in matching[1:]:
        for suffix, (_, allowed) in chosen.checks.items():
            pairs = zip(made[suffix].gates.values(), others[suffix].gates.values(), strict=True)
            difference = max(_max_difference(a, b) for a, b in pairs)
            if difference > allowed:
                ambiguity = max(ambiguity, difference)
    return chosen._replace(ambiguity=ambiguity)


def _max_difference(first: Array, second: Array) -> float:
    """Return the largest difference; NaN if a value is NaN in only one of the two arrays."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(first - second)
    difference[np.isnan(first) & np.isnan(second)] = 0
    return float(difference.max(initial=0.0))


def _as_copied(
    block: CallRecord, sites: Mapping[str, SiteRows], starts: Mapping[str, Array]
) -> PendingCall:
    return PendingCall(
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
        starts=starts,
    )


def _all_units(module: ModuleInfo) -> tuple[Site, ...]:
    """Return the sites of a module with all units and gates."""
    return tuple(
        replace(site, units=None, quantities=GATES + ("hidden",), derived=())
        for site in module.sites
    )
