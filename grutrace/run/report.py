"""Messages of a run, as a few lines on standard error, which the script uses as well."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from grutrace.run.settings import Settings


@dataclass
class PartStats:
    """Counts of one part of a run.

    Attributes:
        path: The file of the part.
        sites: Number of sites.
        calls: Number of recorded calls.
        lost: Number of calls that could not be stored.
        failed: Whether another error stopped the recording.
    """

    path: Path
    sites: int
    calls: int = 0
    lost: int = 0
    failed: bool = False


class Report:
    """Prints errors at once, and the number of recorded calls at the end.

    Args:
        settings: The settings of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: The file of the first part.
        self.output = Path(settings.output)
        self._process = os.getpid()
        self._logged: set[str] = set()
        self.part_stats: list[PartStats] = []
        #: Whether an nn.GRU or nn.GRUCell was called.
        self.called = False
        self._stopped = False

    def stop(self, message: str) -> None:
        """Print why the script is stopped, even with `quiet`, and print nothing after it."""
        if not self._stopped and os.getpid() == self._process:
            self._stopped = True
            self._write(message)

    def log(self, message: str) -> None:
        """Print a line: each only once, and only in the process that records."""
        if self._settings.quiet or message in self._logged or os.getpid() != self._process:
            return
        if self._stopped:
            return
        self._logged.add(message)
        self._write(message)

    def _write(self, message: str) -> None:
        line = " ".join(["grutrace:", *message.split()]) + "\n"
        # To the original standard error, which the script may have replaced. In one write, because
        # several ranks may share it.
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.__stderr__.write(line)
                sys.__stderr__.flush()

    def end(self) -> None:
        """Print the number of recorded calls and sites, and the files."""
        path = os.path.relpath(self.output)
        if not self.part_stats:
            reason = "nothing was recorded" if self.called else "no nn.GRU or nn.GRUCell was called"
            self.log(f"{reason}: {path} was not written")
            return
        calls = sum(stats.calls for stats in self.part_stats)
        sites = sum(stats.sites for stats in self.part_stats)
        later = len(self.part_stats) - 1
        files = path if not later else f"{path} and {later} file{'s' * (later > 1)} beside it"
        lost = self._lost()
        self.log(
            f"recorded {calls} call{'s' * (calls != 1)} of {sites} site{'s' * (sites != 1)} "
            f"in {files}{lost}"
        )

    def _lost(self) -> str:
        lost = sum(stats.lost for stats in self.part_stats)
        if lost:
            return f"; {lost} are lost, as said above"
        return (
            "; some are lost, as said above"
            if any(stats.failed for stats in self.part_stats)
            else ""
        )
