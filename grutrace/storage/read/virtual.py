"""Virtual datasets of a merged file, whose rows are in shards in the same folder.

`format/datasets.py` explains why the rows are not read through HDF5's virtual datasets. The shards
are opened with grutrace's own handles.

Module contents: `ShardFiles`, the shards of a merged file; `VirtualColumns`, its virtual datasets.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from grutrace.errors import TraceFileError
from grutrace.records import Array, TraceHeader
from grutrace.storage.format.datasets import SELF, SourceSpan, read_spans
from grutrace.storage.format.header import read_root
from grutrace.storage.format.schema import DatasetSpec, check_dataset
from grutrace.storage.format.shard_stamp import read_merged_shards
from grutrace.storage.format.tables import ShardCalls, Tables
from grutrace.storage.hdf5.errors import require, translate_read_errors
from grutrace.storage.hdf5.handle import SharedReadHandle
from grutrace.storage.interfaces import Rows
from grutrace.storage.read.lazy_rows import ConcatenatedRows, FileRows


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
                yield _checked_dataset(handle, span, spec)
                return
        with translate_read_errors(self._folder / span.file), handle.acquire():
            yield _checked_dataset(handle, span, spec)

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
                    created = read_root(file)["created"]
            if created != self._created[path.name]:
                raise TraceFileError(
                    f"{path} is not the file that {self._merged} was merged from: it was created "
                    "at another time. Merge the shards again"
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


def _checked_dataset(handle: SharedReadHandle, span: SourceSpan, spec: DatasetSpec) -> h5py.Dataset:
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
        created = {name: time for shard in self._shards for name, time in shard.files.items()}
        self._shard_files = ShardFiles(path, handle, created)
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
            count, expected = sum(span.count for span in spans), counts[dataset_path]
            require(count == expected, dataset_path, f"{expected} items", count)

    def with_ranks(self, tables: Tables) -> Tables:
        """Return the tables of the file, with the calls of each shard.

        Raises:
            FormatError: The number of calls differs from that of the shards.
        """
        if not self._shards:
            return tables
        if self._cached_tables is None or self._cached_tables[0] is not tables:
            calls, count = len(tables.calls), sum(shard.calls for shard in self._shards)
            require(count == calls, "attribute 'options', shards", f"{calls} calls", count)
            shards = tuple(
                ShardCalls(shard.rank, shard.calls, shard.closed) for shard in self._shards
            )
            self._cached_tables = tables, replace(tables, shards=shards)
        return self._cached_tables[1]

    def rows(self, dataset_path: str) -> Rows:
        """Return all rows of a virtual dataset, (N, W), which indexing reads."""
        spec, spans = self._specs[dataset_path], self._spans[dataset_path]
        (width,) = spec.item_shape
        arrays = [
            FileRows(
                partial(self._shard_files.acquire, span, spec), (span.count, width), spec.dtype
            )
            for span in spans
        ]
        return ConcatenatedRows(arrays, (sum(map(len, arrays)), width), spec.dtype)

    def items(self, dataset_path: str, start: int, stop: int) -> Array:
        """Return the items `start` to `stop` of a virtual dataset."""
        spec = self._specs[dataset_path]
        arrays = [np.empty((0, *spec.item_shape), spec.dtype)]
        for span in self._spans[dataset_path]:
            span_start, span_stop = max(0, start), min(span.count, stop)
            if span_start < span_stop:
                with self._shard_files.acquire(span, spec) as dataset:
                    arrays.append(np.asarray(dataset[span_start:span_stop]))
            start, stop = start - span.count, stop - span.count
        return np.concatenate(arrays)

    def close(self) -> None:
        """Close the shards. Closing twice has no effect."""
        self._shard_files.close()
