"""Rows of a merged file, which lie in the shards beside it: virtual datasets, made and read.

HDF5 would open whatever file a virtual dataset names. Here it is never asked to: the mapping is
read from the dataset's creation properties, and only what docs/format.md allows is followed,
through handles of our own. Nor is HDF5 asked for the shape, for which it may open files, too.

What makes a merged file more than a trace: whose calls are whose, and rows in its shards.
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

#: The name by which HDF5 means the file itself.
SELF = "."

#: Where a merged file keeps what it had to copy.
COPIED = "copied"


@dataclass(frozen=True)
class SourceSpan:
    """Some items of a virtual dataset, which are the first ones of another dataset.

    Attributes:
        file: Name of a file in the folder of the merged one, or `ITSELF`.
        place: Of the dataset in that file.
        count: How many items.
    """

    file: str
    dataset_path: str
    count: int


def read_spans(
    dataset: h5d.DatasetID, dataset_path: str, spec: DatasetSpec
) -> tuple[SourceSpan, ...] | None:
    """The items of a virtual dataset, from first to last; None of one that is not virtual.

    Args:
        dataset: Nothing but its type and properties is asked for.
        place: Of the dataset.
        column: What it should hold.

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
    # Of a mapping of fixed size alone, this opens no other file.
    kind, shape = dataset.dtype, dataset.shape
    expected = f"{spec.dtype} of shape {(total, *spec.item_shape)}"
    fits = (kind, shape) == (spec.dtype, (total, *spec.item_shape))
    require(fits, dataset_path, expected, f"{kind} of shape {shape}")
    return tuple(found)


def _block(space: h5s.SpaceID, dataset_path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first corner and the size of a selection that is one block of fixed size."""
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
    """Whether a span is of the same column: the module of a run's part may be called otherwise."""
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
    """Create a column whose items are elsewhere; or, where there are none, one without."""
    if dataset_path not in spans:
        return create_growing_dataset(file, dataset_path, spec)
    total = sum(span.count for span in spans[dataset_path])
    properties, start = h5p.create(h5p.DATASET_CREATE), 0
    # What HDF5 gives, without a word, where a shard is gone: zeros would pass for values.
    properties.set_fill_value(np.full((), np.nan, spec.dtype))
    corner = (0,) * len(spec.item_shape)
    for span in spans[dataset_path]:
        # The first items, and not "all", which would grow with the shard.
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
    """A name as HDF5 wants it in a mapping, where a percent sign has another meaning."""
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
    """The shards beside a merged file, each opened when something is first read from it.

    Args:
        path: Of the merged file.
        own: The handle of the merged file.
        created: When each file was begun, by its name. No others are opened.

    Raises:
        TraceFileError: One of them is not there.
    """

    def __init__(self, path: Path, own_handle: SharedReadHandle, created: dict[str, float]) -> None:
        self._folder, self._own_handle, self._created = path.resolve().parent, own_handle, created
        self._merged = path
        self._handles: dict[str, SharedReadHandle] = {}
        for name in created:
            self._path(name)

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(self._folder / name for name in self._created)

    @contextmanager
    def acquire(self, span: SourceSpan, spec: DatasetSpec) -> Iterator[h5py.Dataset]:
        """The dataset that a span is the beginning of, for one read.

        Raises:
            TraceFileError: It is not there, or is not what it should be.
        """
        with translate_read_errors(self._merged), self._own_handle.acquire():
            handle = self._own_handle if span.file == SELF else self._handle(self._path(span.file))
            if handle is self._own_handle:
                yield _checked(handle, span, spec)
                return
        with translate_read_errors(self._folder / span.file), handle.acquire():
            yield _checked(handle, span, spec)

    def close(self) -> None:
        """Close all of them. Closing twice does nothing."""
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
                raise TraceFileError(f"{path} is not the file that {self._merged} was merged of")
        return self._handles[path.name]

    def _path(self, name: str) -> Path:
        """Where a file is, if it is a file of this folder and nothing else."""
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
                f"{self._merged} is merged of shards, and {path} is missing: keep them together"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise TraceFileError(f"{self._merged} is merged of shards, and {path} is no plain file")
        return path


def _checked(handle: SharedReadHandle, span: SourceSpan, spec: DatasetSpec) -> h5py.Dataset:
    dataset = handle.dataset(span.dataset_path, span.count)
    check_dataset(dataset, span.dataset_path, spec)
    return dataset


class VirtualColumns:
    """The columns of a file that lie in the shards that it was merged of; none of any other file.

    Args:
        path: Of the file.
        handle: Of the file, lent meanwhile.
        header: Of the file.
        columns: All datasets that grow, by their place.

    Raises:
        FormatError: The file is damaged.
        TraceFileError: A shard is not there.
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
        """The shards that rows are read from."""
        return self._shard_files.files

    def require_lengths(self, counts: Mapping[str, int]) -> None:
        """Require the columns to have just as many items as the tables count.

        Raises:
            FormatError: One has not.
        """
        for dataset_path, spans in self._spans.items():
            found = sum(span.count for span in spans)
            require(
                found == counts[dataset_path], dataset_path, f"{counts[dataset_path]} items", found
            )

    def ranked(self, tables: Tables) -> Tables:
        """The tables of the file, with whose calls are whose.

        Raises:
            FormatError: There are not as many calls as the shards had.
        """
        if not self._shards:
            return tables
        if self._cached_tables is None or self._cached_tables[0] is not tables:
            found = sum(shard.calls for shard in self._shards)
            dataset_path = "attribute 'options', shards"
            require(found == len(tables.calls), dataset_path, f"{len(tables.calls)} calls", found)
            shards = (ShardCalls(each.rank, each.calls, each.closed) for each in self._shards)
            self._cached_tables = tables, replace(tables, shards=tuple(shards))
        return self._cached_tables[1]

    def rows(self, dataset_path: str) -> Rows:
        """All rows of one of these columns, (rows, width), read when they are indexed."""
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
        """Some items of one of these columns."""
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
        """Close the shards. Closing twice does nothing."""
        self._shard_files.close()
