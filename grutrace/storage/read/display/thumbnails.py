"""Small pictures of a matrix, as PNG data in a URI: without a plotting library.

T steps, H units.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grutrace.records import Array

#: Largest width (steps) and height (units) of a picture, in values.
MAX_WIDTH, MAX_HEIGHT = 64, 32

#: Width and height of one value on the page, and the smallest size of a picture, in CSS pixels.
PIXELS, MIN_PIXELS = (3, 2), 24

#: Colours of values from 0 to 1, from dark to light: points of matplotlib's viridis.
SEQUENTIAL = (
    *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 145, 140)),
    *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
)

#: Colours of values from -1 over 0 to 1: points of ColorBrewer's RdBu, reversed.
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))

#: Colour of NaN.
MISSING = (128, 128, 128)


def thumbnail(values: Array, *, signed: bool) -> tuple[str, int, int]:
    """Return a picture of values: steps from left to right, units from top to bottom.

    Of a larger matrix it shows every n-th step and unit.

    Args:
        values: (T, H)
        signed: Whether values are from -1 to 1 (those of larger ones are scaled), not from 0 to 1.

    Returns:
        A data URI, and its width and height on the page, in CSS pixels.
    """
    steps, units = (max(1, -(-size // limit)) for size, limit in _sizes(values))
    picture = np.asarray(values[::steps, ::units], np.float64).T
    is_missing = ~np.isfinite(picture)
    picture = np.where(is_missing, 0.0, picture)
    if signed:
        picture = 0.5 + 0.5 * picture / max(1.0, float(np.abs(picture).max(initial=0.0)))
    codes = 1 + np.rint(254 * np.clip(picture, 0.0, 1.0))
    codes[is_missing] = 0
    palette = [MISSING, *_palette(DIVERGING if signed else SEQUENTIAL, 255)]
    data = base64.b64encode(_png(codes.astype(np.uint8), palette)).decode("ascii")
    height, width = picture.shape
    sizes = (max(MIN_PIXELS, PIXELS[0] * width), max(MIN_PIXELS, PIXELS[1] * height))
    return f"data:image/png;base64,{data}", *sizes


def _sizes(values: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    return (values.shape[0], MAX_WIDTH), (values.shape[1], MAX_HEIGHT)


def _palette(points: Sequence[tuple[int, int, int]], count: int) -> list[tuple[int, int, int]]:
    """Return this many colours, linear between the points."""
    positions = np.linspace(0, len(points) - 1, count)
    channels = [
        np.rint(np.interp(positions, range(len(points)), channel)).astype(int).tolist()
        for channel in zip(*points, strict=True)
    ]
    return [(red, green, blue) for red, green, blue in zip(*channels, strict=True)]


def _png(codes: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a PNG file of palette indices (PNG specification, ISO/IEC 15948)."""
    height, width = codes.shape
    # Each line begins with its filter: 0, none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), codes], axis=1).tobytes()
    colours = b"".join(map(bytes, palette))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
