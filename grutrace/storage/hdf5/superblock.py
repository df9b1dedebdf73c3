"""The bytes of an HDF5 file as if its writer had closed it, without a change to the file.

A writer that dies leaves a mark in the superblock: whoever opens the file must expect it to change,
and waits where something in it is not right. Without the mark, HDF5 reads what there is and says at
once what is wrong. Where the file was cut short, it is given zeros for what is missing: all of its
own structures bear checksums, and rows can be asked where they lie.

Where the power was lost, a structure may be half as it was and half as it was to become: its pages
went to the disk one by one. Of what only grows, as a dataset's length and the list of its chunks,
both halves are right, and only the checksum is not. It can be mended.

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

#: How HDF5 files begin.
SIGNATURE = b"\x89HDF\r\n\x1a\n"

#: Bytes of a superblock of version 2 or 3, with addresses of 8 bytes; its last 4 are a checksum.
_SUPERBLOCK_BYTES = 48
_VERSIONS = (2, 3)

#: Structures of one dataset that change as it grows, of which HDF5 reads each by itself and whole,
#: and that end with their checksum: pieces of an object header, and of an extensible array.
_GROWING_STRUCTURES = (b"OCHK", b"EAHD", b"EAIB", b"EASB", b"EADB")

#: A page of such an array has no name: 1024 addresses and a checksum. Bytes.
_PAGE_BYTES = 1024 * 8 + 4

#: The address of a chunk that is not there.
_UNDEFINED_ADDRESS = 2**64 - 1

#: A collection of values of attributes begins so.
_GLOBAL_HEAP = b"GCOL"

#: An object header begins so.
_OBJECT_HEADER = b"OHDR\2"

#: Places in it: its version, the flags of writers, and the address where the file ends.
_VERSION = 8
_FLAGS = 11
_END_OF_FILE = slice(28, 36)


class RepairedFile(io.RawIOBase):
    """A file to be read by ``h5py.File``.

    Args:
        path: Of a file that nobody writes to.
        mend: Whether checksums of structures that were growing are made to fit.

    Attributes:
        mended: Addresses of the structures whose checksums did not fit.
        size: Bytes that there are.
        full_size: Bytes that there should be: more, if the file was cut short.

    Raises:
        OSError: It cannot be opened.
        FormatError: Its superblock is damaged, or of a kind that grutrace does not write.
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
        """Return where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Have the next read begin elsewhere."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.full_size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill a buffer, with zeros behind the end of the file.

        Raises:
            OSError: There is nothing of what was asked for, or it cannot be read.
        """
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        start, done = self._position, 0
        if start >= self.size:
            raise OSError(f"byte {start} of {self.size} bytes was asked for")
        while done < len(view):
            read = self._read(view[done:], start + done)
            if not read:
                if bytes(view[:4]) == _GLOBAL_HEAP:
                    # In one that ends with zeros, HDF5 2.0 looks for the next object for ever.
                    raise OSError(f"byte {start + done} of {self.size} bytes was asked for")
                view[done:] = bytes(len(view) - done)
                break
            done += read
        if start < _SUPERBLOCK_BYTES:
            own = self._head[start : start + len(view)]
            view[: len(own)] = own
        elif self._repair and _repair(view, self.full_size):
            self.repaired.add(start)
        self._position += len(view)
        return len(view)

    def _read(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        # There is none on Windows.
        self._file.seek(start)
        return self._file.readinto(view)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        super().close()


def open_repaired(file: RepairedFile, cache: int) -> h5py.File:
    """The file, open for reading.

    Args:
        file: Stays open for as long as it is read.
        cache: Bytes of the chunks that HDF5 keeps of a dataset.
    """
    return h5py.File(file, "r", rdcc_nbytes=cache)


def _check_superblock(head: bytearray) -> None:
    place = "superblock"
    require(head.startswith(SIGNATURE), place, "that of an HDF5 file", "none")
    require(len(head) == _SUPERBLOCK_BYTES, place, f"{_SUPERBLOCK_BYTES} bytes", len(head))
    require(head[8] in _VERSIONS, place, f"version {' or '.join(map(str, _VERSIONS))}", head[8])
    require(head[9] == head[10] == 8, place, "addresses of 8 bytes", f"of {head[9]}")
    found = int.from_bytes(head[-4:], "little")
    require(checksum(bytes(head[:-4])) == found, place, "one that fits its checksum", "another")


def _repair(view: memoryview, full_size: int) -> bool:
    """Make the checksum of what begins here fit, if it is a structure that was growing."""
    end = len(view)
    if view[:5] == _OBJECT_HEADER:
        end = _header_size(view)
    elif view[:4] not in _GROWING_STRUCTURES and not _is_page(view, full_size):
        return False
    if not 8 <= end <= len(view):
        # HDF5 has not asked for all of it yet.
        return False
    fitting = checksum(bytes(view[: end - 4])).to_bytes(4, "little")
    if view[end - 4 : end] == fitting:
        return False
    view[end - 4 : end] = fitting
    return True


def _is_page(view: memoryview, full_size: int) -> bool:
    """Whether this is a page of a long extensible array: addresses of chunks, or of none."""
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
    """Return the bytes of a file that was created in memory.

    HDF5 before 2.0 takes the mark of a writer out of them, and leaves the checksum as it was with
    it: a writer that opens such a file waits for ever for one that fits.
    """
    file.flush()
    found = bytes(file.id.get_file_image())
    if found[_VERSION] not in _VERSIONS:
        return found
    fitting = checksum(found[: _SUPERBLOCK_BYTES - 4]).to_bytes(4, "little")
    return found[: _SUPERBLOCK_BYTES - 4] + fitting + found[_SUPERBLOCK_BYTES:]


def checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3 (hashlittle, from 0), by which HDF5 checks its structures.

    http://burtleburtle.net/bob/c/lookup3.c, public domain.
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
