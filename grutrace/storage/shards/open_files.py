"""Open files by path or glob: one file, all parts of a run, or the shards of several processes.

docs/format.md defines the names of shards and the option that identifies them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from grutrace.distributed import Shard
from grutrace.errors import GrutraceWarning, OptionError, TraceFileError, as_path, short_repr
from grutrace.storage.format.shard_stamp import read_merged_shards, read_shard
from grutrace.storage.format.tables import Tables
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.handle import release_on_exit
from grutrace.storage.interfaces import AppendOnlySource, Source
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.shards.concatenated import ConcatenatedSource
from grutrace.storage.shards.globs import is_glob, matching_files
from grutrace.storage.shards.run_parts import RunSource, open_run, run_part_of

#: Missing ranks that a warning lists.
MAX_NAMED = 8

#: The source of one shard: a file, or the parts of a `grutrace run`.
ShardSource = FileSource | RunSource


def open_files(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Source:
    """Return the source of a file, of all parts of a run, or of several shards.

    Args:
        path: Path of a file; or a glob, or paths, of shards. An existing file takes precedence
            over a glob. The paths may include later parts of a run.

    Raises:
        OptionError: There is no path.
        TraceFileError: A file cannot be read, is not a shard although there are several files, or
            belongs to another run or model; or two files have the same rank.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if not is_glob(text) or os.path.exists(text):
            source = open_run(path)
            _warn_unmerged_ranks(source)
            return source
        found = matching_files(text)
        if not found:
            raise TraceFileError(f"{text} does not exist, and no file matches it")
        if len(found) > 1 or _is_shard(found[0]):
            return _open_shards(text, text, found)
        return open_run(found[0])
    expected = "the path of a trace, a glob, or the paths of several shards"
    if isinstance(path, (bytes, bytearray)) or not isinstance(path, Iterable):
        raise OptionError(f"path: expected {expected}; found {short_repr(path)}")
    paths = [as_path(each) for each in path]
    if not paths:
        raise OptionError(f"path: expected {expected}; found none")
    if len(paths) == 1:
        return open_run(paths[0])
    return _open_shards(f"{os.fspath(paths[0])} and {len(paths) - 1} more", None, paths)


def _open_shards(
    name: str, pattern: str | None, paths: Sequence[str | os.PathLike[str]]
) -> ShardsSource:
    opened = _open_all(paths)
    try:
        source = ShardsSource(name, pattern, opened)
        _warn_missing_ranks(name, source.missing, opened[0][0].world_size, "no file of")
    except BaseException:
        _close(opened)
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


def _warn_missing_ranks(name: str, missing: Sequence[int], world_size: int, what: str) -> None:
    if missing:
        few = ", ".join(map(str, missing[:MAX_NAMED])) + " and others" * (len(missing) > MAX_NAMED)
        warnings.warn(
            f"{name}: of {world_size} ranks there is {what} {few}", GrutraceWarning, stacklevel=5
        )


def _is_shard(path: str) -> bool:
    source = FileSource(path)
    try:
        return read_shard(source.header) is not None
    finally:
        source.close()


class ShardsSource(ConcatenatedSource):
    """Shards in files as one `Source`.

    Args:
        name: Name of the whole, for messages.
        pattern: A glob for the files of missing ranks, which may be created later.
        opened: The shards and their sources, in the order of the ranks.

    Raises:
        TraceFileError: The shards belong to different runs or models.
    """

    def __init__(
        self, name: str, pattern: str | None, opened: Sequence[tuple[Shard, ShardSource]]
    ) -> None:
        self._pattern = pattern
        _require_one_run(opened)
        shards, sources = zip(*opened, strict=True)
        super().__init__(name, shards, sources)

    @property
    def missing(self) -> list[int]:
        """The ranks without a file."""
        present = {shard.rank for shard in self._shards}
        return [rank for rank in range(self._shards[0].world_size) if rank not in present]

    def refresh(self) -> Tables:
        """Return the present tables, including those of new ranks."""
        if self._pattern is not None and self.missing:
            known = _real_paths(self.files)
            new = [
                each
                for each in matching_files(self._pattern)
                if os.path.realpath(each) not in known
            ]
            opened = _open_all(new, allow_orphans=True)
            try:
                _require_one_run([*zip(self._shards, self._sources, strict=True), *opened])
                for shard, source in opened:
                    self.add(shard, source)
            except BaseException:
                _close(opened)
                raise
        return super().refresh()


def _open_all(
    paths: Iterable[str | os.PathLike[str]], *, allow_orphans: bool = False
) -> list[tuple[Shard, ShardSource]]:
    """Open the shards in these files, in the order of their ranks, each with all parts of its run.

    Args:
        paths: Paths of the files. Later parts of a run are opened with its first part.
        allow_orphans: Whether parts may exist without the first.
    """
    opened: list[tuple[Shard, ShardSource]] = []
    parts: list[str] = []
    try:
        for path in paths:
            source = open_run(path)
            opened.append((_require_shard(source, path), source))
            # Refreshing finds the parts of the run. Released at once: there may be many shards.
            with release_on_exit():
                source.refresh()
            stamp = run_part_of(source.header.options)
            if stamp is not None and stamp.part > 1:
                parts.append(os.path.realpath(path))
                opened.pop()[1].close()
        known = {file for _, source in opened for file in _real_paths(source.files)}
        for part in parts:
            if part not in known and not allow_orphans:
                raise TraceFileError(f"{part} is part of a run whose first file is missing")
    except BaseException:
        _close(opened)
        raise
    return sorted(opened, key=lambda each: each[0].rank)


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


def _require_one_run(opened: Sequence[tuple[Shard, AppendOnlySource]]) -> None:
    """Check that the shards belong to one run and have different ranks."""
    first, of_first = next((each for each in opened if each[0].id is not None), opened[0])
    by_rank: dict[int, AppendOnlySource] = {}
    for shard, source in opened:
        both = f"{of_first.name} and {source.name}"
        if shard.id is not None and shard.id != first.id:
            raise TraceFileError(f"{both} are shards of different runs")
        if shard.world_size != first.world_size:
            raise TraceFileError(
                f"{both} are shards of different runs: of {first.world_size} and of "
                f"{shard.world_size} processes"
            )
        other = by_rank.setdefault(shard.rank, source)
        if other is not source:
            raise TraceFileError(f"{other.name} and {source.name} are both of rank {shard.rank}")


def _real_paths(files: Iterable[Path]) -> set[str]:
    return {os.path.realpath(file) for file in files}


def _close(opened: Iterable[tuple[Shard, ShardSource]]) -> None:
    for _, source in opened:
        source.close()
