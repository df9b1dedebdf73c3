"""Find the version of the weights that a call used, if they changed between two comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from grutrace.capture.kernel_calls.observation import Observation
from grutrace.capture.options import Options
from grutrace.capture.recording.background import PendingCall, choose_version
from grutrace.capture.recording.site_recorder import SiteRecorder
from grutrace.capture.recording.tensor_copy import RowConverter
from grutrace.capture.selection import SelectedModule, defer_gates
from grutrace.errors import UnsupportedError
from grutrace.records import GATES, Array, CallRecord, ModuleInfo, Site, SiteRows, WeightsRecord


class VersionChooser:
    """Finds the version of one module's weights that leads to the states of a call.

    Args:
        selection: The module, and what is recorded of it.
        options: Of the tracer.
        sites: The recorders of its sites.
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
            block: Its record.
            versions: In the order in which they are tried.
        """
        evidence = self._replay_inputs(observation, block)
        if evidence is None:
            return block
        chosen = choose_version(self._module, evidence, versions)
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

    def _replay_inputs(self, observation: Observation, block: CallRecord) -> PendingCall | None:
        """Return what the gates of a call follow from, for all units; None if it cannot be had."""
        has_gates = any({*GATES} & {*each.rows} for each in block.sites.values())
        if isinstance(block, PendingCall) and not has_gates:
            return block
        try:
            if self._is_deferred:
                # It has everything but the states that its sequences started from.
                starts = {each.site.suffix: each.start_states(observation) for each in self._sites}
                return _as_copied(block, block.sites, starts)
            return self._copied(observation, block)
        except UnsupportedError:
            return None

    def _copied(self, observation: Observation, block: CallRecord) -> PendingCall:
        inputs: dict[int, Array] = {}
        sites, starts = {}, {}
        for each in self._all_sites:
            rows, check = each.compute_rows(observation, inputs, False)
            starts[each.site.suffix] = each.start_states(observation)
            sites[each.site.suffix] = SiteRows(rows, starts[each.site.suffix][:0], *check)
        return _as_copied(block, sites, starts)

    @cached_property
    def _all_sites(self) -> list[SiteRecorder]:
        rows = RowConverter(self._module, chosen=True, copied=True)
        selection = replace(self._selection, description=self._whole)
        options = Options(gates="deferred")
        return [SiteRecorder(selection, site, options, rows) for site in self._module.sites]


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
        starts,
    )


def _all_units(module: ModuleInfo) -> tuple[Site, ...]:
    """The sites of a module with all of their units and gates."""
    return tuple(
        replace(site, units=None, quantities=GATES + ("hidden",), derived=())
        for site in module.sites
    )
