"""A new trace file, and one that is gone on with, open for a writer and marked as being written.

HDF5 2.0 may end the process when it cannot write what it creates, or the mark of a file that it has
open already. So a file is created in memory, and marked as it is opened.

Whether a trace can go on in an existing file, and where.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import h5py

from grutrace.distributed import Shard
from grutrace.errors import TraceFileError
from grutrace.records import TraceHeader
from grutrace.storage.format.dimension_scales import create_scales
from grutrace.storage.format.header import (
    describe_difference,
    module_differences,
    read_header,
    write_header,
)
from grutrace.storage.format.schema import (
    LIBVER,
    check_dataset,
    create_datasets,
    create_growing_dataset,
    dataset_specs,
)
from grutrace.storage.format.shard_stamp import read_merged_shards, read_shard
from grutrace.storage.format.tables import TableReader, Tables, dataset_lengths
from grutrace.storage.hdf5.atomic_write import translate_write_errors
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.filters import compression_of, filter_options
from grutrace.storage.hdf5.handle import SharedReadHandle, close_readers
from grutrace.storage.hdf5.locks import is_locked
from grutrace.storage.hdf5.safe_open import open_locked
from grutrace.storage.hdf5.superblock import image_bytes

#: By its place in the file, how many items a dataset holds.
Items: TypeAlias = Mapping[str, int]


def create(path: Path, new: Path, header: TraceHeader, items: Items | None = None) -> h5py.File:
    """A new file with everything in it but data.

    Args:
        path: What errors name.
        new: Where it is.
        header: Of the trace.
        items: As for `trace_image`.

    Raises:
        TraceFileError: It cannot be created.
    """
    with translate_write_errors(path, "created"):
        content = trace_image(header, items)
        with new.open("xb") as file:
            file.write(content)
        return open_to_write(new)


def trace_image(
    header: TraceHeader, items: Items | None = None, fill: Callable[[h5py.File], None] | None = None
) -> bytes:
    """The bytes of a new file, made in memory.

    Args:
        header: Of the trace.
        items: By place, how many items each dataset will hold, if chunks are to be no larger.
        fill: Puts data in; there are none unless it is given.
    """
    # Another thread may make one at this moment: HDF5 would take them for the same file.
    name = f"memory-{secrets.token_hex(8)}"
    with h5py.File(name, "w", libver=LIBVER, driver="core", backing_store=False) as memory:
        write_header(memory, header)
        packed = filter_options(compression_of(header))
        create = partial(create_growing_dataset, packed=packed, items=items)
        create_datasets(memory, header.modules, create)
        create_scales(memory, header.modules)
        if fill is not None:
            fill(memory)
        return image_bytes(memory)


def reopen(path: Path) -> h5py.File:
    """A file that there is.

    Raises:
        TraceFileError: It cannot be opened to write to it.
    """
    status = path.stat()
    with translate_write_errors(path, "appended to"), close_readers((status.st_dev, status.st_ino)):
        return open_to_write(path)


def open_to_write(path: Path) -> h5py.File:
    """A file of ours, open for SWMR writing and marked so.

    Raises:
        OSError: It cannot be opened.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    bounds = [getattr(h5py.h5f, f"LIBVER_{name.upper()}") for name in LIBVER]
    access.set_libver_bounds(*bounds)
    # Rows are written as they come, so HDF5 need not keep chunks for us: with no chunk cache it
    # writes straight from our arrays, which is 3.7 GB/s instead of 2.8, and costs no memory per
    # dataset.
    cache = list(access.get_cache())
    cache[2] = 0
    access.set_cache(*cache)
    _keep_metadata(access)
    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    return h5py.File(open_locked(path, flags, access))


def _keep_metadata(access: h5py.h5p.PropFAID) -> None:
    """Have HDF5 keep what it knows of a file's structures for as long as it is open.

    What HDF5 2.0 takes out of its cache while a file is written for SWMR readers, it may take apart
    twice when it needs it again: seen with 600 sites, where that ended the process. To keep it all
    takes a few KiB a dataset, and 8 bytes a chunk: some 32 MiB for a TiB of rows.
    """
    metadata = access.get_mdc_config()
    # Nothing may be kept for good in a cache whose size changes by itself.
    metadata.incr_mode = metadata.flash_incr_mode = metadata.decr_mode = 0
    metadata.evictions_enabled = False
    access.set_mdc_config(metadata)


def existing_trace(path: Path, header: TraceHeader) -> tuple[TraceHeader, Tables]:
    """The header and tables of a trace that one with this header can be appended to.

    Raises:
        TraceFileError: The file is no trace, was not closed, or is of other modules; the message
            says what differs.
    """
    with translate_read_errors(path):
        handle = SharedReadHandle(path)
        try:
            with handle.acquire() as file:
                before = read_header(file)
                merged, shard = read_merged_shards(before), read_shard(before)
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


def _checked_tables(handle: SharedReadHandle, header: TraceHeader) -> Tables:
    tables = TableReader(handle, header.modules).read()
    counts = dataset_lengths(tables, header.modules)
    for place, column in dataset_specs(header.modules).items():
        check_dataset(handle.dataset(place, counts[place]), place, column)
    return tables


def _differences(before: TraceHeader, now: TraceHeader, shard: Shard | None) -> Iterator[str]:
    here = read_shard(now)
    if shard and here and (shard.rank, shard.world_size) != (here.rank, here.world_size):
        yield describe_difference(
            "shard", *(f"{each.rank} of {each.world_size}" for each in (shard, here))
        )
    paths = [module.path for module in before.modules]
    if paths != [module.path for module in now.modules]:
        yield describe_difference("modules", paths, [module.path for module in now.modules])
    for module, other in zip(before.modules, now.modules, strict=False):
        yield from module_differences(module, other)
