"""Read an HDF5 file as if its writer had closed it, without changing the file.

A dead writer leaves its flag in the superblock. HDF5 then expects the file to change, and waits
when it finds an error. `RepairedFile` hides the flag, so that HDF5 reports errors at once. If the
file is truncated, it reads zeros after its end. The checksums of HDF5's own structures detect
such zeros, and the offset of each chunk of rows is known.

After a loss of power, a structure may be half old and half new, because the disk writes single
pages. In a structure that only grows, as the length of a dataset or the list of its chunks, both
halves are valid and only the checksum is wrong. `RepairedFile` can correct it.

The structures are described in sections II.A, III.C, IV.A.1.b and IV.A.2.l of HDF5's file format
specification, version 3.0.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import h5py
import numpy as np

from grutrace.storage.hdf5.errors import require

#: The first bytes of an HDF5 file.
SIGNATURE = b"\x89HDF\r\n\x1a\n"

#: Bytes of a superblock of version 2 or 3, with addresses of 8 bytes; its last 4 are a checksum.
_SUPERBLOCK_BYTES = 48
_VERSIONS = (2, 3)

#: Signatures of the structures that change when a dataset grows: blocks of an object header and of
#: an extensible array. HDF5 reads each as a whole, and each ends with its checksum.
_GROWING_STRUCTURES = (b"OCHK", b"EAHD", b"EAIB", b"EASB", b"EADB")

#: Bytes of a page of such an array, which has no signature: 1024 addresses and a checksum.
_PAGE_BYTES = 1024 * 8 + 4

#: The address of a chunk that was never written.
_UNDEFINED_ADDRESS = 2**64 - 1

#: Signature of a global heap, which holds values of attributes.
_GLOBAL_HEAP = b"GCOL"

#: Signature and version of an object header.
_OBJECT_HEADER = b"OHDR\2"

#: Offsets in the superblock: version, writer flags, and end-of-file address.
_VERSION = 8
_FLAGS = 11
_END_OF_FILE = slice(28, 36)


class RepairedFile(io.RawIOBase):
    """A read-only file object for `h5py.File`, without the writer flag.

    Args:
        path: Path of a file that no process writes to.
        repair: Whether to correct the checksums of half-written structures.

    Attributes:
        repaired: Addresses of the structures whose checksums were corrected.
        size: Bytes of the file.
        full_size: Bytes that the superblock expects; more than `size` if the file is truncated.

    Raises:
        OSError: The file cannot be opened.
        FormatError: The superblock is damaged, or has a version that grutrace does not write.
    """

    def __init__(self, path: Path, *, repair: bool = False) -> None:
        self.repaired: set[int] = set()
        self._repair = repair
        self._file = path.open("rb", buffering=0)
        self._position = 0
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            head = bytearray(self._file.read(_SUPERBLOCK_BYTES))
            _check_superblock(head)
            self.full_size = max(self.size, int.from_bytes(head[_END_OF_FILE], "little"))
        except BaseException:
            self.close()
            raise
        head[_FLAGS] = 0
        head[_END_OF_FILE] = self.full_size.to_bytes(8, "little")
        head[-4:] = checksum(bytes(head[:-4])).to_bytes(4, "little")
        self._head = bytes(head)

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the offset of the next read."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.full_size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill a buffer, with zeros after the end of the file.

        Raises:
            OSError: The read starts after the end of the file, or fails.
        """
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        start, filled = self._position, 0
        if start >= self.size:
            raise OSError(f"read at byte {start} of a file of {self.size} bytes")
        while filled < len(view):
            count = self._read(view[filled:], start + filled)
            if not count:
                if bytes(view[:4]) == _GLOBAL_HEAP:
                    # HDF5 2.0 loops forever in a global heap that ends with zeros.
                    raise OSError(f"read at byte {start + filled} of a file of {self.size} bytes")
                view[filled:] = bytes(len(view) - filled)
                break
            filled += count
        if start < _SUPERBLOCK_BYTES:
            head = self._head[start : start + len(view)]
            view[: len(head)] = head
        elif self._repair and _repair(view, self.full_size):
            self.repaired.add(start)
        self._position += len(view)
        return len(view)

    def _read(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        # Windows has no preadv().
        self._file.seek(start)
        return self._file.readinto(view)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def open_repaired(file: RepairedFile, cache: int) -> h5py.File:
    """Open a repaired file for reading.

    Args:
        file: The file, which must stay open while it is read.
        cache: Bytes of HDF5's chunk cache for each dataset.
    """
    return h5py.File(file, "r", rdcc_nbytes=cache)


def _check_superblock(head: bytearray) -> None:
    where = "superblock"
    require(head.startswith(SIGNATURE), where, "the signature of HDF5", "other bytes")
    require(len(head) == _SUPERBLOCK_BYTES, where, f"{_SUPERBLOCK_BYTES} bytes", len(head))
    require(head[8] in _VERSIONS, where, f"version {' or '.join(map(str, _VERSIONS))}", head[8])
    require(head[9] == head[10] == 8, where, "addresses of 8 bytes", f"of {head[9]}")
    stored = int.from_bytes(head[-4:], "little")
    require(checksum(bytes(head[:-4])) == stored, where, "a matching checksum", "a wrong one")


def _repair(view: memoryview, full_size: int) -> bool:
    """Correct the checksum of a structure that grows. Return whether it was wrong."""
    end = len(view)
    if view[:5] == _OBJECT_HEADER:
        end = _header_size(view)
    elif view[:4] not in _GROWING_STRUCTURES and not _is_page(view, full_size):
        return False
    if not 8 <= end <= len(view):
        # HDF5 reads the header in two steps, and this is the first one.
        return False
    expected = checksum(bytes(view[: end - 4])).to_bytes(4, "little")
    if view[end - 4 : end] == expected:
        return False
    view[end - 4 : end] = expected
    return True


def _is_page(view: memoryview, full_size: int) -> bool:
    """Return whether this is a page of an extensible array: addresses of chunks or undefined."""
    if len(view) != _PAGE_BYTES:
        return False
    addresses = np.frombuffer(view[:-4], "<u8")
    return bool(
        ((addresses < full_size) & (addresses > 0) | (addresses == _UNDEFINED_ADDRESS)).all()
    )


def _header_size(view: memoryview) -> int:
    """Bytes of the first piece of an object header, with its checksum."""
    flags = view[5]
    start = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
    width = 1 << (flags & 3)
    return start + width + int.from_bytes(view[start : start + width], "little") + 4


def image_bytes(file: h5py.File) -> bytes:
    """Return the bytes of a file that was created in memory, with a correct checksum.

    HDF5 before 2.0 clears the writer flag in these bytes without updating the checksum of the
    superblock. A writer that opens such a file would wait forever.
    """
    file.flush()
    stored = bytes(file.id.get_file_image())
    if stored[_VERSION] not in _VERSIONS:
        return stored
    expected = checksum(stored[: _SUPERBLOCK_BYTES - 4]).to_bytes(4, "little")
    return stored[: _SUPERBLOCK_BYTES - 4] + expected + stored[_SUPERBLOCK_BYTES:]


def checksum(data: bytes) -> int:
    """Compute the checksum of HDF5's structures: Bob Jenkins' lookup3 (hashlittle, initval 0).

    Source: http://burtleburtle.net/bob/c/lookup3.c, public domain.
    """
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    if not data:
        return c
    while len(data) > 12:
        a, b, c = _mix(*_add_words(data[:12], a, b, c))
        data = data[12:]
    return _final(*_add_words(data.ljust(12, b"\0"), a, b, c))


_WORD = 0xFFFFFFFF


def _add_words(block: bytes, a: int, b: int, c: int) -> tuple[int, int, int]:
    words = (int.from_bytes(block[start : start + 4], "little") for start in (0, 4, 8))
    first, second, third = words
    return (a + first) & _WORD, (b + second) & _WORD, (c + third) & _WORD


def _rotate(word: int, by: int) -> int:
    return ((word << by) | (word >> (32 - by))) & _WORD


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for by in (4, 6, 8, 16, 19, 4):
        a = ((a - c) & _WORD) ^ _rotate(c, by)
        c = (c + b) & _WORD
        a, b, c = b, c, a
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    for by in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _rotate(b, by)) & _WORD
        a, b, c = b, c, a
    return b
