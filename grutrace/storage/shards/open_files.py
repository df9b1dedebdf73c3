"""Open files by path or glob: one file, all parts of a run, or the shards of several processes.

docs/format.md defines the names of shards and the option that identifies them.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grutrace.distributed import Shard
from grutrace.errors import GrutraceWarning, OptionError, TraceFileError, as_path, short_repr
from grutrace.storage.format.shard_stamp import read_merged_shards, read_shard
from grutrace.storage.format.tables import Tables
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.handle import release_on_exit
from grutrace.storage.hdf5.remote import is_url
from grutrace.storage.interfaces import AppendOnlySource, Source
from grutrace.storage.read.file_source import FileSource, RemoteSource
from grutrace.storage.shards.concatenated import ConcatenatedSource
from grutrace.storage.shards.run_parts import RunSource, open_run, run_part_of

#: Characters that make a path a glob.
_MAGIC = re.compile(r"[*?\[]")

#: Missing ranks that a warning lists.
MAX_NAMED = 8

#: The source of one shard: a file, or the parts of a `grutrace run`.
ShardSource = FileSource | RunSource


def open_files(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """Return the source of a file, of all parts of a run, or of several shards.

    Args:
        path: Path or URL of a file; or a glob, or paths, of shards. An existing file takes
            precedence over a glob. The paths may include later parts of a run.
        storage_options: Arguments for the file system of fsspec; only with a URL.

    Raises:
        OptionError: There is no path, a URL among several paths, or `storage_options` without one.
        MissingExtraError: A URL needs a library that is not installed.
        TraceFileError: A file cannot be read, is not a shard although there are several files, or
            belongs to another run or model; or two files have the same rank.
    """
    if isinstance(path, str) and is_url(path):
        return RemoteSource(path, storage_options or {})
    if storage_options is not None:
        raise OptionError(
            f"storage_options: expected None without a URL; found {short_repr(storage_options)}"
        )
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not is_glob(text) or os.path.exists(text):
            source = open_run(path)
            _warn_unmerged_ranks(source)
            return source
        files = matching_files(text)
        if not files:
            raise TraceFileError(f"{text} does not exist, and no file matches it")
        if len(files) > 1 or _is_shard(files[0]):
            return _open_shards(text, text, files)
        return open_run(files[0])
    expected = "the path of a trace, a glob, or the paths of several shards"
    if isinstance(path, (bytes, bytearray)) or not isinstance(path, Iterable):
        raise OptionError(f"path: expected {expected}; found {short_repr(path)}")
    items = list(path)
    urls = [item for item in items if isinstance(item, str) and is_url(item)]
    if urls:
        raise OptionError(
            f"path: expected one URL, or several paths on this machine; found {urls[0]} in a list. "
            "Merge shards with --copy into one file"
        )
    paths = [as_path(item) for item in items]
    if not paths:
        raise OptionError(f"path: expected {expected}; found none")
    if len(paths) == 1:
        return open_run(paths[0])
    return _open_shards(f"{os.fspath(paths[0])} and {len(paths) - 1} more", None, paths)


def _open_shards(
    name: str, pattern: str | None, paths: Sequence[str | os.PathLike[str]]
) -> ShardsSource:
    shards = _open_all(paths)
    try:
        source = ShardsSource(name, pattern, shards)
        _warn_missing_ranks(name, source.missing, shards[0].stamp.world_size, "no file of")
    except BaseException:
        _close(shards)
        raise
    return source


def _warn_unmerged_ranks(source: ShardSource) -> None:
    """Warn about ranks that are missing from a merged file."""
    merged = read_merged_shards(source.header)
    if merged:
        size = int(source.header.options["shards"]["world_size"])
        present = {shard.rank for shard in merged}
        _warn_missing_ranks(
            source.name, [rank for rank in range(size) if rank not in present], size, "nothing of"
        )


def _warn_missing_ranks(name: str, missing: Sequence[int], world_size: int, content: str) -> None:
    """Warn about missing ranks, if there are any.

    Args:
        name: Name of the trace.
        missing: The missing ranks.
        world_size: Number of all ranks.
        content: What is missing of them, as in "no file of".
    """
    if missing:
        ranks = ", ".join(map(str, missing[:MAX_NAMED]))
        ranks += " and others" * (len(missing) > MAX_NAMED)
        warnings.warn(
            f"{name}: of {world_size} ranks there is {content} {ranks}",
            GrutraceWarning,
            stacklevel=5,
        )


def _is_shard(path: str) -> bool:
    source = FileSource(path)
    try:
        return read_shard(source.header) is not None
    finally:
        source.close()


class _OpenShard(NamedTuple):
    """A shard in a file, and its open source."""

    stamp: Shard
    source: ShardSource


class ShardsSource(ConcatenatedSource):
    """Shards in files as one `Source`.

    Args:
        name: Name of the whole, for messages.
        pattern: A glob for the files of missing ranks, which may be created later.
        shards: The open shards, in the order of the ranks.

    Raises:
        TraceFileError: The shards belong to different runs or models.
    """

    def __init__(self, name: str, pattern: str | None, shards: Sequence[_OpenShard]) -> None:
        self._pattern = pattern
        _require_one_run(shards)
        stamps, sources = zip(*shards, strict=True)
        super().__init__(name, stamps, sources)

    @property
    def missing(self) -> list[int]:
        """The ranks without a file."""
        present = {shard.rank for shard in self._shards}
        return [rank for rank in range(self._shards[0].world_size) if rank not in present]

    def refresh(self) -> Tables:
        """Return the present tables, including those of new ranks."""
        if self._pattern is not None and self.missing:
            known_paths = _real_paths(self.files)
            new_paths = [
                path
                for path in matching_files(self._pattern)
                if os.path.realpath(path) not in known_paths
            ]
            new_shards = _open_all(new_paths, allow_orphans=True)
            try:
                _require_one_run([*zip(self._shards, self._sources, strict=True), *new_shards])
                for stamp, source in new_shards:
                    self.add(stamp, source)
            except BaseException:
                _close(new_shards)
                raise
        return super().refresh()


def _open_all(
    paths: Iterable[str | os.PathLike[str]], *, allow_orphans: bool = False
) -> list[_OpenShard]:
    """Open the shards in these files, in the order of their ranks, each with all parts of its run.

    Args:
        paths: Paths of the files. Later parts of a run are opened with its first part.
        allow_orphans: Whether parts may exist without the first.
    """
    shards: list[_OpenShard] = []
    later_parts: list[str] = []
    try:
        for path in paths:
            source = open_run(path)
            shards.append(_OpenShard(_require_shard(source, path), source))
            # Refreshing finds the parts of the run. Released at once: there may be many shards.
            with release_on_exit():
                source.refresh()
            run_part = run_part_of(source.header.options)
            if run_part is not None and run_part.part > 1:
                later_parts.append(os.path.realpath(path))
                shards.pop().source.close()
        open_paths = {path for shard in shards for path in _real_paths(shard.source.files)}
        for part in later_parts:
            if part not in open_paths and not allow_orphans:
                raise TraceFileError(f"{part} is part of a run whose first file is missing")
    except BaseException:
        _close(shards)
        raise
    return sorted(shards, key=lambda shard: shard.stamp.rank)


def _require_shard(source: ShardSource, path: str | os.PathLike[str]) -> Shard:
    try:
        with translate_read_errors(Path(path)):
            shard = read_shard(source.header)
        if shard is None:
            raise TraceFileError(
                f"{os.fspath(path)} cannot be read together with other files: it is not a shard. "
                "It was recorded by a single process, or is already merged"
            )
    except BaseException:
        source.close()
        raise
    return shard


def _require_one_run(shards: Sequence[tuple[Shard, AppendOnlySource]]) -> None:
    """Check that the shards belong to one run and have different ranks."""
    reference, reference_source = next(
        ((stamp, source) for stamp, source in shards if stamp.id is not None), shards[0]
    )
    by_rank: dict[int, AppendOnlySource] = {}
    for stamp, source in shards:
        names = f"{reference_source.name} and {source.name}"
        if stamp.id is not None and stamp.id != reference.id:
            raise TraceFileError(f"{names} are shards of different runs")
        if stamp.world_size != reference.world_size:
            raise TraceFileError(
                f"{names} are shards of different runs: of {reference.world_size} and of "
                f"{stamp.world_size} processes"
            )
        same_rank = by_rank.setdefault(stamp.rank, source)
        if same_rank is not source:
            raise TraceFileError(
                f"{same_rank.name} and {source.name} are both of rank {stamp.rank}"
            )


def _real_paths(files: Iterable[Path]) -> set[str]:
    return {os.path.realpath(file) for file in files}


def _close(shards: Iterable[_OpenShard]) -> None:
    for shard in shards:
        shard.source.close()


def is_glob(path: str) -> bool:
    """Return whether a path contains glob characters."""
    return bool(_MAGIC.search(path))


def matching_files(pattern: str) -> list[str]:
    """Return the files that match a glob, sorted.

    An existing folder takes precedence over a glob: ``runs [1]`` is the folder of that name. If a
    name matches nothing, its brackets are literal: ``run[1].rank*.h5`` matches the shards of
    ``run[1].h5``.
    """
    drive, tail = os.path.splitdrive(pattern)
    component_pattern = r"[^/\\]*[/\\]+|[^/\\]+$" if os.sep == "\\" else r"[^/]*/+|[^/]+$"
    paths = [drive]
    for component in re.findall(component_pattern, tail):
        paths = [path for folder in paths for path in _matching(folder, component)]
    return sorted(path for path in paths if os.path.isfile(path))


def _matching(folder: str, component: str) -> list[str]:
    """Return the paths in a folder that match one component of a glob."""
    literal = folder + component
    if not is_glob(component) or os.path.lexists(literal):
        return [literal]
    prefix = glob.escape(folder)
    return glob.glob(prefix + component) or glob.glob(prefix + component.replace("[", "[[]"))
