"""Where a tracer writes its trace: memory, a file (one per rank), or a sink of the user."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import nn

from grutrace.capture.options import Options, collect_versions
from grutrace.capture.recording.background import BackgroundReplay
from grutrace.capture.recording.guarded_sink import GuardedSink
from grutrace.capture.selection import SelectedModule
from grutrace.distributed import ShardOption, resolve_shard, shard_path
from grutrace.errors import TraceFileError, as_path
from grutrace.options import Mode
from grutrace.records import TraceHeader
from grutrace.storage.interfaces import InMemorySource
from grutrace.storage.open import SinkFactory, open_sink, open_source, recorded_calls


class TraceOutput:
    """The header and the sink of a new trace, and the source that reads it back.

    Args:
        model: The model.
        selections: The recorded modules, with the options applied.
        options: Options of the tracer.
        path: Path of the file; None for a trace in memory, or in the sink of a factory.
        mode: What to do if the file exists.
        factory: Creates the sink; only without a path.
        shard: Whether to write one file per rank of a distributed run.
        extra_options: Further entries for the options of the trace.

    Attributes:
        guarded_sink: The sink.
        source: Reads the trace.
        memory: The same source if the trace is in memory, else None.
        background: Computes gates from copies, outside the model's call; None if it is not used.
        calls_before: Number of calls that the trace had before this recording. Negative once rows
            were cleared.

    Raises:
        OptionError: The path, the factory or the shard is invalid, or both path and factory are
            given.
        TraceFileError: The file exists, or cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        selections: Sequence[SelectedModule],
        options: Options,
        path: str | os.PathLike[str] | None,
        mode: Mode,
        factory: SinkFactory | None = None,
        shard: ShardOption = True,
        extra_options: Mapping[str, object] | None = None,
    ) -> None:
        own_shard = None
        if path is not None or factory is not None:
            own_shard = resolve_shard(shard)
        if path is not None:
            path = shard_path(as_path(path), own_shard)
        header = TraceHeader(
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            created=time.time(),
            versions=collect_versions(),
            options={
                **options.as_json(),
                **(extra_options or {}),
                **(own_shard.options if own_shard else {}),
            },
            modules=tuple(selection.description for selection in selections),
        )
        self.background = None
        if options.gates == "background":
            self.background = BackgroundReplay(header.modules, own_thread=path is not None)
        self.guarded_sink = GuardedSink(
            open_sink(path, header, mode, factory, self.background, fsync=options.fsync)
        )
        self.source = open_source(self.guarded_sink.sink)
        self.memory = self.source if isinstance(self.source, InMemorySource) else None
        self.calls_before = recorded_calls(self.source)
        if self.background is not None:
            self.background.calls = self.calls_before

    def count_calls(self) -> tuple[int, int]:
        """Return the numbers of stored and of lost calls. In an unreadable file all are lost."""
        stored = 0
        with suppress(TraceFileError):
            stored = recorded_calls(self.source) - self.calls_before
        return stored, self.guarded_sink.calls - stored

    def restart_counts(self) -> None:
        """Count calls from 0 again, after the rows of a trace in memory were removed."""
        self.calls_before = -self.guarded_sink.call_records
        if self.background is not None:
            self.background.reset()
