"""Read a trace file by its URL, over HTTP or from an object store, through fsspec.

HDF5 reads a Python file object, and asks for small pieces at many places. fsspec's block cache with
small blocks fetches little more than these pieces; its default would fetch 5 MiB around each.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from grutrace.errors import MissingExtraError, TraceFileError, missing_library_message
from grutrace.storage.hdf5.errors import short_message
from grutrace.storage.hdf5.handle import SharedReadHandle
from grutrace.storage.hdf5.safe_open import (
    CHUNK_CACHE,
    HEAD_BYTES,
    flag_is_set,
    sniff_format,
)
from grutrace.storage.hdf5.superblock import SIGNATURE

#: Bytes that are fetched at once, and the largest number of such blocks in memory (32 MiB).
BLOCK_BYTES, MAX_BLOCKS = 64 * 1024, 512

_open_handles: weakref.WeakSet[RemoteReadHandle] = weakref.WeakSet()

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str) -> bool:
    """Return whether a path is a URL, such as ``https://example.org/run.h5``."""
    return bool(_URL.match(path))


class RemoteReadHandle(SharedReadHandle):
    """A complete HDF5 file on a server.

    Args:
        url: URL of the file.
        storage_options: Arguments for the file system of fsspec.

    Raises:
        MissingExtraError: fsspec, or what it needs for this kind of URL, is not installed.
        TraceFileError: The file cannot be opened, is not an HDF5 file, or has a writer.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self._url, self._storage_options = url, dict(storage_options)
        self._stream: _Stream | None = None
        super().__init__(Path(url), name=url)
        _open_handles.add(self)

    @property
    def size(self) -> int:
        """Size of the file in bytes. Call while the file is acquired."""
        assert self._stream is not None
        return self._stream.file_size

    def reopen_if_replaced(self) -> None:
        """Do nothing: a file on a server is complete."""

    def release(self) -> None:
        """Close the file until the next read."""
        super().release()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _open_file(self) -> tuple[h5py.File, None]:
        stream = _open_stream(self._url, self._storage_options)
        try:
            head = stream.read(HEAD_BYTES)
            if not head.startswith(SIGNATURE):
                raise TraceFileError(
                    f"{self._url} is not a grutrace trace (it is {sniff_format(head)})"
                )
            if flag_is_set(head):
                raise TraceFileError(
                    f"{self._url} is being written, or its writer was killed: only a path on this "
                    "machine can be followed. Close the trace, or run `grutrace recover`, before "
                    "the file goes on the server"
                )
            file = h5py.File(stream, "r", rdcc_nbytes=CHUNK_CACHE)
        except BaseException:
            stream.close()
            raise
        self._stream = stream
        return file, None


@atexit.register
def _close_all() -> None:
    """Close what is still open: after Python has ended, HDF5 would call objects that are gone."""
    for handle in list(_open_handles):
        with contextlib.suppress(Exception):
            handle.close()


class _Stream(io.RawIOBase):
    """A file of fsspec as HDF5 reads it. Errors of a server become one kind of error.

    Args:
        file: The file of fsspec.
        url: Its URL, for messages.
    """

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url
        self.file_size = int(file.size)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next read."""
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the offset of the next read."""
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer.

        Raises:
            TraceFileError: The server does not answer, or not with a part of the file.
        """
        view = memoryview(buffer).cast("B")
        try:
            content = self._file.read(len(view))
        except Exception as error:
            # Each kind of server has its own exceptions.
            message = "sends whole files only (no byte ranges): download the file"
            if "range requests" not in str(error):
                message = f"does not answer: {short_message(error)}"
            raise TraceFileError(f"{self._url} cannot be read: the server {message}") from error
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _open_stream(url: str, storage_options: Mapping[str, Any]) -> _Stream:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url, **storage_options)
    except ImportError:
        message = missing_library_message(f"a trace at {scheme}://", "fsspec", "cloud")
        raise MissingExtraError(message) from None
    except (ValueError, TypeError) as error:
        raise TraceFileError(f"{url} cannot be opened: {short_message(error)}") from None
    try:
        stream = system.open(
            path,
            "rb",
            block_size=BLOCK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": MAX_BLOCKS},
        )
    except FileNotFoundError as error:
        # fsspec raises it for a server that does not answer, too.
        is_absent = error.__cause__ is None or "404" in str(error.__cause__)
        reason = "does not exist" if is_absent else f"cannot be opened: {error.__cause__}"
        raise TraceFileError(f"{url} {reason}") from None
    except Exception as error:
        # Each kind of server has its own exceptions.
        raise TraceFileError(f"{url} cannot be opened: {short_message(error)}") from error
    if getattr(stream, "size", None) is None:
        stream.close()
        raise TraceFileError(f"{url} cannot be opened: the server does not tell the file's size")
    return _Stream(stream, url)
