"""Create the datasets of a trace file: growing ones, or virtual ones in a merged file.

The rows of a virtual dataset are in other files. HDF5 opens any file that a virtual dataset names.
So grutrace never reads rows through HDF5's virtual datasets: `read_spans` reads the mapping from
the creation properties and checks it against docs/format.md. The shape is not read from HDF5
before that check either, because that may open files too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.schema import COMMITTED, DatasetSpec, dataset_specs, shared_inputs
from grutrace.storage.hdf5.errors import require

#: HDF5's name for the file that contains the virtual dataset.
SELF = "."

#: Group of a merged file with the rows that were copied from shards.
COPIED = "copied"

#: Creates a dataset at a path of a file.
CreateDataset: TypeAlias = Callable[[h5py.File, str, DatasetSpec], h5py.Dataset]


def create_datasets(
    file: h5py.File, modules: Sequence[ModuleInfo], create: CreateDataset | None = None
) -> None:
    """Create all empty datasets of `dataset_specs`, and `committed`, all zero.

    Args:
        file: The file.
        modules: Modules of the trace.
        create: Creates one dataset; `create_growing_dataset` by default.
    """
    create = create or create_growing_dataset
    file.create_dataset("committed", data=np.zeros((), COMMITTED))
    for path, spec in dataset_specs(modules).items():
        dataset = create(file, path, spec)
        for axis, label in enumerate(spec.axes):
            dataset.dims[axis].label = label
    for path, target in shared_inputs(modules):
        file[path] = file[target]


def create_growing_dataset(
    file: h5py.File,
    path: str,
    spec: DatasetSpec,
    row_filters: Mapping[str, Any] | None = None,
    items: Mapping[str, int] | None = None,
) -> h5py.Dataset:
    """Create an empty dataset that can grow.

    Args:
        file: The file.
        path: Path of the dataset.
        spec: Type, shape and chunks of the dataset.
        row_filters: Keyword arguments of `create_dataset` for datasets of rows.
        items: Final number of items of each dataset, if its chunks need hold no more.
    """
    chunks = spec.chunks
    if items is not None:
        # An empty dataset has no chunk.
        chunks = (min(chunks[0], items[path] or chunks[0]), *chunks[1:])
    # Rows are written completely before a reader sees them, so HDF5 need not fill them first.
    # (From h5py 3.12 on, create_dataset has an argument for this.)
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    return file.create_dataset(
        path,
        shape=(0, *spec.item_shape),
        maxshape=(None, *spec.item_shape),
        chunks=chunks,
        dtype=spec.dtype,
        dcpl=properties,
        **(row_filters or {} if spec.axes[:1] == ("step",) else {}),
    )


@dataclass(frozen=True)
class SourceSpan:
    """The first items of another dataset, which are part of a virtual dataset.

    Attributes:
        file: Name of a file in the folder of the merged file, or `SELF`.
        dataset_path: Path of the dataset in that file.
        count: Number of items.
    """

    file: str
    dataset_path: str
    count: int


def _fill_value(dtype: np.dtype[Any]) -> Array:
    """Return NaN, in each field that is a float; 0 in others."""
    if dtype.names is None:
        return np.full((), np.nan, dtype)
    value = np.zeros((), dtype)
    for name in dtype.names:
        if dtype[name].kind == "f":
            value[name] = np.nan
    return value


def create_virtual_dataset(
    spans: Mapping[str, Sequence[SourceSpan]],
    file: h5py.File,
    dataset_path: str,
    spec: DatasetSpec,
) -> h5py.Dataset:
    """Create a virtual dataset with these spans, or an empty dataset if it has none."""
    if dataset_path not in spans:
        return create_growing_dataset(file, dataset_path, spec)
    total = sum(span.count for span in spans[dataset_path])
    properties, start = h5p.create(h5p.DATASET_CREATE), 0
    # HDF5 silently returns fill values for a missing shard. Zeros could be mistaken for values.
    properties.set_fill_value(_fill_value(spec.dtype))
    corner = (0,) * len(spec.item_shape)
    for span in spans[dataset_path]:
        # A fixed selection: "all" would grow with the shard.
        block = (span.count, *spec.item_shape)
        target, source = h5s.create_simple((total, *spec.item_shape)), h5s.create_simple(block)
        target.select_hyperslab((start, *corner), block)
        source.select_hyperslab((0, *corner), block)
        names = os.fsencode(_escaped(span.file)), _escaped(span.dataset_path).encode()
        properties.set_virtual(target, *names, source)
        start += span.count
    space = h5s.create_simple((total, *spec.item_shape))
    kind = h5t.py_create(spec.dtype, logical=True)
    h5d.create(file.id, dataset_path.encode(), kind, space, properties).close()
    return file[dataset_path]


def read_spans(
    dataset: h5d.DatasetID, dataset_path: str, spec: DatasetSpec
) -> tuple[SourceSpan, ...] | None:
    """Return the sources of a virtual dataset, from first to last; None for other datasets.

    Args:
        dataset: The dataset. Only its type and creation properties are read.
        dataset_path: Path of the dataset.
        spec: Expected type and shape.

    Raises:
        FormatError: A mapping is not of whole items, end to end, from the start of their source.
    """
    properties = dataset.get_create_plist()
    if properties.get_layout() != h5d.VIRTUAL:
        return None
    spans: list[SourceSpan] = []
    total = None
    for number in range(properties.get_virtual_count()):
        target = properties.get_virtual_vspace(number)
        source = properties.get_virtual_srcspace(number)
        rank = 1 + len(spec.item_shape)
        require(len(target.shape) == rank, dataset_path, spec.item_shape, target.shape)
        total = target.shape[0] if total is None else total
        target_start, target_size = _selected_block(target, dataset_path)
        source_start, source_size = _selected_block(source, dataset_path)
        offset = sum(span.count for span in spans)
        corner = tuple(0 for _ in spec.item_shape)
        follows = (
            target.shape == (total, *spec.item_shape)
            and target_start == (offset, *corner)
            and source_start == (0, *corner)
            and target_size == source_size == (source_size[0], *spec.item_shape)
        )
        require(
            follows,
            dataset_path,
            f"{source_size} whole items of {spec.item_shape} from {offset} on, the first of their "
            "source",
            f"{target_size} at {target_start} of {target.shape}",
        )
        span = SourceSpan(
            _unescaped(properties.get_virtual_filename(number), dataset_path),
            _unescaped(properties.get_virtual_dsetname(number), dataset_path),
            target_size[0],
        )
        is_same = _is_same_dataset(span, dataset_path)
        require(is_same, dataset_path, "a mapping to the same column", span)
        spans.append(span)
    count = sum(span.count for span in spans)
    require(spans and count == total, dataset_path, f"{total} items in its sources", count)
    # For mappings of fixed size, reading the shape opens no other file.
    dtype, shape = dataset.dtype, dataset.shape
    expected = f"{spec.dtype} of shape {(total, *spec.item_shape)}"
    matches = (dtype, shape) == (spec.dtype, (total, *spec.item_shape))
    require(matches, dataset_path, expected, f"{dtype} of shape {shape}")
    return tuple(spans)


def _selected_block(
    space: h5s.SpaceID, dataset_path: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and size of a selection, which must be one block of fixed size."""
    is_block = space.get_select_type() == h5s.SEL_HYPERSLABS and space.is_regular_hyperslab()
    require(is_block, dataset_path, "a mapping of blocks", "another")
    start, stride, count, block = space.get_regular_hyperslab()
    axes = list(zip(stride, count, block, strict=True))
    # Several blocks are contiguous if each is one item that follows the one before.
    is_contiguous = all(count == 1 or stride == block == 1 for stride, count, block in axes)
    require(is_contiguous, dataset_path, "one block", "several")
    size = tuple(count * block for _, count, block in axes)
    is_fixed = max(size, default=1) < 2**63
    require(is_fixed, dataset_path, "a mapping of fixed size", "one without end")
    return tuple(start), size


def _is_same_dataset(span: SourceSpan, dataset_path: str) -> bool:
    """Return whether a span is of the dataset of this path.

    Only the site and the name must match: a part of a run may have another module path.
    """
    if span.file == SELF:
        return (
            re.fullmatch(rf"{COPIED}/rank[0-9]{{4,}}/{re.escape(dataset_path)}", span.dataset_path)
            is not None
        )
    return span.dataset_path.split("/")[2:] == dataset_path.split("/")[2:]


def _escaped(name: str) -> str:
    """Escape percent signs, which are format characters in the names of a mapping."""
    return name.replace("%", "%%")


def _unescaped(name: str, dataset_path: str) -> str:
    require(
        not re.search("%(?!%)", name.replace("%%", "")),
        dataset_path,
        "names without %b",
        repr(name),
    )
    return name.replace("%%", "%")
