"""What a file is that is no HDF5 file, from how it begins: so that an error can say it."""

from __future__ import annotations

#: How HDF5 files begin.
SIGNATURE = b"\x89HDF\r\n\x1a\n"

#: What is read of a file to tell. Bytes.
HEAD = 4096

#: HDF5 looks for its signature at 0, and at these and so on if there is none. Bytes.
_USER_BLOCKS = (512, 1024, 2048)

_BEGINNINGS = {
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


def kind_of(head: bytes) -> str:
    """What a file is whose first bytes, up to `HEAD`, are these, and are not HDF5's."""
    if not head:
        return "an empty file"
    if any(head.startswith(SIGNATURE, place) for place in _USER_BLOCKS):
        return "an HDF5 file behind a block of something else"
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head[:512]:
            return "a PyTorch checkpoint"
        return "NumPy arrays (.npz)" if b".npy" in head[:512] else "a zip file"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if not any(head):
        return "zeros"
    return "text" if _is_text(head) else "something else"


def _is_text(head: bytes) -> bool:
    try:
        # The last character may have been cut.
        text = head.decode("utf-8", "ignore" if len(head) == HEAD else "strict")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
