"""Keeping the parts of a run: a tracer and a file for each set of modules that is discovered."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import uuid
import warnings
import weakref
from collections.abc import Container
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from grutrace.capture.limits import Limits
from grutrace.capture.sites import Selection
from grutrace.errors import GrutraceError, TraceFileError
from grutrace.run.matching import require_some_match
from grutrace.run.part import Part, chosen
from grutrace.run.report import Report
from grutrace.run.settings import Settings
from grutrace.shard import present_shard, sharded
from grutrace.storage.parts import (
    Stamp,
    part_path,
    parts_of,
    read_stamp,
    remove_parts,
    replaceable_parts,
)
from grutrace.storage.sinks import Mode


class Keeper:
    """Starts a part for each set of layers, and closes all parts at the end of the process.

    Nothing here keeps a model alive. Once one is gone, the file of its part is closed.

    Args:
        settings: Of the run.
        report: Where parts are counted, and what goes wrong is said.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        # Asked only now that the script has had time to say how many processes there are.
        self._shard = present_shard()
        self._first = sharded(Path(settings.output), self._shard)
        report.output = self._first
        self._limits = Limits(settings.max_calls, settings.max_bytes)
        self._process = os.getpid()
        self._unmatched = list(settings.sites)
        self._parts: list[Part] = []
        self._run, self._before = self._existing()
        self._count = len(self._before)
        # Later than that of the sinks, and so, at exit, before it.
        atexit.register(self.close)

    def _existing(self) -> tuple[str, dict[int, Path]]:
        """Return the run's id, and by number the parts that there are to append to."""
        if self._settings.mode == "a" and self._first.exists():
            stamp = read_stamp(self._first)
            if stamp is not None:
                return stamp.run, dict(enumerate(parts_of(self._first), 1))
        return uuid.uuid4().hex, {}

    def add(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        known: Container[nn.Module] = (),
        *,
        is_temporary: bool = False,
    ) -> Part | None:
        """Record these layers of the model from now on.

        Args:
            model: The model.
            layers: Some of its layers.
            known: Layers that were here before.
            is_temporary: Whether the part outlives the model: another may take its place.

        Returns:
            The part; None where nothing is recorded.

        Raises:
            NoSiteMatches: Nothing was recorded so far, and no site that is asked for is there.
            GrutraceError: They cannot be recorded.
        """
        if self._limits.reached:
            return None
        if self._report.tallies:
            # Models that nobody uses any more may be in cycles, and hold a file open.
            gc.collect()
        # Not under the script's filters, which may turn a warning into an error.
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            selections = chosen(model, layers, self._settings)
        for each in given:
            self._report.say(str(each.message))
        names = [site.name for each in selections for site in each.description.sites]
        self._unmatched = [
            glob for glob in self._unmatched if not any(fnmatchcase(name, glob) for name in names)
        ]
        if not selections and not self._report.tallies and self._settings.sites:
            require_some_match(model, layers, known, self._settings.sites)
        if not selections:
            return None
        part = self._continued(model, selections) or self._new(model, selections)
        self._report.tallies.append(part.tally)
        self._parts.append(part)
        if not is_temporary:
            weakref.finalize(model, self._finish, part).atexit = False
        return part

    def _continued(self, model: nn.Module, selections: list[Selection]) -> Part | None:
        """Go on in the first existing part of just these modules that nothing has gone on in."""
        for number, path in self._before.items():
            # Those of other models, and those that were not closed, cannot be appended to.
            with contextlib.suppress(TraceFileError):
                part = self._part(model, selections, path, "a", number)
                del self._before[number]
                return part
        return None

    def _new(self, model: nn.Module, selections: list[Selection]) -> Part:
        number = self._count + 1
        path = part_path(self._first, number)
        if number > 1 or self._settings.mode != "overwrite":
            part = self._part(model, selections, path, "w", number)
        else:
            replaced = replaceable_parts(self._first)
            part = self._part(model, selections, path, "overwrite", number)
            remove_parts(replaced)
        self._count = number
        return part

    def _part(
        self, model: nn.Module, selections: list[Selection], path: Path, mode: Mode, number: int
    ) -> Part:
        stamp = Stamp(self._run, number)
        options = stamp.options | (self._shard.options if self._shard else {})
        return Part(
            model, selections, path, mode, options, self._settings, self._report, self._limits
        )

    def close(self) -> None:
        """Close all parts."""
        if os.getpid() != self._process:
            return
        for part in tuple(self._parts):
            self._finish(part)
        for glob in self._unmatched:
            self._report.say(f"sites: {glob!r} matched no site of any model that was called")

    def _finish(self, part: Part) -> None:
        if os.getpid() != self._process or part not in self._parts:
            return
        self._parts.remove(part)
        try:
            part.finish()
        except GrutraceError as error:
            self._report.say(str(error))
