"""The runs of a live view: traces by name, opened when they are first shown, and followed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grutrace.errors import GrutraceError, OptionError, TraceFileError, as_path, suggest_name
from grutrace.storage.hdf5.remote import is_url
from grutrace.storage.open import open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards.open_files import is_glob, matching_files

#: Names of shards, and of later parts of a run. docs/format.md defines them.
_SHARD = re.compile(r"(.+)\.rank\d{4,}$")
_LATER_PART = re.compile(r"(.+)\.part\d{4,}$")

#: Suffixes of the files of a folder that are its runs.
SUFFIXES = (".h5", ".hdf5")

#: A refresh is repeated after this many times its own duration, so that it takes a small share.
REST = 4


@dataclass
class Run:
    """A run: a trace file, all files of a `grutrace run`, or the shards of several processes.

    Attributes:
        name: Name of the run in the view.
        paths: Path or URL of the file, or paths of the shards.
    """

    name: str
    paths: tuple[Path | str, ...]
    _trace: Trace | None = None
    _next_refresh: float = 0.0

    @property
    def trace(self) -> Trace:
        """The trace, which is opened when it is first used.

        Raises:
            TraceFileError: The files cannot be opened.
        """
        if self._trace is None:
            self._trace = open_trace(self.paths[0] if len(self.paths) == 1 else self.paths)
        return self._trace

    def refresh(self) -> bool:
        """Read what a writer has committed; return whether anything is new.

        Called often, it refreshes only so often that it takes a fifth of the time.

        Raises:
            GrutraceError: The file is damaged.
        """
        trace, start = self.trace, time.perf_counter()
        if start < self._next_refresh:
            return False
        before = trace.snapshot
        if before.stored.closed:
            return False
        trace.refresh()
        now = time.perf_counter()
        self._next_refresh = now + REST * (now - start)
        return trace.snapshot is not before

    def close(self) -> None:
        """Close the files, if they are open."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None


class Runs:
    """The runs of a live view, by name. Nothing else can be opened by it.

    Args:
        runs: The runs, at least one.

    Attributes:
        rest_until: When work in the background may go on, on the clock of `time.perf_counter`. The
            pages share it, so that their work together leaves time for answers.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._by_name = {run.name: run for run in runs}
        self.rest_until = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._by_name)

    def __getitem__(self, name: str) -> Run:
        """Return the run of this name.

        Raises:
            OptionError: There is none.
        """
        if name not in self._by_name:
            near = suggest_name(name, self.names)
            raise OptionError(f"run: expected one of the runs of this view; found {name!r}{near}")
        return self._by_name[name]

    def close(self) -> None:
        """Close all files."""
        for run in self._by_name.values():
            run.close()


def find_runs(
    paths: str | os.PathLike[str] | Trace | Sequence[str | os.PathLike[str] | Trace],
) -> Runs:
    """Return the runs at these paths.

    Args:
        paths: A trace file or its URL, a glob, a folder, an open trace, or several of these. Shards
            whose names differ only in the rank are one run. A folder stands for the trace files in
            it.

    Raises:
        OptionError: There is no path.
        TraceFileError: A path does not exist, a folder has no trace files, or the only file cannot
            be opened.
    """
    if isinstance(paths, (str, os.PathLike, Trace)):
        paths = [paths]
    groups: dict[str, list[Path | str]] = {}
    traces: list[Trace] = []
    for path in paths:
        if isinstance(path, Trace):
            traces.append(path)
            continue
        if isinstance(path, str) and is_url(path):
            groups[path] = [path]
            continue
        for file in _files(as_path(path)):
            shard = _SHARD.match(file.stem)
            key = str(file.parent / shard[1]) if shard else str(file)
            files = groups.setdefault(key, [])
            if file not in files:
                files.append(file)
    if not groups and not traces:
        raise OptionError("path: expected a trace file, a glob or a folder; found none")
    names = _short_names([f"{key}" for key in groups])
    runs = [Run(name, tuple(files)) for name, files in zip(names, groups.values(), strict=True)]
    runs += [
        Run(f"trace {number}" if len(traces) > 1 else "trace", (), trace)
        for number, trace in enumerate(traces, 1)
    ]
    if len(runs) == 1:
        # An error is better before the browser opens.
        _ = runs[0].trace
    return Runs(runs)


def _files(path: Path) -> list[Path]:
    """Return the files that a path stands for."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        files = [file for file in files if file.is_file() and not _is_later_part(file)]
        if not files:
            raise TraceFileError(
                f"{path} has no trace files: expected files that end in {' or '.join(SUFFIXES)}"
            )
        return files
    if path.exists():
        return [path]
    files = [Path(file) for file in matching_files(str(path))] if is_glob(str(path)) else []
    if not files:
        raise TraceFileError(f"{path} does not exist, and no file matches it")
    return files


def _is_later_part(file: Path) -> bool:
    """Return whether a file is a later part of a run whose first part is beside it."""
    part = _LATER_PART.match(file.stem)
    return part is not None and file.with_name(part[1] + file.suffix).exists()


def _short_names(keys: Sequence[str]) -> list[str]:
    """Return names of files: without their folder, unless two have the same name."""
    names = [Path(key).name for key in keys]
    return [name if names.count(name) == 1 else key for name, key in zip(names, keys, strict=True)]


def open_error(run: Run) -> str | None:
    """Return why a run cannot be opened, or None."""
    try:
        _ = run.trace
    except GrutraceError as error:
        return str(error)
    return None
