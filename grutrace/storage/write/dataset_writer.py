"""Append items to the datasets of an open trace file, and commit them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import h5py
import numpy as np

from grutrace.records import Array, ModuleInfo
from grutrace.storage.format.dimension_scales import extend_scales
from grutrace.storage.format.schema import COMMITTED, TABLES, dataset_specs
from grutrace.storage.hdf5.atomic_write import fsync_file
from grutrace.storage.hdf5.handle import close_readers, lock_readers
from grutrace.storage.hdf5.quarantine import (
    close_or_quarantine,
    discard_writes,
    file_identity,
    quarantine,
)
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.encoding import StringTable

#: Bytes that are buffered before they are written: large enough that the rows of a stepwise decoder
#: make few writes, small enough to stay in the cache of the processor.
BUFFER_BYTES = 8 * 1024 * 1024

#: Memory overhead of an array in bytes, about.
ARRAY_OVERHEAD = 128


class DatasetWriter:
    """Appends items to the datasets of a file that is open for SWMR writing.

    A reader sees only committed items: `commit` writes all buffers, then the counts.

    Args:
        file: The file. This object closes it.
        modules: Modules of the trace.
        positions: Number of committed items of each dataset, by path.
        strings: Table whose new strings are written with the other items.
        fsync: Whether each commit waits until the disk has stored it.

    Attributes:
        file: The open file; None once it is closed.
        identity: Device and inode of the file.
        fsync: As the argument.
        is_compressed: Whether a dataset of rows is compressed.
    """

    def __init__(
        self,
        file: h5py.File,
        modules: Sequence[ModuleInfo],
        positions: Mapping[str, int],
        strings: StringTable,
        *,
        fsync: bool,
    ) -> None:
        self.file: h5py.File | None = file
        self.identity = file_identity(file)
        self.fsync, self._fsync_failed = fsync, False
        self._descriptor: int = file.id.get_vfd_handle()
        self._modules, self._strings = modules, strings
        specs = dataset_specs(modules)
        self._appenders = {path: DatasetAppender(file[path], positions[path]) for path in specs}
        self._rows = [self._appenders[path] for path, spec in specs.items() if spec.axes]
        self._tables = [self._appenders[path] for path, spec in specs.items() if not spec.axes]
        self._buffered_bytes = 0
        self.is_compressed = any(appender.compressed for appender in self._rows)

    @property
    def buffer_is_full(self) -> bool:
        """Whether `flush_buffers` is due."""
        return self._buffered_bytes >= BUFFER_BYTES

    @property
    def item_counts(self) -> dict[str, int]:
        """Number of items written to each dataset, by path."""
        return {path: appender.position for path, appender in self._appenders.items()}

    def append(self, path: str, items: Array) -> None:
        """Add (n, ...) items to the buffer of a dataset."""
        self._appenders[path].append(items)
        self._buffered_bytes += items.nbytes + ARRAY_OVERHEAD

    def flush_buffers(self) -> None:
        """Write the buffers. Incomplete compressed chunks stay buffered, if they are small."""
        compressed = [appender for appender in self._rows if appender.compressed]
        self.write_buffers(whole_chunks=True)
        self._buffered_bytes = sum(appender.buffered_bytes for appender in compressed)
        if self._buffered_bytes > BUFFER_BYTES // 2:
            self.write_buffers()

    def write_buffers(self, *, whole_chunks: bool = False) -> None:
        """Write the buffers, rows before tables.

        Args:
            whole_chunks: Keep compressed rows in the buffer that do not fill a chunk yet.
        """
        assert self.file is not None
        ends, characters = self._strings.pop_new()
        self._appenders["strings"].append(ends)
        self._appenders["characters"].append(characters)
        for appender in self._rows:
            appender.write(whole_chunks=whole_chunks and appender.compressed)
        self.file.flush()
        for appender in self._tables:
            appender.write()
        self._buffered_bytes = 0

    def commit(self, *, closed: bool) -> None:
        """Write the buffers, then the counts up to which readers read."""
        assert self.file is not None
        self.write_buffers()
        self.file.flush()
        self._fsync_if_requested(self._descriptor)
        committed = self.file["committed"]
        committed[()] = self.committed_counts(closed=closed)
        # Flushing the file does not write these counts while a read handle of this process has
        # the dataset open.
        committed.flush()
        self.file.flush()
        self._fsync_if_requested(self._descriptor)

    def committed_counts(self, *, closed: bool) -> Array:
        """Return the counts to commit, a scalar of type `schema.COMMITTED`."""
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = self._appenders[name].position
        counts["closed"] = closed
        return counts

    def close(self, item_counts: Mapping[str, int]) -> None:
        """Extend the scales, commit, and close the file in order."""
        with self._duplicate_descriptor() as descriptor:
            extend_scales(self.file, self._modules, item_counts)
            self.commit(closed=True)
            self._close_file()
            self._fsync_if_requested(descriptor)

    def abandon(self) -> None:
        """Close the file without writing another byte. Committed items stay committed.

        HDF5 would write its buffers at the latest when the process ends. On a full disk it would
        then mark a file as complete although its end is missing.
        """
        self._appenders, self._rows, self._tables = {}, [], []
        file, self.file = self.file, None
        if file is None:
            return
        # Readers share the descriptor and would read zeros from it, so lock them out. Close them
        # after redirecting the descriptor, because closing them also writes HDF5's buffers.
        with lock_readers():
            discard_writes(self._descriptor, self.identity)
            with close_readers(self.identity):
                close_or_quarantine(file, self.identity)

    def _close_file(self) -> None:
        file, self.file = self.file, None
        assert file is not None
        try:
            file.close()
        except BaseException:
            # HDF5 would write to the file again when the process ends, and mark it as complete.
            discard_writes(self._descriptor, self.identity)
            quarantine(file, self.identity)
            raise

    def _fsync_if_requested(self, descriptor: int) -> None:
        if self.fsync:
            # A second fsync() succeeds even if the first one failed and lost data.
            if self._fsync_failed:
                raise OSError("an earlier fsync failed, so written data may be lost")
            self._fsync_failed = True
            fsync_file(descriptor)
            self._fsync_failed = False

    @contextmanager
    def _duplicate_descriptor(self) -> Iterator[int]:
        """Return a context with a descriptor that stays open when HDF5 closes its own."""
        descriptor = os.dup(self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
