"""A single call that waits in the journal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch

from grutrace.capture.kernel_calls.arriving_gradients import ArrivingGradients
from grutrace.capture.kernel_calls.observation import KernelRun
from grutrace.capture.logged_values import LoggedValues
from grutrace.capture.recording.site_recorder import Replayed, SiteRecorder
from grutrace.capture.recording.weight_versions import Version, WeightVersionTracker
from grutrace.capture.sequences.assignment import Commitment


class CheckedWeights(NamedTuple):
    """The weights of a call, and how they were checked.

    Attributes:
        versions: The tracker that numbered the version.
        version: The current version.
        is_certain: Whether every byte was compared, so that the call used this version.
        is_new: Whether the version was first seen at this call.
    """

    versions: WeightVersionTracker
    version: Version
    is_certain: bool
    is_new: bool

    @property
    def new_nbytes(self) -> int:
        """Bytes of the copies of the weights, if they are new."""
        return sum(weight.nbytes for weight in self.version.weights) if self.is_new else 0


class JournalEntry:
    """An observed call that waits in the journal.

    Attributes:
        module: Index of its module in the header.
        run: The call, with the weights that it presumably used.
        is_copied: Whether `run` holds copies, so that the call can wait.
        nbytes: Bytes of the copies.
        version: The current version of the weights when the call ran.
        versions: The tracker that numbered this version. Clearing the trace replaces the tracker.
        is_certain: Whether every byte of the weights was compared.
        tag: The user's name for this part of the run.
        names: (B,) the user's names of the sequences; None to identify them by their states.
        time: Time of the call, in seconds since 1970.
        autocast: Device type and data type of autocast; None if autocast was off.
        commitment: Whether the sink has the call.
        gradients: The gradients that arrive at the call; None if they are not recorded.
        logged: The values that the user logs for the call; None if nothing is logged.
        replays: The calls that are replayed together with this call; None if there are none.
    """

    __slots__ = (
        *("autocast", "commitment", "gradients", "is_certain", "is_copied", "module", "names"),
        *("logged", "nbytes"),
        *("replays", "run", "tag", "time", "version", "versions"),
    )

    def __init__(self, module: int, run: KernelRun, checked: CheckedWeights) -> None:
        self.module, self.run = module, run
        self.versions, self.version, self.is_certain, _ = checked
        self.commitment = Commitment()
        self.is_copied = False
        self.nbytes = 0
        self.tag: str | None = None
        self.names: Sequence[Hashable] | None = None
        self.time = 0.0
        self.autocast: tuple[str, torch.dtype] | None = None
        self.gradients: ArrivingGradients | None = None
        self.logged: LoggedValues | None = None
        self.replays: ReplayGroup | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the call waits for a backward pass, or for logged values."""
        if self.logged is not None and self.logged.is_waiting:
            return True
        return self.gradients is not None and self.gradients.is_waiting


class ReplayGroup:
    """Calls of one step that are replayed together when the first of them is recorded."""

    def __init__(self, entries: Sequence[JournalEntry], sites: Sequence[SiteRecorder]) -> None:
        self._entries, self._sites = entries, sites
        self._replayed: dict[tuple[JournalEntry, str], Replayed | None] | None = None

    def of(self, entry: JournalEntry) -> Mapping[str, Replayed | None]:
        """Return the gates of a call, by the suffix of the site."""
        if self._replayed is None:
            observations = [waiting.run.observation() for waiting in self._entries]
            self._replayed = {
                (waiting, site.site.suffix): replayed
                for site in self._sites
                for waiting, replayed in zip(
                    self._entries, site.replay_together(observations), strict=True
                )
            }
        suffixes = [site.site.suffix for site in self._sites]
        return {suffix: self._replayed.pop((entry, suffix), None) for suffix in suffixes}
