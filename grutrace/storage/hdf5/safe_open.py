"""Open an untrusted HDF5 file for reading, without blocking on a device or a damaged file.

`sniff_format` names the kind of a file that is not HDF5, for error messages.
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
from grutrace.storage.hdf5.errors import TRACE
from grutrace.storage.hdf5.locks import NO_LOCKS
from grutrace.storage.hdf5.superblock import SIGNATURE

#: Bytes that are read from the beginning of a file to identify it.
HEAD_BYTES = 4096

#: Further offsets, in bytes, at which HDF5 searches for its signature after a user block.
_USER_BLOCKS = (512, 1024, 2048)

#: HDF5's chunk cache of one dataset, in bytes: four chunks of rows.
CHUNK_CACHE = 1024 * 1024

#: Slots in the hash table of that cache, a prime. The 8191 slots of HDF5 2.0 would take 64 KiB for
#: each open dataset, and shards have thousands.
CHUNK_CACHE_SLOTS = 101

#: How often HDF5 reads metadata whose checksum does not match, because a writer may be writing it.
#: The wait doubles from one nanosecond, so this takes an eighth of a second. The default of HDF5
#: is 100 tries.
READ_ATTEMPTS = 27

#: The environment variable that tells HDF5 whether to lock files.
_LOCKING = "HDF5_USE_FILE_LOCKING"

#: The two writer flags in the superblock of HDF5. A writer sets one of them.
_WRITER_FLAGS = 0b101

#: Kinds of files by their first bytes.
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


def open_for_reading(path: Path, expected: str = TRACE) -> h5py.File:
    """Open a file, in SWMR mode only if it has the flag of a writer.

    Args:
        path: Path of the file.
        expected: Expected kind of file, for the message.

    Raises:
        TraceFileError: The file does not exist or is not an HDF5 file.
        OSError: HDF5 cannot open the file.
    """
    head = _read_head(path)
    if not head.startswith(SIGNATURE):
        raise TraceFileError(f"{path} is not a {expected} (it is {sniff_format(head)})")
    flags = h5f.ACC_RDONLY
    # A SWMR reader of a damaged file waits for the writer to finish its write. So use SWMR only if
    # there may be a writer.
    if flag_is_set(head):
        flags |= h5f.ACC_SWMR_READ
    return h5py.File(open_locked(path, flags, _access_properties()))


def open_locked(path: Path, flags: int, access: h5p.PropFAID) -> h5f.FileID:
    """Open a file in HDF5, and lock it if the file system has locks.

    Raises:
        OSError: HDF5 cannot open the file.
    """
    # "Best effort" locking of HDF5 ignores ENOSYS only; file systems report other errors, too.
    access.set_file_locking(True, True)
    try:
        return h5f.open(os.fsencode(path), flags, fapl=access)
    except OSError as error:
        # HDF5 opens a file that this process has open without locks only without locks.
        if not _has_no_locks(error) and "locking flag values don't match" not in str(error):
            raise
    access.set_file_locking(False, True)
    try:
        return h5f.open(os.fsencode(path), flags, fapl=access)
    except OSError as error:
        if not _has_no_locks(error):
            raise
        # The environment variable overrides the access properties.
        raise OSError(
            f"the file system does not support locks, but {_LOCKING}="
            f"{os.environ.get(_LOCKING)} requires them: set {_LOCKING}=FALSE"
        ) from error


def _has_no_locks(error: OSError) -> bool:
    match = re.search(r"unable to lock file, errno = (\d+)", str(error))
    return match is not None and int(match[1]) in NO_LOCKS


def has_writer_flag(path: Path) -> bool:
    """Return whether a file has the flag of a writer, which may have died since.

    Raises:
        TraceFileError: The file does not exist.
    """
    return flag_is_set(_read_head(path))


def flag_is_set(head: bytes) -> bool:
    """Return whether the first bytes of a file have the flag of a writer."""
    # Byte 8 is the version of the superblock (2 or 3), byte 11 the flags.
    return len(head) >= 12 and head[8] >= 2 and bool(head[11] & _WRITER_FLAGS)


@contextmanager
def disable_plugins() -> Iterator[None]:
    """Stop HDF5 from loading filter plugins in this process, inside the context.

    For a process that only reads a file. The names in a group can be compressed, too, and HDF5
    gives no way to see that before it reads them.
    """
    previous_state = ctypes.c_uint(0)
    with contextlib.suppress(OSError, AttributeError), phil:
        _hdf5().H5PLget_loading_state(ctypes.byref(previous_state))
        _hdf5().H5PLset_loading_state(ctypes.c_uint(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError), phil:
            _hdf5().H5PLset_loading_state(previous_state)


@cache
def _hdf5() -> ctypes.PyDLL:
    """Load the HDF5 library that h5py uses, for functions that h5py does not wrap.

    Raises:
        OSError: The library cannot be loaded.
    """
    return ctypes.PyDLL(h5p.__file__)


def _read_head(path: Path) -> bytes:
    if not path.is_file():
        # Opening a pipe would wait for its writer, and a device may be endless.
        raise TraceFileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _access_properties() -> h5p.PropFAID:
    access = h5p.create(h5p.FILE_ACCESS)
    metadata, _, _, preference = access.get_cache()
    access.set_cache(metadata, CHUNK_CACHE_SLOTS, CHUNK_CACHE, preference)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)
    # If the library cannot be loaded, HDF5 keeps its default number of tries.
    with contextlib.suppress(OSError, AttributeError), phil:
        number = ctypes.c_int64(access.id)
        _hdf5().H5Pset_metadata_read_attempts(number, ctypes.c_uint(READ_ATTEMPTS))
    return access


def sniff_format(head: bytes) -> str:
    """Return the kind of a file that is not HDF5, as in "a gzip file".

    Args:
        head: First bytes of the file, at most `HEAD_BYTES`.
    """
    if not head:
        return "an empty file"
    if any(head.startswith(SIGNATURE, offset) for offset in _USER_BLOCKS):
        return "an HDF5 file with a user block"
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head[:512]:
            return "a PyTorch checkpoint"
        return "a NumPy archive (.npz)" if b".npy" in head[:512] else "a zip file"
    for beginning, kind in _MAGIC_BYTES.items():
        if head.startswith(beginning):
            return kind
    if not any(head):
        return "a file of zeros"
    return "a text file" if _is_text(head) else "an unknown kind of file"


def _is_text(head: bytes) -> bool:
    try:
        # The last character may be cut off.
        text = head.decode("utf-8", "ignore" if len(head) == HEAD_BYTES else "strict")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
