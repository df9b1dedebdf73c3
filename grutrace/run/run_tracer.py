"""The parts of a run: a tracer and a file for each set of modules that is found together.

The tracer of a part never stops the script, unless an option asks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import uuid
import warnings
import weakref
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from grutrace.capture.kernel_calls.observation import GRUModule, KernelRun
from grutrace.capture.kernel_calls.torch_context import SkippedCall
from grutrace.capture.model_recorder import ModelRecorder
from grutrace.capture.options import Options
from grutrace.capture.recording.guarded_sink import RecordingLimits
from grutrace.capture.selection import SelectedModule, apply_options, records_gradient, select
from grutrace.capture.trace_output import TraceOutput
from grutrace.capture.tracer_warnings import TracerWarnings
from grutrace.distributed import detect_shard, shard_path
from grutrace.errors import GrutraceError, GrutraceWarning, ResidualError, SinkError, TraceFileError
from grutrace.options import DEFAULT_BUFFER, DEFAULT_STATE_MEMORY, Check, Mode
from grutrace.run import parsing
from grutrace.run.matching import require_match
from grutrace.run.report import PartStats, Report
from grutrace.run.settings import Settings
from grutrace.storage.shards.run_parts import (
    RunPart,
    part_path,
    parts_of,
    read_run_part,
    remove_parts,
    replaceable_parts,
)


def select_layers(
    model: nn.Module, layers: Sequence[nn.Module], settings: Settings
) -> list[SelectedModule]:
    """Select the sites of these layers that match a glob; empty if no glob matches.

    Raises:
        GrutraceError: The layers cannot be recorded.
    """
    layer_ids = {id(layer) for layer in layers}
    candidates = [
        selected
        for selected in select(model, record=settings.record)
        if id(selected.module) in layer_ids
    ]
    globs = settings.sites or ("*",)
    names = _site_names(candidates)
    matching = [glob for glob in globs if any(fnmatchcase(name, glob) for name in names)]
    if not matching:
        return []
    return [
        selected
        for selected in select(model, matching, settings.record)
        if id(selected.module) in layer_ids
    ]


def _site_names(selections: Sequence[SelectedModule]) -> list[str]:
    return [site.name for selected in selections for site in selected.description.sites]


class PartTracer(ModelRecorder):
    """Records selected layers of one model, and starts at once.

    An error is printed once, and the script continues untraced, unless `check` or `on_error` is
    "raise".

    Args:
        model: The model that contains the layers.
        selections: The layers, and the quantities to record.
        path: The file to write.
        mode: What happens to a file that exists.
        stamp: Options of the trace that identify the run, the part and the shard.
        settings: The settings of the run.
        report: Counts the calls and prints errors.
        limits: The limits of the whole run.

    Raises:
        GrutraceError: The file cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        selections: list[SelectedModule],
        path: Path,
        mode: Mode,
        stamp: Mapping[str, object],
        settings: Settings,
        report: Report,
        limits: RecordingLimits,
    ) -> None:
        options = Options(
            stacks=settings.stacks,  # type: ignore[arg-type]
            check=settings.check,  # type: ignore[arg-type]
            gates=settings.gates,  # type: ignore[arg-type]
            every=settings.every,
            max_calls=settings.max_calls,
            max_bytes=settings.max_bytes,
            dtype=settings.dtype,
            steps=None if settings.steps is None else parsing.parse_steps(settings.steps),
            units=None if settings.units is None else parsing.parse_units(settings.units),
            to_file=True,
            on_error=settings.on_error,  # type: ignore[arg-type]
            fsync=settings.fsync,
            compression=settings.compression,  # type: ignore[arg-type]
            checksums=settings.checksums,
            weights=settings.weights,  # type: ignore[arg-type]
            compiled=settings.compiled,  # type: ignore[arg-type]
            state_memory=DEFAULT_STATE_MEMORY
            if settings.state_memory is None
            else settings.state_memory,
            buffer=DEFAULT_BUFFER if settings.buffer is None else settings.buffer,
            records_gradient=records_gradient(selections),
        )
        selections = apply_options(selections, options)
        output = TraceOutput(
            model, selections, options, path, mode, shard=False, extra_options=stamp
        )
        self._sites = [
            site.name for selection in selections for site in selection.description.sites
        ]
        self._report, self.stats = report, PartStats(path, len(self._sites))
        warnings = PartWarnings(selections, options.check, report, self.stats)
        super().__init__(model, selections, options, output, limits, warnings)
        self.start()

    def finish(self) -> None:
        """Stop recording and close the file.

        Raises:
            SinkError: Rows could not be stored, and `on_error` is "raise".
        """
        self.close()
        try:
            self.report_findings()
        except ResidualError as error:
            # No call of the script is left that could raise it.
            self._report.log(str(error))

    def replace_layer(self, layer: GRUModule) -> None:
        """Record another layer as the only site, whose layer is freed."""
        with self._lock:
            self._attachment.subscribe(0, layer)

    def receive(self, index: int, run: KernelRun | SkippedCall) -> None:
        """Record a call. An error ends the recording, and the script continues."""
        if self.stats.failed or os.getpid() != self._process:
            return
        try:
            super().receive(index, run)
        except (ResidualError, SinkError):
            # Raised only if `check` or `on_error` is "raise".
            raise
        except Exception as error:
            self._stop_after_error(error)

    def drain(self, *, keep_waiting: bool = False) -> None:
        """Record the calls of the journal, and count them."""
        try:
            super().drain(keep_waiting=keep_waiting)
        except SinkError:
            raise
        except Exception as error:
            self._stop_after_error(error)
        self.stats.calls = self.output.guarded_sink.call_records

    def _stop_after_error(self, error: Exception) -> None:
        """Stop recording, and print the reason once."""
        if not self.stats.failed:
            self.stats.failed = True
            self._report.log(f"recording of {', '.join(self._sites)} stopped: {error}")


class PartWarnings(TracerWarnings):
    """Prints warnings as lines of the report, and counts lost calls.

    Args:
        selections: The recorded layers.
        check: What to do when a residual exceeds the tolerance.
        report: Prints the warnings.
        stats: Counts the lost calls.
    """

    def __init__(
        self,
        selections: Sequence[SelectedModule],
        check: Check,
        report: Report,
        stats: PartStats,
    ) -> None:
        super().__init__(selections, check)
        self._report, self._stats = report, stats

    def show(self, message: str, category: type[GrutraceWarning]) -> None:  # noqa: ARG002
        """Print a warning."""
        self._report.log(message)

    def lost_calls(self, trace: str, stored: int, lost: int) -> None:  # noqa: ARG002
        """Count the lost calls. The report names them at the end of the run."""
        self._stats.calls, self._stats.lost = stored, lost


class PartManager:
    """Starts a part for each set of layers, and closes all parts at the end of the process.

    It holds no reference to a model. When a model is freed, the file of its part is closed.

    Args:
        settings: The settings of the run.
        report: Counts the parts and prints errors.
    """

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        # Not earlier: by now the script may have initialized torch.distributed.
        self._shard = detect_shard()
        self._first_path = shard_path(Path(settings.output), self._shard)
        report.output = self._first_path
        self._limits = RecordingLimits(settings.max_calls, settings.max_bytes)
        self._process = os.getpid()
        self._unmatched = list(settings.sites)
        self._parts: list[PartTracer] = []
        self._run, self._existing_parts = self._find_existing_parts()
        self._count = len(self._existing_parts)
        # Registered after the handler of the sinks, so it runs before it at exit.
        atexit.register(self.close)

    def _find_existing_parts(self) -> tuple[str, dict[int, Path]]:
        """Return the id of the run, and the existing parts to append to, by number."""
        if self._settings.mode == "a" and self._first_path.exists():
            stamp = read_run_part(self._first_path)
            if stamp is not None:
                return stamp.run, dict(enumerate(parts_of(self._first_path), 1))
        return uuid.uuid4().hex, {}

    def add(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        known_layers: Container[nn.Module] = (),
        *,
        is_temporary: bool = False,
    ) -> PartTracer | None:
        """Start to record these layers of the model.

        Args:
            model: The model.
            layers: Some of its layers.
            known_layers: Layers that were seen before.
            is_temporary: Whether the part stays open when the model is freed, for a later layer.

        Returns:
            The part, or None if nothing is recorded.

        Raises:
            NoMatchingSite: Nothing was recorded so far, and no site matches ``--sites``.
            GrutraceError: The layers cannot be recorded.
        """
        if self._limits.reached:
            return None
        if self._report.part_stats:
            # An unused model in a reference cycle would keep its file open.
            gc.collect()
        # Ignore the filters of the script, which may turn warnings into errors.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            selections = select_layers(model, layers, self._settings)
        for warning in caught:
            self._report.log(str(warning.message))
        names = _site_names(selections)
        self._unmatched = [
            glob for glob in self._unmatched if not any(fnmatchcase(name, glob) for name in names)
        ]
        if not selections and not self._report.part_stats and self._settings.sites:
            require_match(model, layers, known_layers, self._settings.sites)
        if not selections:
            return None
        part = self._resume_part(model, selections) or self._new_part(model, selections)
        self._report.part_stats.append(part.stats)
        self._parts.append(part)
        if not is_temporary:
            weakref.finalize(model, self._finish_part, part).atexit = False
        return part

    def _resume_part(self, model: nn.Module, selections: list[SelectedModule]) -> PartTracer | None:
        """Append to the first unused existing part with exactly these modules."""
        for number, path in self._existing_parts.items():
            # Parts of other models, and parts that were not closed, cannot be appended to.
            with contextlib.suppress(TraceFileError):
                part = self._make_part(model, selections, path, "a", number)
                del self._existing_parts[number]
                return part
        return None

    def _new_part(self, model: nn.Module, selections: list[SelectedModule]) -> PartTracer:
        number = self._count + 1
        path = part_path(self._first_path, number)
        if number > 1 or self._settings.mode != "overwrite":
            part = self._make_part(model, selections, path, "w", number)
        else:
            replaced = replaceable_parts(self._first_path)
            part = self._make_part(model, selections, path, "overwrite", number)
            remove_parts(replaced)
        self._count = number
        return part

    def _make_part(
        self,
        model: nn.Module,
        selections: list[SelectedModule],
        path: Path,
        mode: Mode,
        number: int,
    ) -> PartTracer:
        stamp = RunPart(self._run, number)
        options = stamp.options | (self._shard.options if self._shard else {})
        return PartTracer(
            model, selections, path, mode, options, self._settings, self._report, self._limits
        )

    def close(self) -> None:
        """Close all parts."""
        if os.getpid() != self._process:
            return
        for part in tuple(self._parts):
            self._finish_part(part)
        for glob in self._unmatched:
            self._report.log(f"sites: {glob!r} matched no site of any model that was called")

    def _finish_part(self, part: PartTracer) -> None:
        if os.getpid() != self._process or part not in self._parts:
            return
        self._parts.remove(part)
        try:
            part.finish()
        except GrutraceError as error:
            self._report.log(str(error))
