"""Which process of how many this is, and how its file is named: for runs of several processes.

torch is not imported here, only looked at where the program has loaded it: so this can be asked
by what must work without.
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

#: Whether a file is a shard: as torch.distributed says; no; or of which rank of how many.
ShardOption: TypeAlias = bool | tuple[int, int]

#: Where the ranks of a process group agree on their run's id, in the group's own store.
_KEY = "grutrace/run"

_EXPECTED = "True, False, or (rank, world size) with 0 <= rank < world size"


@dataclass(frozen=True)
class Shard:
    """Which shard of a trace a file is.

    Attributes:
        rank: Of the process that writes it, from 0.
        world_size: How many processes there are.
        id: The same for all shards of a run and for no other's, where the processes could agree on
            one; else None.
    """

    rank: int
    world_size: int
    id: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The stamp among the options of a trace."""
        return {"shard": {"rank": self.rank, "world_size": self.world_size, "id": self.id}}

    def path(self, path: str | os.PathLike[str]) -> Path:
        """The file of this shard, by that which one process alone would write."""
        whole = Path(path)
        return whole.with_name(f"{whole.stem}.rank{self.rank:04}{whole.suffix}")


def shard_path(path: Path, shard: Shard | None) -> Path:
    """The file of a shard; or, of no shard, the file itself."""
    return path if shard is None else shard.path(path)


def resolve_shard(option: ShardOption = True) -> Shard | None:
    """The shard that this process writes, None for a file of its own.

    Raises:
        OptionError: The option has no such value.
    """
    if option is True:
        return detect_shard()
    if option is False:
        return None
    try:
        rank, world_size = (operator.index(each) for each in option)
    except (TypeError, ValueError):
        raise OptionError(f"shard: expected {_EXPECTED}; found {short_repr(option)}") from None
    if not 0 <= rank < world_size:
        raise OptionError(f"shard: expected {_EXPECTED}; found {short_repr(option)}")
    return Shard(rank, world_size)


def detect_shard() -> Shard | None:
    """The shard of this process, as torch.distributed or else torchrun has it; None if alone.

    Nothing here waits for another rank, which may not trace at all.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        return Shard(rank, world_size, _shared_run_id(distributed)) if world_size > 1 else None
    return _shard_from_torchrun(os.environ)


def _shared_run_id(distributed: Any) -> str | None:
    """What the first rank to ask has put into the store of the process group.

    The store is a server in one of the processes; asking it is no collective. It is not in the
    public interface of torch.distributed, and without it there is no id.
    """
    with contextlib.suppress(Exception):
        store = distributed.distributed_c10d._get_default_store()
        found = store.compare_set(_KEY, "", uuid.uuid4().hex)
        return str(found.decode("ascii"))
    return None


def _shard_from_torchrun(environment: Mapping[str, str]) -> Shard | None:
    """What torchrun tells its processes, before they have made a process group.

    Other launchers set the same variables for other ends: those are not believed.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return Shard(rank, world_size) if 0 <= rank < world_size > 1 else None
