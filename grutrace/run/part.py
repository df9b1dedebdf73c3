"""One part of a run: a tracer that never stands in the script's way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from grutrace.capture.limits import Limits
from grutrace.capture.observe import GRUModule, KernelRun
from grutrace.capture.options import STATE_MEMORY
from grutrace.capture.sites import Selection, select
from grutrace.capture.surroundings import Missed
from grutrace.capture.tracer import Tracer
from grutrace.errors import GrutraceWarning, ResidualError, SinkError
from grutrace.run import texts
from grutrace.run.report import Report, Tally
from grutrace.run.settings import Settings
from grutrace.storage.sinks import Mode


def chosen(model: nn.Module, layers: Sequence[nn.Module], settings: Settings) -> list[Selection]:
    """Return what is recorded of these layers of the model; nothing if no glob matches.

    Raises:
        GrutraceError: The layers cannot be recorded.
    """
    wanted = {id(layer) for layer in layers}
    found = [each for each in select(model, record=settings.record) if id(each.module) in wanted]
    globs = settings.sites or ("*",)
    names = [site.name for each in found for site in each.description.sites]
    matching = [glob for glob in globs if any(fnmatchcase(name, glob) for name in names)]
    if not matching:
        return []
    return [each for each in select(model, matching, settings.record) if id(each.module) in wanted]


class Part(Tracer):
    """Records selected layers of one model from now on.

    What goes wrong is said once, and the script goes on without it; unless it asked to be stopped
    by a residual or by a sink that fails.

    Args:
        model: That the layers are in.
        selections: The layers, and what is recorded of them.
        path: Of the file.
        mode: For a file that exists.
        stamp: Which part of which run it is, and which shard, among the options of the trace.
        settings: Of the run.
        report: Where calls are counted, and what goes wrong is said.
        limits: What the whole run may become.

    Raises:
        GrutraceError: The file cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        selections: list[Selection],
        path: Path,
        mode: Mode,
        stamp: Mapping[str, object],
        settings: Settings,
        report: Report,
        limits: Limits,
    ) -> None:
        self._chosen, self._stamp, self._report = selections, stamp, report
        self._limits_of_run = limits
        super().__init__(
            model,
            path,
            mode=mode,
            shard=False,
            stacks=settings.stacks,  # type: ignore[arg-type]
            check=settings.check,  # type: ignore[arg-type]
            gates=settings.gates,  # type: ignore[arg-type]
            every=settings.every,
            max_calls=settings.max_calls,
            max_bytes=settings.max_bytes,
            dtype=settings.dtype,
            steps=None if settings.steps is None else texts.steps(settings.steps),
            units=None if settings.units is None else texts.units(settings.units),
            on_error=settings.on_error,  # type: ignore[arg-type]
            fsync=settings.fsync,
            compression=settings.compression,  # type: ignore[arg-type]
            weights=settings.weights,  # type: ignore[arg-type]
            compiled=settings.compiled,  # type: ignore[arg-type]
            state_memory=STATE_MEMORY if settings.state_memory is None else settings.state_memory,
        )
        self.tally = Tally(path, len(self.sites))
        self.start()

    def finish(self) -> None:
        """Stop recording and close the file.

        Raises:
            SinkError: Rows could not be stored, and the script asked to be told so.
        """
        self._finish()
        try:
            self._say_news()
        except ResidualError as error:
            # There is no call of the script's left to raise it.
            self._report.say(str(error))

    def follow(self, layer: GRUModule) -> None:
        """Record another layer in the place of the only one, which is gone."""
        self._subscribe(0, layer)

    def _select(self, *_: object) -> list[Selection]:
        return self._chosen

    def _limit(self, *_: object) -> Limits:
        return self._limits_of_run

    def _receive(self, index: int, run: KernelRun | Missed) -> None:
        if self.tally.failed or os.getpid() != self._process:
            return
        try:
            super()._receive(index, run)
        except (ResidualError, SinkError):
            # Those that the script asked for: others do not get here.
            raise
        except Exception as error:
            self._fail(error)

    def _drain(self) -> None:
        try:
            super()._drain()
        except SinkError:
            raise
        except Exception as error:
            self._fail(error)
        self.tally.calls = self._outlet.blocks

    def _fail(self, error: Exception) -> None:
        """Record nothing more, and say why, once."""
        if not self.tally.failed:
            self.tally.failed = True
            self._report.say(f"nothing more is recorded of {', '.join(self.sites)}: {error}")

    def _say_losses(self, stored: int, lost: int) -> None:
        self.tally.calls, self.tally.lost = stored, lost

    def _warn_once(
        self,
        about: str,
        message: str,
        category: type[GrutraceWarning] = GrutraceWarning,  # noqa: ARG002
    ) -> None:
        if about not in self._warned:
            self._warned.add(about)
            self._report.say(message)
