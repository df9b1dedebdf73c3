"""Closing a file to which nothing more is to be written, whatever HDF5 still holds of it.

HDF5 cannot be told to drop what it holds of a file: it writes that when the file is closed, and
what it cannot write then it keeps, and the file open, for as long as the process lives.
"""

from __future__ import annotations

import contextlib
import os

import h5py

from grutrace.storage.handle import keep_off


def let_go(file: h5py.File, identity: tuple[int, int]) -> None:
    """Close a file that leads nowhere.

    Args:
        file: The file.
        identity: Its device and inode.
    """
    try:
        file.close()
    except (OSError, RuntimeError):
        keep_off(file, identity)


def lead_nowhere(descriptor: int, identity: tuple[int, int]) -> None:
    """Let what HDF5 writes to a file from now on be forgotten.

    Args:
        descriptor: HDF5's own.
        identity: Device and inode of the file.
    """
    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == identity:
            nowhere = _open_nowhere()
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _open_nowhere() -> int:
    """A descriptor to which a whole file can be written, and be forgotten."""
    if hasattr(os, "memfd_create"):
        # Unlike the null device, it can be truncated, which HDF5 does when it closes a file.
        return os.memfd_create("grutrace")
    return os.open(os.devnull, os.O_RDWR)
