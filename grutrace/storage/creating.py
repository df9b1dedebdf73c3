"""A new trace file, and one that is gone on with, open for a writer and marked as being written.

HDF5 2.0 may end the process when it cannot write what it creates, or the mark of a file that it has
open already. So a file is created in memory, and marked as it is opened.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import h5py

from grutrace.record import Header
from grutrace.storage.compression import compression_of, filter_options
from grutrace.storage.handle import readers_out
from grutrace.storage.header import write_header
from grutrace.storage.placing import naming
from grutrace.storage.scales import create_scales
from grutrace.storage.schema import LIBVER, create_column, create_datasets
from grutrace.storage.unmarked import image


def create(path: Path, new: Path, header: Header) -> h5py.File:
    """A new file with everything in it but data.

    Args:
        path: What errors name.
        new: Where it is.
        header: Of the trace.

    Raises:
        TraceFileError: It cannot be created.
    """
    with naming(path, "created"):
        with h5py.File(new, "w", libver=LIBVER, driver="core", backing_store=False) as memory:
            write_header(memory, header)
            packed = filter_options(compression_of(header))
            create_datasets(memory, header.modules, partial(create_column, packed=packed))
            create_scales(memory, header.modules)
            content = image(memory)
        with new.open("xb") as file:
            file.write(content)
        return _open(new)


def reopen(path: Path) -> h5py.File:
    """A file that there is.

    Raises:
        TraceFileError: It cannot be opened to write to it.
    """
    status = path.stat()
    with naming(path, "appended to"), readers_out((status.st_dev, status.st_ino)):
        return _open(path)


def _open(path: Path) -> h5py.File:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    bounds = [getattr(h5py.h5f, f"LIBVER_{name.upper()}") for name in LIBVER]
    access.set_libver_bounds(*bounds)
    # Best effort: some network file systems have no locks.
    access.set_file_locking(True, True)
    # Rows are written as they come, so HDF5 need not keep chunks for us: with no chunk cache it
    # writes straight from our arrays, which is 3.7 GB/s instead of 2.8, and costs no memory per
    # dataset.
    cache = list(access.get_cache())
    cache[2] = 0
    access.set_cache(*cache)
    _keep_metadata(access)
    flags = h5py.h5f.ACC_RDWR | h5py.h5f.ACC_SWMR_WRITE
    return h5py.File(h5py.h5f.open(os.fsencode(path), flags, access))


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
