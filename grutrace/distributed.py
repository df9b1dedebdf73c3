"""Shards of distributed runs: rank and world size of this process, and the path of its file.

This module does not import torch, so that it works without. It reads torch.distributed only if the
program has imported it.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from grutrace.errors import OptionError, short_repr

#: Value of the option `shard`: True (ask torch.distributed), False, or (rank, world size).
ShardOption: TypeAlias = bool | tuple[int, int]

#: Key in the store of the process group for the run's id, which all ranks share.
_STORE_KEY = "grutrace/run"

_EXPECTED = "True, False, or (rank, world size) with 0 <= rank < world size"


@dataclass(frozen=True)
class Shard:
    """A shard of a trace: the file that one rank of a distributed run writes.

    Attributes:
        rank: Rank of the process that writes the file, from 0.
        world_size: Number of processes.
        id: Id of the run, equal in all its shards; None if the processes could not share one.
    """

    rank: int
    world_size: int
    id: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The entry for the options of the trace."""
        return {"shard": {"rank": self.rank, "world_size": self.world_size, "id": self.id}}

    def path(self, path: str | os.PathLike[str]) -> Path:
        """Return the path of this shard, from the path that a single process would write."""
        base = Path(path)
        return base.with_name(f"{base.stem}.rank{self.rank:04}{base.suffix}")


def shard_path(path: Path, shard: Shard | None) -> Path:
    """Return the path of the shard's file; the path itself if there is no shard."""
    return path if shard is None else shard.path(path)


def resolve_shard(option: ShardOption = True) -> Shard | None:
    """Return the shard that this process writes; None if it writes a file of its own.

    Raises:
        OptionError: The option has an invalid value.
    """
    if option is True:
        return detect_shard()
    if option is False:
        return None
    try:
        rank, world_size = map(operator.index, option)
    except (TypeError, ValueError):
        raise OptionError(f"shard: expected {_EXPECTED}; found {short_repr(option)}") from None
    if not 0 <= rank < world_size:
        raise OptionError(f"shard: expected {_EXPECTED}; found {short_repr(option)}")
    return Shard(rank, world_size)


def detect_shard() -> Shard | None:
    """Return the shard of this process, from torch.distributed or torchrun; None for one process.

    This function never waits for another rank, because other ranks may not trace.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        return Shard(rank, world_size, _shared_run_id(distributed)) if world_size > 1 else None
    return _shard_from_torchrun(os.environ)


def _shared_run_id(distributed: Any) -> str | None:
    """Return the run's id, which the first rank that asks writes to the process group's store.

    The store is a server in one of the processes, so this is not a collective operation. The store
    is not part of torch.distributed's public interface; without it there is no id.
    """
    with contextlib.suppress(Exception):
        store = distributed.distributed_c10d._get_default_store()
        # Stores the id if there is none, and returns the stored one.
        run_id = store.compare_set(_STORE_KEY, "", uuid.uuid4().hex)
        return str(run_id.decode("ascii"))
    return None


def _shard_from_torchrun(environment: Mapping[str, str]) -> Shard | None:
    """Return the shard from torchrun's environment variables; None without torchrun.

    The variables exist before the process group does. Other launchers set the same variables with
    other meanings, so they count only together with torchrun's own.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return Shard(rank, world_size) if 0 <= rank < world_size > 1 else None
