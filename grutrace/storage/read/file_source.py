"""`FileSource` reads a trace file: complete, being written, or after a crash of its writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import StateError, TraceFileError
from grutrace.records import AnnotationRecord, Array, Site
from grutrace.storage.annotate import annotate_file
from grutrace.storage.format.header import read_header
from grutrace.storage.format.schema import (
    check_dataset,
    dataset_specs,
    quantity_path,
    site_path,
    weight_shapes,
)
from grutrace.storage.format.shard_stamp import read_merged_shards, read_shard
from grutrace.storage.format.tables import TableReader, Tables, dataset_lengths
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.handle import SharedReadHandle
from grutrace.storage.hdf5.remote import RemoteReadHandle
from grutrace.storage.interfaces import Rows, SnapshotReader
from grutrace.storage.read.lazy_rows import FileRows
from grutrace.storage.read.virtual import VirtualColumns


class FileSource:
    """A trace file as a `Source`.

    Args:
        path: Path of the file.

    Raises:
        TraceFileError: The file does not exist, is not a trace, has a newer format, or is damaged.
    """

    live = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.name = str(path)
        with translate_read_errors(self.name):
            self._handle = self._open_handle()
            try:
                self._read_header()
            except BaseException:
                self._handle.close()
                raise

    def _open_handle(self) -> SharedReadHandle:
        return SharedReadHandle(self._path)

    def _read_header(self) -> None:
        with self._handle.acquire() as file:
            self.header = read_header(file)
            read_shard(self.header)
            self._specs = dataset_specs(self.header.modules)
            self._merged = VirtualColumns(self._path, self._handle, self.header, self._specs)
            self._tables = TableReader(self._handle, self.header.modules)
            tables = self._merged.with_ranks(self._tables.read())
            # The counts are read before the datasets are opened, which are then long enough.
            counts = dataset_lengths(tables, self.header.modules)
            for dataset_path, spec in self._specs.items():
                if dataset_path not in self._merged:
                    dataset = self._handle.dataset(dataset_path, counts[dataset_path])
                    check_dataset(dataset, dataset_path, spec)
            self._merged.require_lengths(counts)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file and, for a merged file, its shards."""
        return (self._path, *self._merged.files)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the source as its path. Another process opens the file again."""
        return FileSource, (os.path.abspath(self.name),)

    def refresh(self) -> Tables:
        """Return the tables of all committed records.

        Raises:
            TraceFileError: The file is damaged.
        """
        self._handle.reopen_if_replaced()
        with translate_read_errors(self.name), self._handle.acquire():
            return self._merged.with_ranks(self._tables.read())

    def as_of(self, tables: Tables) -> SnapshotReader:  # noqa: ARG002
        """Return the source itself: rows are only appended."""
        return self

    def rows(self, module: int, suffix: str, quantity: str, count: int) -> Rows:
        """Return the first `count` rows, (count, H or I), which indexing reads."""
        info = self.header.modules[module]
        return self._rows(quantity_path(info, self._site(module, suffix), quantity), count)

    def initial(self, module: int, suffix: str, count: int) -> Rows:
        """Return the initial states of the first `count` sequences, (count, H)."""
        return self._rows(site_path(self.header.modules[module], suffix, "initial"), count)

    def checks(self, module: int, suffix: str, count: int) -> Array:
        """Return the checks of the module's first `count` calls, (count,), type `schema.CHECK`."""
        return self._items(site_path(self.header.modules[module], suffix, "checks"), 0, count)

    def backward(self, module: int, suffix: str, count: int) -> Array:
        """Return facts about the backward passes of these calls, (count,), `schema.BACKWARD`."""
        return self._items(site_path(self.header.modules[module], suffix, "backward"), 0, count)

    def weights(self, module: int, suffix: str, version: int) -> dict[str, Array]:
        """Return one version of a site's weights."""
        info = self.header.modules[module]
        return {
            name: self._items(site_path(info, suffix, name), version, version + 1)[0]
            for name in weight_shapes(info, self._site(module, suffix))
        }

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:
        """Add annotations to the file, which must be closed.

        Raises:
            TraceFileError: The file is being written, was not closed in order, or cannot be
                written.
            StateError: The rows of the trace are in other files.
        """
        if len(self.files) > 1:
            raise StateError(
                f"{self.name} was merged from {len(self.files) - 1} files: annotate each of them "
                "by itself, and merge them again"
            )
        annotate_file(self._path, annotations)

    def close(self) -> None:
        """Close the file. Closing twice has no effect."""
        self._merged.close()
        self._handle.close()

    def _site(self, module: int, suffix: str) -> Site:
        sites = self.header.modules[module].sites
        return next(site for site in sites if site.suffix == suffix)

    def _rows(self, dataset_path: str, count: int) -> Rows:
        if dataset_path in self._merged:
            return self._merged.rows(dataset_path)
        spec = self._specs[dataset_path]
        acquire: Callable[[], AbstractContextManager[h5py.Dataset]]
        acquire = partial(self._dataset, dataset_path, count)
        return FileRows(acquire, (count, *spec.item_shape), spec.dtype)  # type: ignore[arg-type]

    def _items(self, dataset_path: str, start: int, stop: int) -> Array:
        if dataset_path in self._merged:
            with translate_read_errors(self.name):
                return self._merged.items(dataset_path, start, stop)
        with self._dataset(dataset_path, stop) as dataset:
            return np.asarray(dataset[start:stop])

    @contextmanager
    def _dataset(self, dataset_path: str, count: int) -> Iterator[h5py.Dataset]:
        with translate_read_errors(self.name), self._handle.acquire():
            yield self._handle.dataset(dataset_path, count)


class RemoteSource(FileSource):
    """A complete trace file on a server as a `Source`.

    Args:
        url: URL of the file.
        storage_options: Arguments for the file system of fsspec.

    Raises:
        MissingExtraError: fsspec, or what it needs for this kind of URL, is not installed.
        TraceFileError: As for `FileSource`; or the file has a writer, or needs other files.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self._storage_options = dict(storage_options)
        self._url = url
        super().__init__(url)

    @property
    def files(self) -> tuple[Path, ...]:
        """No file of this machine."""
        return ()

    def annotate(self, annotations: Sequence[AnnotationRecord]) -> None:  # noqa: ARG002
        """Refuse: a file on a server is only read.

        Raises:
            StateError: Always.
        """
        raise StateError(f"{self.name} is on a server and can only be read: annotate a copy of it")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the source as its URL. Another process opens the file again."""
        return RemoteSource, (self._url, self._storage_options)

    def _open_handle(self) -> SharedReadHandle:
        handle = RemoteReadHandle(self._url, self._storage_options)
        try:
            with handle.acquire() as file:
                # HDF5 would look for the rows of the shards in this file object.
                shards = read_merged_shards(read_header(file))
            if any(shard.files for shard in shards):
                raise TraceFileError(
                    f"{self._url} was merged from shards, which hold its rows: only a file that "
                    "holds all its rows can be read from a server. Merge the shards with --copy"
                )
        except BaseException:
            handle.close()
            raise
        return handle
