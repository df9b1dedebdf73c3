"""Whether a trace can go on in an existing file, and where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.record import Header
from grutrace.shard import Shard
from grutrace.storage.committed import CommittedTables
from grutrace.storage.differences import difference, module_differences
from grutrace.storage.faults import reading
from grutrace.storage.handle import ReadHandle
from grutrace.storage.header import read_header
from grutrace.storage.locks import is_locked
from grutrace.storage.schema import check_column, layout
from grutrace.storage.stamps import merged_of, shard_of
from grutrace.storage.tables import Tables, lengths


def existing_trace(path: Path, header: Header) -> tuple[Header, Tables]:
    """The header and tables of a trace that one with this header can be appended to.

    Raises:
        TraceFileError: The file is no trace, was not closed, or is of other modules; the message
            says what differs.
    """
    with reading(path):
        handle = ReadHandle(path)
        try:
            with handle.lent() as file:
                before = read_header(file)
                merged, shard = merged_of(before), shard_of(before)
                # A writer would write to the shards, through the virtual datasets of this file.
                tables = None if merged else _checked_tables(handle, before)
        finally:
            handle.close()
    if tables is None:
        raise TraceFileError(f"{path} was merged of shards: nothing can be appended to it")
    if not tables.closed:
        writer = {
            True: "another process is writing it",
            False: "its writer died. `grutrace recover` makes a file of it that can",
            None: "its writer is still at work or died",
        }[is_locked(path)]
        raise TraceFileError(
            f"{path} was not closed in order, so nothing can be appended to it, though it can be "
            f"read with grutrace.open: {writer}"
        )
    for found in _differences(before, header, shard):
        raise TraceFileError(f"{path} holds another trace, which this one cannot go on: {found}")
    return before, tables


def _checked_tables(handle: ReadHandle, header: Header) -> Tables:
    tables = CommittedTables(handle, header.modules).read()
    counts = lengths(tables, header.modules)
    for place, column in layout(header.modules).items():
        check_column(handle.dataset(place, counts[place]), place, column)
    return tables


def _differences(before: Header, now: Header, shard: Shard | None) -> Iterator[str]:
    here = shard_of(now)
    if shard and here and (shard.rank, shard.world_size) != (here.rank, here.world_size):
        yield difference("shard", *(f"{each.rank} of {each.world_size}" for each in (shard, here)))
    paths = [module.path for module in before.modules]
    if paths != [module.path for module in now.modules]:
        yield difference("modules", paths, [module.path for module in now.modules])
    for module, other in zip(before.modules, now.modules, strict=False):
        yield from module_differences(module, other)
