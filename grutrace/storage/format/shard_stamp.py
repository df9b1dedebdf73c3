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
    found = header.options.get("shard")
    if found is None:
        return None
    if isinstance(found, dict):
        rank, world_size, run = found.get("rank"), found.get("world_size"), found.get("id")
        if _is_count(rank) and _is_count(world_size) and rank < world_size and _is_id(run):
            return Shard(rank, world_size, run)
    raise FormatError(_SHARD, "integers 'rank' < 'world_size', and an 'id'", found)


def read_merged_shards(header: TraceHeader) -> tuple[MergedShard, ...]:
    """Read the shards that a file was merged from, ordered by rank. Empty if it was not merged.

    Raises:
        FormatError: The entry is damaged.
    """
    found = header.options.get("shards")
    if found is None:
        return ()
    if isinstance(found, dict) and isinstance(found.get("of"), list):
        shards = [_read_merged_shard(each) for each in found["of"]]
        ranks = [shard.rank for shard in shards]
        size = found.get("world_size")
        if shards and _is_count(size) and ranks == sorted(set(ranks)) and ranks[-1] < size:
            return tuple(shards)
    raise FormatError(
        _SHARDS,
        "an integer 'world_size', and a list 'of' of shards with increasing ranks below it",
        found,
    )


def merged_options(options: Mapping[str, Any], shards: Sequence[MergedShard]) -> dict[str, Any]:
    """Return the options of a merged trace, with the entries of its shards."""
    if not shards:
        return dict(options)
    about = {**options["shards"], "of": [shard.as_json() for shard in shards]}
    return {**options, "shards": about}


def _read_merged_shard(found: Any) -> MergedShard:
    if isinstance(found, dict) and isinstance(found.get("files"), dict):
        rank, calls, files = found.get("rank"), found.get("calls"), found["files"]
        if _is_count(rank) and _is_count(calls) and all(map(_is_time, files.values())):
            return MergedShard(rank, calls, found.get("closed") is True, files)
    raise FormatError(_SHARDS, "shards with 'rank', 'calls', and times of 'files'", found)


def _is_count(found: Any) -> TypeGuard[int]:
    return type(found) is int and 0 <= found < 2**32


def _is_time(found: Any) -> bool:
    return type(found) is float


def _is_id(found: Any) -> bool:
    return found is None or isinstance(found, str)
