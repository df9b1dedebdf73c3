"""The datasets of a trace file: paths, types, axes and chunks. docs/format.md explains them.

Only this module knows them. `dataset_specs` lists the datasets that a writer creates and that a
reader requires.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from grutrace.records import LOG_PREFIX, ModuleInfo, Site
from grutrace.storage.hdf5.errors import FormatError

FORMAT = "grutrace"

#: The format of a statistics file. See `grutrace.statistics.file`.
STATISTICS_FORMAT = "grutrace statistics"

#: Major and minor version. A reader refuses a newer major version; a minor version only adds data.
FORMAT_VERSION = (1, 5)

#: The file format of HDF5 1.10: the first with SWMR, readable by every later HDF5. ("latest" would
#: be the format of HDF5 2.0 with an h5py that contains 2.0, which older tools refuse.)
LIBVER = ("v110", "v110")

#: Bytes of a chunk of rows: large enough that a million rows need few index entries, small enough
#: that a short trace of many sites stays small.
ROW_CHUNK = 256 * 1024

#: Bytes of a chunk of a table, which grows by one item a call or a sequence.
TABLE_CHUNK = 32 * 1024

#: Largest chunk in bytes, for wide rows and weight matrices.
MAX_CHUNK_BYTES = 1024 * 1024

COMMITTED = np.dtype(
    [
        ("calls", "<u8"),
        ("forks", "<u8"),
        ("annotations", "<u8"),
        ("values", "<u8"),
        ("strings", "<u8"),
        ("characters", "<u8"),
        ("closed", "u1"),
    ]
)
CALL = np.dtype(
    [
        ("time", "<f8"),
        ("module", "<u4"),
        ("tag", "<u4"),
        ("weights", "<u4"),
        ("batch", "<u4"),
        ("training", "u1"),
    ]
)
FORK = np.dtype([("module", "<u4"), ("sequence", "<u8"), ("parent", "<u8"), ("steps", "<u8")])
ANNOTATION = np.dtype(
    [
        ("module", "<u4"),
        ("name", "<u4"),
        ("sequence", "<u8"),
        ("first", "<u8"),
        ("count", "<u8"),
        ("text", "u1"),
    ]
)
PIECE = np.dtype([("sequence", "<u8"), ("steps", "<u4")])
CHECK = np.dtype([("residual", "<f4"), ("tolerance", "<f4"), ("precision", "<f4")])
BACKWARD = np.dtype([("attached", "u1"), ("scale", "<f8")])

#: The tables of the whole trace. `committed` has a count for each table, under the same name.
TABLES = {
    "calls": CALL,
    "forks": FORK,
    "annotations": ANNOTATION,
    "values": np.dtype("<f8"),
    "strings": np.dtype("<u8"),
    "characters": np.dtype("u1"),
}

#: The axes of the tables.
TABLE_AXES = {
    "calls": "call",
    "forks": "fork",
    "annotations": "annotation",
    "values": "value",
    "strings": "string",
    "characters": "character",
}

#: The axes whose scales are in the group of a site. Other scales are in the group of a module.
SITE_AXES = ("unit", "feature", "previous_unit")

#: Characters that are not escaped in the group name of a module.
_UNESCAPED = frozenset((string.ascii_letters + string.digits + "_-.").encode())


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset that grows along its first axis.

    Attributes:
        dtype: Type of the elements, little-endian.
        item_shape: Shape of one item: the shape of the dataset without its first axis.
        axes: Label of each axis; empty for a table.
        chunk_bytes: Target size of a chunk.
        scales: Path of the dimension scale of each axis.
    """

    dtype: np.dtype[Any]
    item_shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    chunk_bytes: int = TABLE_CHUNK
    scales: tuple[str, ...] = ()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk: several items, one item, or some rows of an item that is too large."""
        item = tuple(max(1, size) for size in self.item_shape)
        size = math.prod(item) * self.dtype.itemsize
        if size <= MAX_CHUNK_BYTES:
            return (max(1, self.chunk_bytes // size), *item)
        return (1, max(1, MAX_CHUNK_BYTES * item[0] // size), *item[1:])


def group_name(path: str) -> str:
    """Return the group name of a module: its path, with special characters escaped."""
    if not path:
        return "%"
    if not path.strip("."):
        return "%2E" + path[1:]
    encoded = path.encode("utf-8", "surrogatepass")
    return "".join(chr(byte) if byte in _UNESCAPED else f"%{byte:02X}" for byte in encoded)


def module_path(module: ModuleInfo) -> str:
    """Return the path of the group of a module."""
    return f"modules/{group_name(module.path)}"


def pieces_path(module: ModuleInfo) -> str:
    """Return the path of the pieces of a module."""
    return f"{module_path(module)}/pieces"


def site_path(module: ModuleInfo, suffix: str, name: str) -> str:
    """Return the path of a dataset of a site."""
    return f"{module_path(module)}/{suffix}/{name}"


def input_owner(module: ModuleInfo, site: Site) -> Site:
    """Return the site that stores the input of this one. Both directions of a layer share it."""
    for other in module.sites:
        if other.layer == site.layer and not other.reverse and "input" in other.quantities:
            return other
    return site


def quantity_path(module: ModuleInfo, site: Site, quantity: str) -> str:
    """Return the path of the rows of a quantity. Both directions share one dataset of inputs."""
    owner = input_owner(module, site) if quantity == "input" else site
    return site_path(module, owner.suffix, quantity)


def width(module: ModuleInfo, site: Site, quantity: str) -> int:
    """Return the number of elements in a row of a quantity."""
    if quantity.startswith(LOG_PREFIX):
        return dict(site.logs)[quantity.removeprefix(LOG_PREFIX)]
    return site.input_size if quantity == "input" else module.unit_count(site)


def scale_path(module: ModuleInfo, site: Site, axis: str) -> str:
    """Return the path of the scale of an axis of a site. Sites with the same axis share it."""
    if axis not in SITE_AXES:
        return f"{module_path(module)}/{axis}"
    owner = site
    if axis == "feature":
        owner = input_owner(module, site)
    elif axis == "unit":
        owner = next(other for other in module.sites if other.units == site.units)
    return site_path(module, owner.suffix, axis)


def weight_shapes(module: ModuleInfo, site: Site) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a site: (3H, I), (3H, H), and (3H,) for both biases."""
    stacked = 3 * module.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (stacked, site.input_size),
        "weight_hh": (stacked, module.hidden_size),
    }
    if module.bias:
        shapes |= {"bias_ih": (stacked,), "bias_hh": (stacked,)}
    return shapes


def call_tables(site: Site) -> dict[str, np.dtype[Any]]:
    """Return the type of each dataset of a site that has one item for each call of the module."""
    return {"checks": CHECK} | ({"backward": BACKWARD} if "gradient" in site.quantities else {})


def row_axes(quantity: str) -> tuple[str, str]:
    """Return the axes of the rows of a quantity."""
    if quantity.startswith(LOG_PREFIX):
        return "step", quantity
    return "step", "feature" if quantity == "input" else "unit"


def row_chunks(dtype: np.dtype[Any], width: int) -> tuple[int, ...]:
    """Return the shape of a chunk of rows of this width."""
    return DatasetSpec(dtype, (width,), chunk_bytes=ROW_CHUNK).chunks


def dataset_specs(modules: Sequence[ModuleInfo]) -> dict[str, DatasetSpec]:
    """Return every growing dataset of a trace of these modules, by path."""
    specs = {name: DatasetSpec(dtype, scales=(TABLE_AXES[name],)) for name, dtype in TABLES.items()}
    for module in modules:
        scale = f"{module_path(module)}/piece"
        specs[pieces_path(module)] = DatasetSpec(PIECE, scales=(scale,))
        for site in module.sites:
            specs.update(_site_specs(module, site))
    return specs


def _site_specs(module: ModuleInfo, site: Site) -> Iterator[tuple[str, DatasetSpec]]:
    def scales(*axes: str) -> tuple[str, ...]:
        return tuple(scale_path(module, site, axis) for axis in axes)

    stored = np.dtype(module.dtype).newbyteorder("<")
    for quantity in site.quantities:
        path, axes = quantity_path(module, site, quantity), row_axes(quantity)
        item = (width(module, site, quantity),)
        yield path, DatasetSpec(stored, item, axes, ROW_CHUNK, scales(*axes))
    initial, axes = site_path(module, site.suffix, "initial"), ("sequence", "unit")
    yield initial, DatasetSpec(stored, (module.unit_count(site),), axes, scales=scales(*axes))
    for name, dtype in call_tables(site).items():
        path = site_path(module, site.suffix, name)
        yield path, DatasetSpec(dtype, scales=scales("module_call"))
    weights = np.dtype(module.weights_dtype).newbyteorder("<")
    # Weights are always complete, even if only some units are recorded.
    last_axes = {"weight_ih": "feature", "weight_hh": "previous_unit" if site.units else "unit"}
    for name, shape in weight_shapes(module, site).items():
        labels = ("version", "gate_unit", last_axes.get(name, ""))[: 1 + len(shape)]
        path = site_path(module, site.suffix, name)
        yield path, DatasetSpec(weights, shape, labels, scales=scales(*labels))


def check_dataset(dataset: h5py.Dataset, path: str, spec: DatasetSpec) -> None:
    """Refuse a dataset whose items have another type or shape.

    Raises:
        FormatError: The dataset does not match the specification.
    """
    dtype, shape = dataset.dtype, dataset.shape[1:]
    if (dtype, shape) != (spec.dtype, spec.item_shape):
        expected = f"{spec.dtype} of items {spec.item_shape}"
        raise FormatError(path, expected, f"{dtype} of items {shape}")


def shared_inputs(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, str]]:
    """Yield the hard links of a trace: (path of the link, path of the dataset)."""
    for module in modules:
        for site in module.sites:
            owner = input_owner(module, site)
            if "input" in site.quantities and owner is not site:
                yield (
                    site_path(module, site.suffix, "input"),
                    site_path(module, owner.suffix, "input"),
                )
