"""The shard entries in the options of a header.

`shard` identifies the shard that a file is; `shards` lists those that a file was merged from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from grutrace.distributed import Shard
from grutrace.records import TraceHeader
from grutrace.storage.hdf5.errors import FormatError

_SHARD = "attribute 'options', shard"
_SHARDS = "attribute 'options', shards"


@dataclass(frozen=True)
class MergedShard:
    """A shard that a file was merged from.

    Attributes:
        rank: Rank of the process that wrote it.
        calls: Number of its calls.
        closed: Whether it was closed in order.
        files: Files that hold its rows: the time when each was begun, in seconds since the epoch,
            by file name. They are in the folder of the merged file. Empty if rows were copied.
    """

    rank: int
    calls: int
    closed: bool
    files: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return the entry as it is stored in the options."""
        return {
            "rank": self.rank,
            "calls": self.calls,
            "closed": self.closed,
            "files": self.files,
        }


def read_shard(header: TraceHeader) -> Shard | None:
    """Read which shard of a run a trace is. None if it is not a shard.

    Raises:
        FormatError: The entry is damaged.
    """
    entry = header.options.get("shard")
    if entry is None:
        return None
    if isinstance(entry, dict):
        rank, world_size, run = entry.get("rank"), entry.get("world_size"), entry.get("id")
        if _is_count(rank) and _is_count(world_size) and rank < world_size and _is_id(run):
            return Shard(rank, world_size, run)
    raise FormatError(_SHARD, "integers 'rank' < 'world_size', and an 'id'", entry)


def read_merged_shards(header: TraceHeader) -> tuple[MergedShard, ...]:
    """Read the shards that a file was merged from, ordered by rank. Empty if it was not merged.

    Raises:
        FormatError: The entry is damaged.
    """
    entry = header.options.get("shards")
    if entry is None:
        return ()
    if isinstance(entry, dict) and isinstance(entry.get("of"), list):
        shards = [_read_merged_shard(shard) for shard in entry["of"]]
        ranks = [shard.rank for shard in shards]
        size = entry.get("world_size")
        if shards and _is_count(size) and ranks == sorted(set(ranks)) and ranks[-1] < size:
            return tuple(shards)
    raise FormatError(
        _SHARDS,
        "an integer 'world_size', and a list 'of' of shards with increasing ranks below it",
        entry,
    )


def merged_options(options: Mapping[str, Any], shards: Sequence[MergedShard]) -> dict[str, Any]:
    """Return the options of a merged trace, with the entries of its shards."""
    if not shards:
        return dict(options)
    entry = {**options["shards"], "of": [shard.as_json() for shard in shards]}
    return {**options, "shards": entry}


def _read_merged_shard(entry: Any) -> MergedShard:
    if isinstance(entry, dict) and isinstance(entry.get("files"), dict):
        rank, calls, files = entry.get("rank"), entry.get("calls"), entry["files"]
        if _is_count(rank) and _is_count(calls) and all(map(_is_time, files.values())):
            return MergedShard(rank, calls, entry.get("closed") is True, files)
    raise FormatError(_SHARDS, "shards with 'rank', 'calls', and times of 'files'", entry)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**32


def _is_time(value: Any) -> bool:
    return type(value) is float


def _is_id(value: Any) -> bool:
    return value is None or isinstance(value, str)
