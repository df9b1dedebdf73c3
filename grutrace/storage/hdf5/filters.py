"""Compressed rows: which filters there are, and the library that brings them.

HDF5 has the filters once `hdf5plugin` is imported, and then looks for them nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

import h5py

from grutrace.errors import require_extra
from grutrace.options import Compression
from grutrace.records import TraceHeader

#: The filters for rows. Both shuffle bits first: of neighbouring floating-point numbers signs and
#: exponents agree, and what is left is noise, in which no byte repeats.
COMPRESSIONS: tuple[str, ...] = get_args(Compression)

#: Level of zstd. Higher ones take a multiple of the time for a few percent.
LEVEL = 1

#: Filters that hdf5plugin brings, by the number under which The HDF Group has registered them.
PLUGINS = {32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}


def compression_of(header: TraceHeader) -> str | None:
    """What the rows of a new trace are to be compressed with, by its options."""
    found = header.options.get("compression")
    return found if found in COMPRESSIONS else None


def filter_options(compression: str | None) -> Mapping[str, Any]:
    """What h5py is to create a dataset with.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    if compression is None:
        return {}
    plugin = load_plugin(f"compression={compression!r}")
    if compression == "zstd":
        return dict(plugin.Bitshuffle(cname="zstd", clevel=LEVEL))
    return dict(plugin.Blosc2(cname="zstd", clevel=LEVEL, filters=plugin.Blosc2.BITSHUFFLE))


def is_compressed(dataset: h5py.Dataset) -> bool:
    """Whether chunks of a dataset are packed; what they are packed with is ready from now on.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    made = dataset.id.get_create_plist()
    codes = [made.get_filter(number)[0] for number in range(made.get_nfilters())]
    for code in codes:
        if code in PLUGINS:
            load_plugin(f"a trace that is compressed with {PLUGINS[code]}")
    return bool(codes)


def load_plugin(what: str) -> Any:
    """Import hdf5plugin.

    Args:
        what: Needs it.

    Raises:
        MissingExtraError: It is not installed.
    """
    with require_extra(what, "compress"):
        return import_module("hdf5plugin")
