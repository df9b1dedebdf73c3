"""HDF5 filters for the rows of a trace: compression and checksums.

gzip and the checksum are part of HDF5. The package `hdf5plugin` provides the others: HDF5 knows
them once it is imported, and then does not search for plugins.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_args

import h5py

from grutrace.errors import require_extra
from grutrace.options import Compression
from grutrace.records import TraceHeader

#: The filters for rows. All shuffle first, gzip bytes and the others bits: neighbouring
#: floating-point numbers share signs and exponents, so their bits compress well when grouped.
#: Mantissa bits look like noise.
COMPRESSIONS: tuple[str, ...] = get_args(Compression)

#: Level of zstd and gzip. Higher levels take several times as long and save a few percent.
LEVEL = 1

#: Filters of hdf5plugin, by their number in the registry of The HDF Group.
PLUGINS = {32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}


def row_filters(header: TraceHeader) -> dict[str, Any]:
    """Return the filters that the options of a new trace ask for.

    Returns:
        Keyword arguments for `h5py.Group.create_dataset`.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    compression = header.options.get("compression")
    result = compression_filter(compression if compression in COMPRESSIONS else None)
    if header.options.get("checksums") is True:
        result["fletcher32"] = True
    return result


def compression_filter(compression: str | None) -> dict[str, Any]:
    """Return the keyword arguments for `h5py.Group.create_dataset`.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    if compression is None:
        return {}
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": LEVEL, "shuffle": True}
    plugin = load_plugin(f"compression={compression!r}")
    if compression == "zstd":
        return dict(plugin.Bitshuffle(cname="zstd", clevel=LEVEL))
    return dict(plugin.Blosc2(cname="zstd", clevel=LEVEL, filters=plugin.Blosc2.BITSHUFFLE))


def is_compressed(dataset: h5py.Dataset) -> bool:
    """Return whether a dataset has filters, and load those that it needs.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    properties = dataset.id.get_create_plist()
    codes = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    for code in codes:
        if code in PLUGINS:
            load_plugin(f"a trace compressed with {PLUGINS[code]}")
    return bool(codes)


def load_plugin(feature: str) -> Any:
    """Import hdf5plugin.

    Args:
        feature: Feature that needs hdf5plugin, for the message.

    Raises:
        MissingExtraError: hdf5plugin is not installed.
    """
    with require_extra(feature, "compress"):
        return import_module("hdf5plugin")
