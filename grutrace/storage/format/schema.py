"""The shape of a trace file: names, types, axes and chunks. docs/format.md says what they mean.

Nothing else in grutrace knows them. The writer creates what `layout` lists, the reader demands it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import h5py
import numpy as np
from h5py import h5d, h5p

from grutrace.records import ModuleInfo, Site
from grutrace.storage.hdf5.errors import FormatError

FORMAT = "grutrace"

#: The format of a file of statistics, which is another one: see `grutrace.statistics.file`.
STATISTICS_FORMAT = "grutrace statistics"

#: Major and minor. A reader refuses a newer major number; a newer minor one only adds.
FORMAT_VERSION = (1, 2)

#: HDF5's 1.10 format: the first with SWMR, and what every HDF5 since then reads. ("latest" is
#: HDF5 2.0's own format where h5py brings 2.0, and older tools refuse that.)
LIBVER = ("v110", "v110")

#: A chunk of rows. Large enough that a million rows need few index entries, small enough that a
#: short trace of many sites stays small. Bytes.
ROW_CHUNK = 256 * 1024

#: A chunk of what grows by one item a call or a sequence. Bytes.
TABLE_CHUNK = 32 * 1024

#: No chunk is larger, however wide a row or a weight matrix is. Bytes.
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

#: The tables of the whole trace. `committed` has a count for each, under the same name.
TABLES = {
    "calls": CALL,
    "forks": FORK,
    "annotations": ANNOTATION,
    "values": np.dtype("<f8"),
    "strings": np.dtype("<u8"),
    "characters": np.dtype("u1"),
}

#: Their axes.
TABLE_AXES = {
    "calls": "call",
    "forks": "fork",
    "annotations": "annotation",
    "values": "value",
    "strings": "string",
    "characters": "character",
}

#: The axes that a site has, in its group; the others are its module's.
SITE_AXES = ("unit", "feature", "previous_unit")

#: Characters that a module's group name keeps as they are.
_UNESCAPED = frozenset((string.ascii_letters + string.digits + "_-.").encode())


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset that grows along its first axis.

    Attributes:
        dtype: Type of its elements, little-endian.
        item: Shape of what it grows by: the shape of the dataset without its first axis.
        axes: A label for each axis; empty for a table.
        chunk: Bytes of a chunk that holds several items.
        scales: For each axis the place of its dimension scale.
    """

    dtype: np.dtype[Any]
    item: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    chunk: int = TABLE_CHUNK
    scales: tuple[str, ...] = ()

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk: several items, or one, or, of one too large, a part of its rows."""
        item = tuple(max(1, size) for size in self.item)
        size = math.prod(item) * self.dtype.itemsize
        if size <= MAX_CHUNK_BYTES:
            return (max(1, self.chunk // size), *item)
        return (1, max(1, MAX_CHUNK_BYTES * item[0] // size), *item[1:])


def group_name(path: str) -> str:
    """The name of a module's group, which is its path with whatever HDF5 minds escaped."""
    if not path:
        return "%"
    if not path.strip("."):
        return "%2E" + path[1:]
    encoded = path.encode("utf-8", "surrogatepass")
    return "".join(chr(byte) if byte in _UNESCAPED else f"%{byte:02X}" for byte in encoded)


def module_path(module: ModuleInfo) -> str:
    """Place of a module's group in the file."""
    return f"modules/{group_name(module.path)}"


def pieces_path(module: ModuleInfo) -> str:
    """Place of a module's pieces in the file."""
    return f"{module_path(module)}/pieces"


def site_path(module: ModuleInfo, suffix: str, name: str) -> str:
    """Place of one dataset of a site in the file."""
    return f"{module_path(module)}/{suffix}/{name}"


def input_owner(module: ModuleInfo, site: Site) -> Site:
    """The site that holds the input rows of this one: both directions of a layer read the same."""
    for other in module.sites:
        if other.layer == site.layer and not other.reverse and "input" in other.quantities:
            return other
    return site


def quantity_path(module: ModuleInfo, site: Site, quantity: str) -> str:
    """Place of the rows of a quantity: for an input that two directions share, the one dataset."""
    owner = input_owner(module, site) if quantity == "input" else site
    return site_path(module, owner.suffix, quantity)


def width(module: ModuleInfo, site: Site, quantity: str) -> int:
    """Elements in a row of this quantity."""
    return site.input_size if quantity == "input" else module.unit_count(site)


def scale_path(module: ModuleInfo, site: Site, axis: str) -> str:
    """Place of the scale of an axis of a site. Sites whose axis is the same share one."""
    if axis not in SITE_AXES:
        return f"{module_path(module)}/{axis}"
    owner = site
    if axis == "feature":
        owner = input_owner(module, site)
    elif axis == "unit":
        owner = next(each for each in module.sites if each.units == site.units)
    return site_path(module, owner.suffix, axis)


def weight_shapes(module: ModuleInfo, site: Site) -> dict[str, tuple[int, ...]]:
    """The weights that a site has, and their shapes: (3H, I), (3H, H) and twice (3H,)."""
    stacked = 3 * module.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (stacked, site.input_size),
        "weight_hh": (stacked, module.hidden_size),
    }
    if module.bias:
        shapes |= {"bias_ih": (stacked,), "bias_hh": (stacked,)}
    return shapes


def row_axes(quantity: str) -> tuple[str, str]:
    """The axes of the rows of a quantity."""
    return "step", "feature" if quantity == "input" else "unit"


def row_chunks(dtype: np.dtype[Any], width: int) -> tuple[int, ...]:
    """Shape of a chunk of rows that are so wide."""
    return DatasetSpec(dtype, (width,), chunk=ROW_CHUNK).chunks


def dataset_specs(modules: Sequence[ModuleInfo]) -> dict[str, DatasetSpec]:
    """Every growing dataset of a trace of these modules, by its place in the file."""
    columns = {
        name: DatasetSpec(dtype, scales=(TABLE_AXES[name],)) for name, dtype in TABLES.items()
    }
    for module in modules:
        scale = f"{module_path(module)}/piece"
        columns[pieces_path(module)] = DatasetSpec(PIECE, scales=(scale,))
        for site in module.sites:
            columns.update(_site_specs(module, site))
    return columns


def _site_specs(module: ModuleInfo, site: Site) -> Iterator[tuple[str, DatasetSpec]]:
    def scales(*axes: str) -> tuple[str, ...]:
        return tuple(scale_path(module, site, axis) for axis in axes)

    kept = np.dtype(module.dtype).newbyteorder("<")
    for quantity in site.quantities:
        place, axes = quantity_path(module, site, quantity), row_axes(quantity)
        item = (width(module, site, quantity),)
        yield place, DatasetSpec(kept, item, axes, ROW_CHUNK, scales(*axes))
    initial, axes = site_path(module, site.suffix, "initial"), ("sequence", "unit")
    yield initial, DatasetSpec(kept, (module.unit_count(site),), axes, scales=scales(*axes))
    checks = site_path(module, site.suffix, "checks")
    yield checks, DatasetSpec(CHECK, scales=scales("module_call"))
    weights = np.dtype(module.weights_dtype).newbyteorder("<")
    # Weights are whole, whichever units are recorded.
    last = {"weight_ih": "feature", "weight_hh": "previous_unit" if site.units else "unit"}
    for name, shape in weight_shapes(module, site).items():
        labels = ("version", "gate_unit", last.get(name, ""))[: 1 + len(shape)]
        place = site_path(module, site.suffix, name)
        yield place, DatasetSpec(weights, shape, labels, scales=scales(*labels))


def check_dataset(dataset: h5py.Dataset, place: str, column: DatasetSpec) -> None:
    """Require a dataset to hold such items.

    Raises:
        FormatError: It holds others.
    """
    dtype, shape = dataset.dtype, dataset.shape[1:]
    if (dtype, shape) != (column.dtype, column.item):
        expected = f"{column.dtype} of items {column.item}"
        raise FormatError(place, expected, f"{dtype} of items {shape}")


def shared_inputs(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, str]]:
    """The hard links of a trace: (place of the link, place of the dataset)."""
    for module in modules:
        for site in module.sites:
            owner = input_owner(module, site)
            if "input" in site.quantities and owner is not site:
                yield (
                    site_path(module, site.suffix, "input"),
                    site_path(module, owner.suffix, "input"),
                )


#: Creates a column at a place of a file.
CreateDataset: TypeAlias = Callable[[h5py.File, str, DatasetSpec], h5py.Dataset]


def create_datasets(
    file: h5py.File, modules: Sequence[ModuleInfo], create: CreateDataset | None = None
) -> None:
    """Create everything that `layout` lists, empty, and `committed`, all zero.

    Args:
        file: The file.
        modules: Of the trace.
        create: Creates a column at a place; `create_growing_dataset` unless given.
    """
    create = create or create_growing_dataset
    file.create_dataset("committed", data=np.zeros((), COMMITTED))
    for place, column in dataset_specs(modules).items():
        dataset = create(file, place, column)
        for axis, label in enumerate(column.axes):
            dataset.dims[axis].label = label
    for place, target in shared_inputs(modules):
        file[place] = file[target]


def create_growing_dataset(
    file: h5py.File,
    place: str,
    column: DatasetSpec,
    packed: Mapping[str, Any] | None = None,
    items: Mapping[str, int] | None = None,
) -> h5py.Dataset:
    """Create a dataset that grows, empty.

    Args:
        file: The file.
        place: Where.
        column: What.
        packed: What h5py creates datasets of rows with, if those are to be compressed.
        items: By place, how many items a dataset will hold, if its chunks need hold no more.
    """
    chunks = column.chunks
    if items is not None:
        # What is empty takes no chunk.
        chunks = (min(chunks[0], items[place] or chunks[0]), *chunks[1:])
    # Rows are written whole before anyone may read them: filling first is work for nothing.
    # (h5py has a word of its own for it from 3.12 on.)
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    return file.create_dataset(
        place,
        shape=(0, *column.item),
        maxshape=(None, *column.item),
        chunks=chunks,
        dtype=column.dtype,
        dcpl=properties,
        **(packed or {} if column.axes[:1] == ("step",) else {}),
    )
