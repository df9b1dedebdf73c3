"""Correct HDF5's metadata checksum after a change, so that HDF5 accepts the change.

Without it HDF5 refuses a changed structure before it looks into it, and its own decoding is never
tried. The checksum is Bob Jenkins' lookup3 (hashlittle), as the HDF5 file format has it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MASK = 0xFFFFFFFF

#: Structures of a fixed size, where offsets and lengths have 8 bytes: bytes before the checksum.
_FIXED = {b"EAHD": 68, b"FAHD": 24, b"BTHD": 34}

#: Structures whose size stands elsewhere: it is found by trying, and then tried first.
_TRIED = {b"OCHK": 1024, b"FRHP": 256, b"BTLF": 600, b"EAIB": 2048}
_sizes: dict[bytes, list[int]] = {}


def _rotated(value: int, count: int) -> int:
    return ((value << count) | (value >> (32 - count))) & _MASK


def _mixed(a: int, b: int, c: int) -> tuple[int, int, int]:
    for count in (4, 6, 8, 16, 19, 4):
        a = ((a - c) & _MASK) ^ _rotated(c, count)
        c = (c + b) & _MASK
        a, b, c = b, c, a
    return a, b, c


def lookup3(data: bytes) -> int:
    """The checksum of some bytes."""
    a = b = c = (0xDEADBEEF + len(data)) & _MASK
    offset = 0
    while len(data) - offset > 12:
        x, y, z = struct.unpack_from("<III", data, offset)
        a, b, c = _mixed((a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK)
        offset += 12
    rest = data[offset:]
    if not rest:
        return c
    x, y, z = struct.unpack("<III", rest.ljust(12, b"\0"))
    a, b, c = (a + x) & _MASK, (b + y) & _MASK, (c + z) & _MASK
    for count in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _rotated(b, count)) & _MASK
        a, b, c = b, c, a
    # After seven rounds the value that came last is in the middle.
    return b


def structures(content: bytes) -> Iterator[tuple[int, int]]:
    """Where structures with a checksum are: first byte, and where the checksum is.

    Found by their signatures and told by their checksums, so what is none is not listed.
    """
    for signature in (b"\x89HDF\r\n\x1a\n", b"OHDR", *_FIXED, *_TRIED):
        start = content.find(signature)
        while start >= 0:
            for end in _ends(content, signature, start):
                stored = content[end : end + 4]
                if len(stored) == 4 and lookup3(content[start:end]) == int.from_bytes(
                    stored, "little"
                ):
                    if signature in _TRIED and end - start not in _sizes.get(signature, ()):
                        _sizes.setdefault(signature, []).append(end - start)
                    yield start, end
                    break
            start = content.find(signature, start + 1)


def _ends(content: bytes, signature: bytes, start: int) -> Iterator[int]:
    if signature in _FIXED:
        yield start + _FIXED[signature]
    elif signature.startswith(b"\x89"):
        yield start + 44
    elif signature == b"OHDR":
        yield _end_of_header(content, start)
    else:
        known = _sizes.get(signature, [])
        yield from (start + size for size in known)
        yield from range(start + 8, min(start + _TRIED[signature], len(content) - 4))


def _end_of_header(content: bytes, start: int) -> int:
    flags = content[start + 5]
    offset = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    return offset + width + int.from_bytes(content[offset : offset + width], "little")


def put_right(content: bytearray, start: int, end: int) -> None:
    """Make the checksum that of the bytes before it."""
    struct.pack_into("<I", content, end, lookup3(bytes(content[start:end])))
