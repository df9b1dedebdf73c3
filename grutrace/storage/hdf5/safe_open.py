"""Opening an HDF5 file for reading that nobody vouches for: never a device, and never for ever.

What a file is that is no HDF5 file, from how it begins: so that an error can say it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import h5py
from h5py import h5f, h5p
from h5py._objects import phil

from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.locks import NO_LOCKS

#: How HDF5 files begin.
SIGNATURE = b"\x89HDF\r\n\x1a\n"

#: What is read of a file to tell. Bytes.
HEAD_BYTES = 4096

#: HDF5 looks for its signature at 0, and at these and so on if there is none. Bytes.
_USER_BLOCKS = (512, 1024, 2048)

_MAGIC_BYTES = {
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"CDF\x01": "a netCDF-3 file",
    b"CDF\x02": "a netCDF-3 file",
    b"\x0e\x03\x13\x01": "an HDF4 file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20": "a PyTorch checkpoint",
    b"\x80": "a pickle",
}


def sniff_format(head: bytes) -> str:
    """What a file is whose first bytes, up to `HEAD`, are these, and are not HDF5's."""
    if not head:
        return "an empty file"
    if any(head.startswith(SIGNATURE, place) for place in _USER_BLOCKS):
        return "an HDF5 file behind a block of something else"
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head[:512]:
            return "a PyTorch checkpoint"
        return "NumPy arrays (.npz)" if b".npy" in head[:512] else "a zip file"
    for beginning, kind in _MAGIC_BYTES.items():
        if head.startswith(beginning):
            return kind
    if not any(head):
        return "zeros"
    return "text" if _is_text(head) else "something else"


def _is_text(head: bytes) -> bool:
    try:
        # The last character may have been cut.
        text = head.decode("utf-8", "ignore" if len(head) == HEAD_BYTES else "strict")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


#: Memory in which HDF5 keeps the chunks of one dataset that were read last: four of rows. Bytes.
CHUNK_CACHE = 1024 * 1024

#: Places in the table of those chunks, a prime. HDF5 2.0 has 8191, which is 64 KiB for each dataset
#: that is open, and shards have thousands.
CHUNK_CACHE_SLOTS = 101

#: How often HDF5 reads a piece of its metadata that does not match its checksum, since a writer may
#: be putting it down. It waits for a nanosecond, then for two, then four; left alone, it tries 100
#: times. These are an eighth of a second together.
READ_ATTEMPTS = 27

#: By this variable users tell HDF5 whether to lock files.
_LOCKING = "HDF5_USE_FILE_LOCKING"

#: The two flags in HDF5's superblock of which a writer sets one.
_WRITER_FLAGS = 0b101


def open_for_reading(path: Path, what: str = "trace") -> h5py.File:
    """Open a file; for SWMR only where a writer has marked it.

    Args:
        path: Of the file.
        what: What it should be.

    Raises:
        TraceFileError: It is not there, or is no HDF5 file.
        OSError: HDF5 cannot open it.
    """
    head = _read_head(path)
    if not head.startswith(SIGNATURE):
        raise TraceFileError(
            f"{path} is no {what}: expected an HDF5 file that grutrace wrote, found "
            f"{sniff_format(head)}"
        )
    flags = h5f.ACC_RDONLY
    # In a damaged file SWMR reading waits that a writer puts the damage right: so it is for those
    # files only that may have one.
    if _flag_is_set(head):
        flags |= h5f.ACC_SWMR_READ
    return h5py.File(open_locked(path, flags, _access_properties()))


def open_locked(path: Path, flags: int, access: h5p.PropFAID) -> h5f.FileID:
    """Have HDF5 open a file, and lock it where the file system has locks.

    Raises:
        OSError: It cannot be opened.
    """
    # Best effort: but of all that a file system without locks may say, HDF5 lets only ENOSYS pass.
    access.set_file_locking(True, True)
    try:
        return h5f.open(os.fsencode(path), flags, fapl=access)
    except OSError as error:
        # What this process has open without locks, HDF5 opens again only without.
        if not _has_no_locks(error) and "locking flag values don't match" not in str(error):
            raise
    access.set_file_locking(False, True)
    try:
        return h5f.open(os.fsencode(path), flags, fapl=access)
    except OSError as error:
        if not _has_no_locks(error):
            raise
        # The variable counts more than what is asked for here.
        raise OSError(
            f"its file system has no locks, and the environment asks HDF5 for them: set "
            f"{_LOCKING}=FALSE (found {os.environ.get(_LOCKING)})"
        ) from error


def _has_no_locks(error: OSError) -> bool:
    found = re.search(r"unable to lock file, errno = (\d+)", str(error))
    return found is not None and int(found[1]) in NO_LOCKS


def has_writer_flag(path: Path) -> bool:
    """Whether a writer has the file open, or died.

    Raises:
        TraceFileError: It is not there.
    """
    return _flag_is_set(_read_head(path))


def _flag_is_set(head: bytes) -> bool:
    # From HDF5's superblock, version 2 or 3.
    return len(head) >= 12 and head[8] >= 2 and bool(head[11] & _WRITER_FLAGS)


@contextmanager
def disable_plugins() -> Iterator[None]:
    """Have HDF5 load no filter from the folders that the environment names, in this process.

    For a process that does nothing but read a file: the names in a group can be packed, too, which
    cannot be seen before they are read.
    """
    before = ctypes.c_uint(0)
    with contextlib.suppress(OSError, AttributeError), phil:
        _hdf5().H5PLget_loading_state(ctypes.byref(before))
        _hdf5().H5PLset_loading_state(ctypes.c_uint(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError), phil:
            _hdf5().H5PLset_loading_state(before)


@cache
def _hdf5() -> ctypes.PyDLL:
    """HDF5 itself, for what h5py does not pass on. It is found among what a module of h5py needs.

    Raises:
        OSError: It cannot be reached here.
    """
    return ctypes.PyDLL(h5p.__file__)


def _read_head(path: Path) -> bytes:
    if not path.is_file():
        # Opening a pipe would wait for whoever writes to it, and a device may have no end.
        raise TraceFileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _access_properties() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    metadata, _, _, preference = access.get_cache()
    access.set_cache(metadata, CHUNK_CACHE_SLOTS, CHUNK_CACHE, preference)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    # Where HDF5 cannot be reached, it waits for as long as it does.
    with contextlib.suppress(OSError, AttributeError), phil:
        number = ctypes.c_int64(access.id)
        _hdf5().H5Pset_metadata_read_attempts(number, ctypes.c_uint(READ_ATTEMPTS))
    return access
