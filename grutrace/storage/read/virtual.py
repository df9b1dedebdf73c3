"""Virtual datasets of a merged file, whose rows are in shards in the same folder.

HDF5 opens any file that a virtual dataset names. To prevent that, the rows are never read through
HDF5's virtual datasets. The mapping is read from the creation properties and checked against
docs/format.md, and the shards are opened with grutrace's own handles. The shape is not read from
HDF5 either, because that may open files too.

Module contents: `read_spans` and `create_virtual`, for the mapping of one dataset; `ShardFiles`,
the shards of a merged file; `VirtualColumns`, the virtual datasets of a merged file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from grutrace.errors import TraceFileError
from grutrace.records import Array, TraceHeader
from grutrace.storage.format.header import read_root
from grutrace.storage.format.schema import DatasetSpec, check_dataset, create_growing_dataset
from grutrace.storage.format.shard_stamp import read_merged_shards
from grutrace.storage.format.tables import ShardCalls, Tables
from grutrace.storage.hdf5.errors import require, translate_read_errors
from grutrace.storage.hdf5.handle import SharedReadHandle
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import ConcatenatedRows, FileRows

#: HDF5's name for the file that contains the virtual dataset.
SELF = "."

#: Group of a merged file with the rows that were copied from shards.
COPIED = "copied"


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
    found: list[SourceSpan] = []
    total = None
    for number in range(properties.get_virtual_count()):
        target, source = (
            properties.get_virtual_vspace(number),
            properties.get_virtual_srcspace(number),
        )
        require(
            len(target.shape) == 1 + len(spec.item_shape),
            dataset_path,
            spec.item_shape,
            target.shape,
        )
        total = target.shape[0] if total is None else total
        first, count = _block(target, dataset_path)
        start, taken = _block(source, dataset_path)
        at = sum(span.count for span in found)
        expected = (
            f"{taken} whole items of {spec.item_shape} from {at} on, the first of their source"
        )
        facts = (target.shape, first, count, start) == (
            (total, *spec.item_shape),
            (at, *(0 for _ in spec.item_shape)),
            (taken[0], *spec.item_shape),
            (0, *(0 for _ in spec.item_shape)),
        )
        require(
            facts and count == taken,
            dataset_path,
            expected,
            f"{count} at {first} of {target.shape}",
        )
        span = SourceSpan(
            _unescaped(properties.get_virtual_filename(number), dataset_path),
            _unescaped(properties.get_virtual_dsetname(number), dataset_path),
            count[0],
        )
        require(_is_like(span, dataset_path), dataset_path, "a mapping to the same column", span)
        found.append(span)
    covered = sum(span.count for span in found)
    require(found and covered == total, dataset_path, f"{total} items in its sources", covered)
    # For mappings of fixed size, reading the shape opens no other file.
    kind, shape = dataset.dtype, dataset.shape
    expected = f"{spec.dtype} of shape {(total, *spec.item_shape)}"
    fits = (kind, shape) == (spec.dtype, (total, *spec.item_shape))
    require(fits, dataset_path, expected, f"{kind} of shape {shape}")
    return tuple(found)


def _block(space: h5s.SpaceID, dataset_path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return start and size of a selection, which must be one block of fixed size."""
    is_block = space.get_select_type() == h5s.SEL_HYPERSLABS and space.is_regular_hyperslab()
    require(is_block, dataset_path, "a mapping of blocks", "another")
    start, stride, count, block = space.get_regular_hyperslab()
    numbers = zip(stride, count, block, strict=True)
    require(all(c == 1 or s == b == 1 for s, c, b in numbers), dataset_path, "one block", "several")
    size = tuple(c * b for c, b in zip(count, block, strict=True))
    require(
        max(size, default=1) < 2**63, dataset_path, "a mapping of fixed size", "one without end"
    )
    return tuple(start), size


def _is_like(span: SourceSpan, dataset_path: str) -> bool:
    """Return whether a span is of the same dataset. A run's part may have another module path."""
    if span.file == SELF:
        return (
            re.fullmatch(rf"{COPIED}/rank[0-9]{{4,}}/{re.escape(dataset_path)}", span.dataset_path)
            is not None
        )
    return span.dataset_path.split("/")[2:] == dataset_path.split("/")[2:]


def create_virtual(
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
    properties.set_fill_value(np.full((), np.nan, spec.dtype))
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


class ShardFiles:
    """The shards of a merged file. Each is opened on its first read.

    Args:
        path: Path of the merged file.
        own_handle: Handle of the merged file.
        created: Creation time of each shard, by file name. No other files are opened.

    Raises:
        TraceFileError: A shard is missing.
    """

    def __init__(self, path: Path, own_handle: SharedReadHandle, created: dict[str, float]) -> None:
        self._folder, self._own_handle, self._created = path.resolve().parent, own_handle, created
        self._merged = path
        self._handles: dict[str, SharedReadHandle] = {}
        for name in created:
            self._path(name)

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of the shards."""
        return tuple(self._folder / name for name in self._created)

    @contextmanager
    def acquire(self, span: SourceSpan, spec: DatasetSpec) -> Iterator[h5py.Dataset]:
        """Yield the dataset of a span, for one read.

        Raises:
            TraceFileError: The file or the dataset does not exist, or has a wrong type or shape.
        """
        with translate_read_errors(self._merged), self._own_handle.acquire():
            handle = self._own_handle if span.file == SELF else self._handle(self._path(span.file))
            if handle is self._own_handle:
                yield _checked(handle, span, spec)
                return
        with translate_read_errors(self._folder / span.file), handle.acquire():
            yield _checked(handle, span, spec)

    def close(self) -> None:
        """Close all shards. Closing twice has no effect."""
        for handle in self._handles.values():
            handle.close()

    def _handle(self, path: Path) -> SharedReadHandle:
        if path.name not in self._handles:
            with translate_read_errors(path):
                handle = SharedReadHandle(path)
                self._handles[path.name] = handle
                with handle.acquire() as file:
                    found = read_root(file)["created"]
            if found != self._created[path.name]:
                raise TraceFileError(
                    f"{path} is not the file that {self._merged} was merged of: it was created at "
                    "another time. Merge the shards again"
                )
        return self._handles[path.name]

    def _path(self, name: str) -> Path:
        """Return the path of a shard, which must be a regular file of the same folder."""
        require(
            Path(name).name == name and "\0" not in name and name in self._created,
            "a mapping",
            "a plain file name",
            repr(name),
        )
        path = self._folder / name
        try:
            status = path.lstat()
        except OSError:
            raise TraceFileError(
                f"{self._merged} needs its shards, and {path} is missing: keep them together"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise TraceFileError(
                f"{self._merged} needs its shards, and {path} is not a regular file"
            )
        return path


def _checked(handle: SharedReadHandle, span: SourceSpan, spec: DatasetSpec) -> h5py.Dataset:
    dataset = handle.dataset(span.dataset_path, span.count)
    check_dataset(dataset, span.dataset_path, spec)
    return dataset


class VirtualColumns:
    """The virtual datasets of a merged file. A file that is not merged has none.

    Args:
        path: Path of the file.
        handle: Acquired handle of the file.
        header: Header of the file.
        specs: All growing datasets, by path.

    Raises:
        FormatError: The file is damaged.
        TraceFileError: A shard is missing.
    """

    def __init__(
        self,
        path: Path,
        handle: SharedReadHandle,
        header: TraceHeader,
        specs: Mapping[str, DatasetSpec],
    ) -> None:
        self._shards, self._specs = read_merged_shards(header), specs
        self._spans: dict[str, tuple[SourceSpan, ...]] = {}
        self._cached_tables: tuple[Tables, Tables] | None = None
        files = {name: created for each in self._shards for name, created in each.files.items()}
        self._shard_files = ShardFiles(path, handle, files)
        for dataset_path, spec in specs.items() if self._shards else ():
            spans = read_spans(handle.dataset_id(dataset_path), dataset_path, spec)
            if spans is not None:
                self._spans[dataset_path] = spans

    def __contains__(self, dataset_path: str) -> bool:
        return dataset_path in self._spans

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards of the file."""
        return self._shard_files.files

    def require_lengths(self, counts: Mapping[str, int]) -> None:
        """Check that each virtual dataset has exactly the items that the tables count.

        Raises:
            FormatError: The number of items differs.
        """
        for dataset_path, spans in self._spans.items():
            found = sum(span.count for span in spans)
            require(
                found == counts[dataset_path], dataset_path, f"{counts[dataset_path]} items", found
            )

    def with_ranks(self, tables: Tables) -> Tables:
        """Return the tables of the file, with the calls of each shard.

        Raises:
            FormatError: The number of calls differs from that of the shards.
        """
        if not self._shards:
            return tables
        if self._cached_tables is None or self._cached_tables[0] is not tables:
            found = sum(shard.calls for shard in self._shards)
            where = "attribute 'options', shards"
            require(found == len(tables.calls), where, f"{len(tables.calls)} calls", found)
            shards = (ShardCalls(each.rank, each.calls, each.closed) for each in self._shards)
            self._cached_tables = tables, replace(tables, shards=tuple(shards))
        return self._cached_tables[1]

    def rows(self, dataset_path: str) -> Rows:
        """Return all rows of a virtual dataset, (N, W), which indexing reads."""
        spec, spans = self._specs[dataset_path], self._spans[dataset_path]
        (width,) = spec.item_shape
        parts = [
            FileRows(
                partial(self._shard_files.acquire, span, spec), (span.count, width), spec.dtype
            )
            for span in spans
        ]
        return ConcatenatedRows(parts, (sum(map(len, parts)), width), spec.dtype)

    def items(self, dataset_path: str, start: int, stop: int) -> Array:
        """Return the items `start` to `stop` of a virtual dataset."""
        spec = self._specs[dataset_path]
        found = [np.empty((0, *spec.item_shape), spec.dtype)]
        for span in self._spans[dataset_path]:
            first, last = max(0, start), min(span.count, stop)
            if first < last:
                with self._shard_files.acquire(span, spec) as dataset:
                    found.append(np.asarray(dataset[first:last]))
            start, stop = start - span.count, stop - span.count
        return np.concatenate(found)

    def close(self) -> None:
        """Close the shards. Closing twice has no effect."""
        self._shard_files.close()
