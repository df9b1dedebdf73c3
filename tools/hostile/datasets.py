"""Changes to a dataset that HDF5 still accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from h5py import ExternalLink, SoftLink

from tools.hostile.spot import EDGES, FLOATS, Change, Spot

#: Numbers of filters that do not exist.
UNKNOWN = (307, 32001, 32767, 65535)

#: Returns the arguments of create_dataset() for the dataset that replaces the given one.
Made = Callable[[h5py.Dataset], dict[str, Any]]


def _made(options: Made) -> Change:
    """Replace a dataset by another."""

    def change(spot: Spot) -> None:
        settings = options(spot.object)
        spot.remove()
        spot.file.create_dataset(spot.path, **settings)
        # The committed count of a table becomes its new length.
        counted = spot.file.get("committed")
        shape = spot.file[spot.path].shape
        if counted is not None and shape and spot.path in (counted.dtype.names or ()):
            counts = counted[()]
            counts[spot.path] = shape[0]
            counted[()] = counts

    return change


def _shape(dataset: h5py.Dataset) -> tuple[int, ...]:
    return dataset.shape or (1,)


def _as(dtype: Any) -> Change:
    """Replace it by one of another type, with the same shape."""
    return _made(lambda old: {"shape": _shape(old), "dtype": dtype})


def _same(**options: Any) -> Change:
    """Store the same items with other options."""
    return _made(lambda old: {"data": np.atleast_1d(old[()]), **options})


def _rows(count: int, **options: Any) -> Change:
    """Replace it by one with this many items of the same type and width, without data."""
    return _made(lambda old: {"shape": (count, *old.shape[1:]), "dtype": old.dtype, **options})


def _other_fields(old: h5py.Dataset) -> dict[str, Any]:
    names = reversed(old.dtype.names or ())
    return {"shape": _shape(old), "dtype": [(name, old.dtype[name]) for name in names] or "u1"}


def _large_chunks(old: h5py.Dataset) -> dict[str, Any]:
    item = max(1, int(np.prod(old.shape[1:])) * old.dtype.itemsize)
    rows = 2**29 // item
    return {
        "shape": (rows, *old.shape[1:]),
        "dtype": old.dtype,
        "chunks": (rows, *old.shape[1:]),
        "compression": "gzip",
    }


def _data_elsewhere(spot: Spot) -> None:
    shape, dtype = _shape(spot.object), spot.object.dtype
    size = spot.rng.choice([h5py.h5f.UNLIMITED, max(1, int(np.prod(shape)) * dtype.itemsize)])
    spot.remove()
    spot.file.create_dataset(spot.path, shape, dtype, external=[(str(spot.pipe), 0, size)])


def _virtual(spot: Spot) -> None:
    shape, dtype = _shape(spot.object), spot.object.dtype
    source = spot.rng.choice([str(spot.pipe), "pipe", ".", "run.h5"])
    spot.remove()
    if spot.rng.random() < 0.5:
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(source, spot.path, shape=shape)
    else:
        # The length of this one is asked of its sources.
        longest = (None, *shape[1:])
        layout = h5py.VirtualLayout(shape, dtype, maxshape=longest)
        of = h5py.VirtualSource(source, spot.path, shape=shape, maxshape=longest)
        every = (slice(0, h5py.h5s.UNLIMITED), *(slice(0, size) for size in shape[1:]))
        layout[every] = of[every]
    spot.file.create_virtual_dataset(spot.path, layout)


def _unknown_filter(spot: Spot) -> None:
    shape, kind = _shape(spot.object), spot.object.id.get_type()
    group, name = spot.object.parent, spot.path.rpartition("/")[2]
    spot.remove()
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk(tuple(max(1, size) for size in shape))
    # HDF5 lets one be named that it has not got, as long as it may do without.
    made.set_filter(spot.rng.choice(UNKNOWN), h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=made)


def _group(spot: Spot) -> None:
    spot.remove()
    spot.file.create_group(spot.path)


def another_number(spot: Spot) -> None:
    """Set one number of one field to a limit of its type."""
    values = np.array(spot.object[()])
    if not values.size:
        raise ValueError("there is no number to change")
    flat = values.reshape(-1)
    row = spot.rng.randrange(len(flat))
    names = values.dtype.names
    column = flat[spot.rng.choice(names)] if names else flat
    if column.dtype.kind == "f":
        with np.errstate(all="ignore"):
            column[row] = np.float64(spot.rng.choice(FLOATS)).astype(column.dtype)
    else:
        size = column.dtype.itemsize
        number = spot.rng.choice(EDGES) % 2 ** (8 * size)
        column[row] = np.frombuffer(number.to_bytes(size, "little"), column.dtype)[0]
    spot.object[...] = values


CHANGES: dict[str, Change] = {
    "removed": Spot.remove,
    "a soft link to itself": lambda spot: spot.link(SoftLink(f"/{spot.path}")),
    "a soft link to the root": lambda spot: spot.link(SoftLink("/")),
    "a soft link to nowhere": lambda spot: spot.link(SoftLink("/no/where")),
    "an external link": lambda spot: spot.link(ExternalLink(str(spot.pipe), spot.path)),
    "an external link beside": lambda spot: spot.link(ExternalLink("pipe", spot.path)),
    "an external link to itself": lambda spot: spot.link(ExternalLink("run.h5", spot.path)),
    "a hard link to the root": lambda spot: spot.link(spot.file["/"]),
    "a hard link to its group": lambda spot: spot.link(spot.object.parent),
    "another dataset": lambda spot: spot.link(spot.file["modules"]),
    "a group": _group,
    "a type": lambda spot: spot.link(np.dtype("<f4")),
    "one number": _made(lambda _: {"data": np.float32(1)}),
    "nothing": _made(lambda _: {"data": h5py.Empty("<f4")}),
    "empty": _rows(0),
    "no columns": _made(lambda old: {"shape": (*_shape(old)[:1], 0), "dtype": old.dtype}),
    "three axes": _made(lambda old: {"shape": (*_shape(old), 2), "dtype": old.dtype}),
    "one axis": _made(lambda old: {"shape": _shape(old)[:1], "dtype": old.dtype}),
    "whole numbers": _as("<i4"),
    "big-endian": _made(lambda old: {"shape": _shape(old), "dtype": old.dtype.newbyteorder(">")}),
    "bytes": _as("S7"),
    "raw bytes": _as("V9"),
    "complex": _as("<c8"),
    "small floats": _as("<f2"),
    "texts": _as(h5py.string_dtype()),
    "lists": _as(h5py.vlen_dtype("<f4")),
    "references": _as(h5py.ref_dtype),
    "regions": _as(h5py.regionref_dtype),
    "names for numbers": _as(h5py.enum_dtype({"a": 1, "b": 2})),
    "arrays as elements": _as(np.dtype(("<f4", (3,)))),
    "other offsets": _as(np.dtype({"names": ["x"], "formats": ["<f4"], "offsets": [40]})),
    "fields turned round": _made(_other_fields),
    "packed with gzip": _same(chunks=True, compression="gzip", shuffle=True),
    "packed with lzf": _same(chunks=True, compression="lzf"),
    "with checksums": _same(chunks=True, fletcher32=True),
    "rounded": _same(chunks=True, scaleoffset=2),
    "in one piece": _same(),
    "huge and packed": _rows(10**12, compression="gzip", chunks=True),
    "huge": _rows(2**50, chunks=True),
    "huge in one piece": _rows(2**36),
    "wide": _made(lambda old: {"shape": (3, 2**40), "dtype": old.dtype, "chunks": (1, 2**20)}),
    "of large chunks": _made(_large_chunks),
    "data elsewhere": _data_elsewhere,
    "virtual": _virtual,
    "an unknown filter": _unknown_filter,
}
