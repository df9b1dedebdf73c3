"""Create a trace file, or open an existing one to append to it.

HDF5 2.0 may crash if it cannot write a new file, or the writer flag of an open file. So a file is
created in memory, written by Python, and flagged when HDF5 opens it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import h5py

from grutrace.errors import TraceFileError
from grutrace.records import ModuleInfo, TraceHeader
from grutrace.storage.format.datasets import create_datasets, create_growing_dataset
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
    dataset_specs,
)
from grutrace.storage.format.shard_stamp import read_merged_shards, read_shard
from grutrace.storage.format.tables import TableReader, Tables, dataset_lengths
from grutrace.storage.hdf5.errors import translate_read_errors, translate_write_errors
from grutrace.storage.hdf5.filters import row_filters
from grutrace.storage.hdf5.handle import SharedReadHandle, close_readers
from grutrace.storage.hdf5.locks import is_locked
from grutrace.storage.hdf5.safe_open import open_locked
from grutrace.storage.hdf5.superblock import image_bytes

#: Number of items of each dataset, by its path in the file.
Items: TypeAlias = Mapping[str, int]


def create_file(
    path: Path, temporary: Path, header: TraceHeader, items: Items | None = None
) -> h5py.File:
    """Create a file with the header and empty datasets, and open it to write.

    Args:
        path: Final path, which errors name.
        temporary: Path at which the file is created.
        header: Header of the trace.
        items: As for `trace_image`.

    Raises:
        TraceFileError: The file cannot be created.
    """
    with translate_write_errors(path, "created"):
        content = trace_image(header, items)
        with temporary.open("xb") as stream:
            stream.write(content)
        return open_to_write(temporary)


def trace_image(
    header: TraceHeader, items: Items | None = None, fill: Callable[[h5py.File], None] | None = None
) -> bytes:
    """Return the bytes of a new file, built in memory.

    Args:
        header: Header of the trace.
        items: Final number of items of each dataset, if its chunks need hold no more.
        fill: Function that writes data to the datasets; they are empty without it.
    """
    # A random name: HDF5 would take two memory files with one name for the same file.
    name = f"memory-{secrets.token_hex(8)}"
    with h5py.File(name, "w", libver=LIBVER, driver="core", backing_store=False) as memory:
        write_header(memory, header)
        create_dataset = partial(
            create_growing_dataset, row_filters=row_filters(header), items=items
        )
        create_datasets(memory, header.modules, create_dataset)
        create_scales(memory, header.modules)
        if fill is not None:
            fill(memory)
        return image_bytes(memory)


def open_to_append(path: Path) -> h5py.File:
    """Open an existing file to append to it.

    Raises:
        TraceFileError: The file cannot be opened for writing.
    """
    status = path.stat()
    with translate_write_errors(path, "appended to"), close_readers((status.st_dev, status.st_ino)):
        return open_to_write(path)


def open_to_write(path: Path) -> h5py.File:
    """Open a file for SWMR writing, which sets its writer flag.

    Raises:
        OSError: The file cannot be opened.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    bounds = [getattr(h5py.h5f, f"LIBVER_{name.upper()}") for name in LIBVER]
    access.set_libver_bounds(*bounds)
    # Rows are written once, in order. Without a chunk cache HDF5 writes directly from our arrays:
    # 3.7 GB/s instead of 2.8, and no memory per dataset.
    cache = list(access.get_cache())
    cache[2] = 0
    access.set_cache(*cache)
    _keep_metadata(access)
    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    return h5py.File(open_locked(path, flags, access))


def _keep_metadata(access: h5py.h5p.PropFAID) -> None:
    """Keep all metadata of a file in HDF5's cache while the file is open.

    HDF5 2.0 may crash after it evicts metadata of a file that is open for SWMR writing; this
    happened with 600 sites. Keeping all metadata takes a few KiB a dataset and 8 bytes a chunk:
    about 32 MiB for one TiB of rows.
    """
    metadata = access.get_mdc_config()
    # HDF5 allows disabling evictions only if the cache size is fixed.
    metadata.incr_mode = metadata.flash_incr_mode = metadata.decr_mode = 0
    metadata.evictions_enabled = False
    access.set_mdc_config(metadata)


def load_for_append(path: Path, header: TraceHeader) -> tuple[TraceHeader, Tables]:
    """Read the header and tables of a trace, and check that this header can be appended to it.

    Raises:
        TraceFileError: The file is not a trace, was not closed in order, or has other modules.
            The message names the first difference.
    """
    with translate_read_errors(path):
        handle = SharedReadHandle(path)
        try:
            with handle.acquire() as file:
                stored_header = read_header(file)
                is_merged = bool(read_merged_shards(stored_header))
                stored_shard = read_shard(stored_header)
                # Writing to the virtual datasets of a merged file would change its shards.
                tables = None if is_merged else _checked_tables(handle, stored_header)
        finally:
            handle.close()
    if tables is None:
        raise TraceFileError(f"cannot append to {path}: it was merged from shards")
    if not tables.closed:
        writer = {
            True: "another process is writing it",
            False: "its writer died. Run `grutrace recover` to make a file that you can append to",
            None: "its writer is still running or died",
        }[is_locked(path)]
        raise TraceFileError(
            f"cannot append to {path}, which was not closed in order and can only be read with "
            f"grutrace.open: {writer}"
        )
    shard = read_shard(header)
    if stored_shard and shard:
        stored_rank = f"{stored_shard.rank} of {stored_shard.world_size}"
        rank = f"{shard.rank} of {shard.world_size}"
        if rank != stored_rank:
            difference = describe_difference(
                "rank", stored_rank, rank, ("the file", "this process")
            )
            raise TraceFileError(
                f"cannot append to {path}: it was recorded by another process: {difference}"
            )
    for difference in _differences(stored_header.modules, header.modules):
        raise TraceFileError(
            f"cannot append to {path}: it was recorded from a different model: {difference}"
        )
    return stored_header, tables


def _checked_tables(handle: SharedReadHandle, header: TraceHeader) -> Tables:
    tables = TableReader(handle, header.modules).read()
    counts = dataset_lengths(tables, header.modules)
    for dataset_path, spec in dataset_specs(header.modules).items():
        check_dataset(handle.dataset(dataset_path, counts[dataset_path]), dataset_path, spec)
    return tables


def _differences(stored: Sequence[ModuleInfo], modules: Sequence[ModuleInfo]) -> Iterator[str]:
    """Describe how the modules of a file differ from those of the model."""
    owners = "the file", "the model"
    stored_paths = [module.path for module in stored]
    paths = [module.path for module in modules]
    if stored_paths != paths:
        yield describe_difference("modules", stored_paths, paths, owners)
    for stored_module, module in zip(stored, modules, strict=False):
        yield from module_differences(stored_module, module, owners)
