"""Files whose writing failed: discard their buffered data, and never open them again.

HDF5 cannot discard buffered data. It writes the buffer when the file is closed. If that fails, HDF5
keeps the file open until the process ends, and a second handle would read its stale buffers.
"""

from __future__ import annotations

import contextlib
import os

import h5py

#: Files that HDF5 failed to close. Opening such a path again would read the stale buffers of HDF5;
#: dropping the last reference would close the file again.
_quarantined: dict[tuple[int, int], list[h5py.File]] = {}


def is_quarantined(identity: tuple[int, int] | None) -> bool:
    """Return whether HDF5 failed to close the file with this device and inode."""
    return identity in _quarantined


def quarantine(file: h5py.File, identity: tuple[int, int]) -> None:
    """Keep a file that HDF5 failed to close, so that it is never closed or opened by path again."""
    _quarantined[identity] = [*_quarantined.get(identity, ()), file]


def close_or_quarantine(file: h5py.File, identity: tuple[int, int]) -> None:
    """Close a file after `discard_writes`; quarantine it if HDF5 cannot close it.

    Args:
        file: The file.
        identity: Device and inode of the file.
    """
    try:
        file.close()
    except (OSError, RuntimeError):
        quarantine(file, identity)


def discard_writes(descriptor: int, identity: tuple[int, int]) -> None:
    """Discard further HDF5 writes to a file.

    The descriptor is redirected to a memory file. If it no longer belongs to the file, nothing
    happens.

    Args:
        descriptor: The file descriptor that HDF5 uses.
        identity: Device and inode of the file.
    """
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == identity:
            null = _open_null()
            os.dup2(null, descriptor)
            os.close(null)


def _open_null() -> int:
    """Open a descriptor whose writes are discarded."""
    if hasattr(os, "memfd_create"):
        # HDF5 truncates a file when it closes it. The null device does not allow that.
        return os.memfd_create("grutrace")
    return os.open(os.devnull, os.O_RDWR)


def file_identity(file: h5py.File) -> tuple[int, int]:
    """Return device and inode of an open file. They stay the same when the file is renamed."""
    status = os.fstat(file.id.get_vfd_handle())
    return status.st_dev, status.st_ino
