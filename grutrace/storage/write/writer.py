"""Write records to a trace file. docs/format.md describes the format and the order of writes.

`Writer` decides when to create, replace, compact and abandon a file; `DatasetWriter` writes to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from grutrace.errors import SinkError, TraceFileError, require_one_of
from grutrace.options import OPTIONS
from grutrace.records import AnnotationRecord, Record, TraceHeader, WeightsRecord
from grutrace.storage.format.schema import dataset_specs, site_path
from grutrace.storage.format.tables import dataset_lengths
from grutrace.storage.hdf5.atomic_write import (
    fsync_directory,
    publish,
    temporary_path,
    unlink_on_error,
)
from grutrace.storage.hdf5.errors import H5PY_ERRORS, short_message, translate_write_errors
from grutrace.storage.hdf5.handle import close_readers
from grutrace.storage.hdf5.locks import HeldFile
from grutrace.storage.write.claims import Claim
from grutrace.storage.write.compact import (
    open_expanded_copy,
    publish_compact_copy,
    should_compact,
)
from grutrace.storage.write.create import (
    create_file,
    load_for_append,
    open_to_append,
)
from grutrace.storage.write.dataset_writer import DatasetWriter
from grutrace.storage.write.encoding import RecordEncoder, StringTable
from grutrace.storage.write.overwrite import file_signature, require_replaceable
from grutrace.storage.write.validation import RecordValidator
from grutrace.storage.write.writer_thread import COMMIT_SECONDS

#: Seconds between commits of compressed rows. A commit writes the last, incomplete chunk of each
#: dataset, and a compressed chunk takes new space when it is written again. At this interval the
#: lost space is small compared with the data.
COMMIT_SECONDS_COMPRESSED = 10.0


class Writer:
    """Writes one trace file. For one thread at a time; starts no thread itself.

    Args:
        path: Path of the file.
        header: Header of the trace. A file that is appended to keeps its own header.
        mode: "w" refuses an existing path, "overwrite" replaces a file that grutrace wrote, "a"
            appends to a trace of the same modules that was closed in order, or creates the file.
            When appending, numbers of sequences and of versions of the weights in the file
            continue, although records count from 0. If the first weights equal the last version
            in the file, they are not stored again.
        fsync: Whether every commit waits until the disk has stored it: first the data, then the
            counts.

    Raises:
        OptionError: The mode is unknown.
        TraceFileError: The file cannot be created or appended to, grutrace did not write it, or
            another writer is writing it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: TraceHeader,
        mode: str = "w",
        *,
        fsync: bool = False,
    ) -> None:
        require_one_of("mode", mode, OPTIONS["mode"].values)
        self.path = Path(os.path.realpath(path))
        self._fsync = fsync
        self._uncommitted = True
        self._closed = self._closing = False
        self._header = header
        self._validator = RecordValidator(header.modules)
        # Versions of weights in the file, for modules whose weights this run has not written yet.
        self._versions_before: dict[int, int] = {}
        self._appending = mode == "a" and self.path.exists()
        self._claim = Claim(self.path)
        try:
            if self._appending:
                self._open_to_append()
            else:
                self._create(mode)
        except BaseException:
            self._claim.release()
            raise

    @property
    def claim(self) -> Claim:
        """The claim on the path."""
        return self._claim

    def _create(self, mode: str) -> None:
        """Create a file and publish it at the path."""
        self._strings = StringTable()
        self._encoder = RecordEncoder(self._header.modules, self._strings)
        temporary = temporary_path(self.path, mode)
        signature = None
        if mode == "overwrite":
            require_replaceable(self.path)
            signature = file_signature(self.path)

        def require_still_replaceable(path: Path) -> None:
            # Another program may have created a file at the path.
            if file_signature(path) != signature:
                require_replaceable(path)

        with unlink_on_error(temporary):
            file = create_file(self.path, temporary, self._header)
            self._start(file, temporary, dict.fromkeys(dataset_specs(self._header.modules), 0))
            self._publish(temporary, mode, require_still_replaceable)

    def _open_to_append(self) -> None:
        """Open the existing file to append to it."""
        self._header, tables = load_for_append(self.path, self._header)
        self._strings = StringTable(tables.texts, len(tables.characters))
        sequences = [counts.sequences for counts in tables.module_counts]
        versions = [counts.versions for counts in tables.module_counts]
        self._versions_before = {index: count for index, count in enumerate(versions) if count}
        self._encoder = RecordEncoder(self._header.modules, self._strings, sequences, versions)
        positions = dataset_lengths(tables, self._header.modules)
        if not self._replace_by_expanded_copy(positions):
            self._start(open_to_append(self.path), self.path, positions)

    def _replace_by_expanded_copy(self, positions: dict[str, int]) -> bool:
        """Replace a compact file by a copy with chunks of the usual size, and append to that.

        Returns:
            False if the file has the usual chunks or cannot be replaced. Then append to it.
        """
        copy = open_expanded_copy(self.path, self._header, positions)
        if copy is None:
            return False

        def require_unchanged(path: Path) -> None:
            if file_signature(path) != copy.signature:
                raise TraceFileError(f"{path} was replaced by another file")

        with unlink_on_error(copy.temporary), close_readers(copy.identity):
            self._start(copy.file, copy.temporary, positions)
            self._publish(copy.temporary, "overwrite", require_unchanged)
        return True

    @property
    def commit_seconds(self) -> float:
        """Longest time in seconds that a written record should wait for a commit."""
        return COMMIT_SECONDS_COMPRESSED if self._datasets.is_compressed else COMMIT_SECONDS

    @property
    def name(self) -> str:
        """Name of the writer in errors: its path."""
        return str(self.path)

    def write(self, record: Record) -> None:
        """Add a record. It is in the file after the next commit.

        Raises:
            SinkError: The record is invalid after the earlier ones, or cannot be written.
        """
        self._require_open()
        self._validator.validate(record)
        if isinstance(record, WeightsRecord) and self._is_stored(record):
            self._encoder.reuse_last_weights(record.module)
            return
        for name, items in list(self._encoder.encode(record)):
            self._datasets.append(name, items)
        self._uncommitted = True
        if self._datasets.buffer_is_full:
            with self._translate_errors():
                self._datasets.flush_buffers()

    def write_annotations(self, annotations: Iterable[AnnotationRecord]) -> None:
        """Add annotations of sequences in the file that is appended to, numbered as in the file.

        They were checked before. They are in the file after the next commit.

        Raises:
            SinkError: They cannot be written.
        """
        self._require_open()
        encoder = RecordEncoder(self._header.modules, self._strings)
        with self._translate_errors():
            for annotation in annotations:
                for name, items in encoder.encode(annotation):
                    self._datasets.append(name, items)
                if self._datasets.buffer_is_full:
                    self._datasets.flush_buffers()
        self._uncommitted = True

    def commit(self) -> None:
        """Commit everything written so far.

        Raises:
            SinkError: Writing failed, or the file is no longer at its path. Earlier commits stay
                valid.
        """
        self._require_open()
        self._require_not_overwritten()
        if self._uncommitted:
            with self._translate_errors():
                self._datasets.commit(closed=False)
            self._uncommitted = False
        error = self._claim.displacement_error()
        if error:
            # Complete the file: if it was moved, it can be read at its new path.
            with contextlib.suppress(SinkError):
                self._close_in_order()
            raise SinkError(error)

    def require_in_place(self) -> None:
        """Require that the file is still at its path. Any thread may call this.

        Raises:
            SinkError: The file was deleted, moved or replaced.
        """
        error = self._claim.displacement_error() or self._claim.overwrite_error()
        # Check `_closing` last: while this file is closed, another one may replace it.
        if error and not self._closing:
            raise SinkError(error)

    def close(self) -> None:
        """Commit and close the file. Closing twice does nothing.

        Raises:
            SinkError: The remaining data cannot be written, or the file is no longer at its path.
                The file is closed all the same.
        """
        if self._closed:
            return
        self._require_not_overwritten()
        error = self._claim.displacement_error()
        self._close_in_order()
        if error:
            raise SinkError(error)

    def _close_in_order(self) -> None:
        self._closing = True
        try:
            datasets = self._datasets
            with self._translate_errors(), close_readers(datasets.identity):
                datasets.write_buffers()
                item_counts = datasets.item_counts
                errors: tuple[type[Exception], ...] = ()
                if self._compact(item_counts):
                    # The copy is complete; the file itself only serves readers that have it open.
                    errors, datasets.fsync = H5PY_ERRORS, False
                with contextlib.suppress(*errors):
                    datasets.close(item_counts)
        finally:
            self.abandon()

    def _compact(self, item_counts: dict[str, int]) -> bool:
        """Replace a small file by a compact copy. Return whether the copy has replaced it."""
        if not should_compact(self._header, item_counts) or self._claim.displacement_error():
            return False
        self._datasets.commit(closed=False)
        assert self._datasets.file is not None
        if not publish_compact_copy(
            self._datasets.file,
            self.path,
            self._header,
            item_counts,
            self._datasets.committed_counts(closed=True),
            appended=self._appending,
            fsync=self._fsync,
        ):
            return False
        if self._fsync:
            fsync_directory(self.path)
        return True

    def abandon(self) -> None:
        """Close the file without writing another byte. Committed records stay committed.

        For a file that could not be written, and for a forked child whose parent has the file.
        """
        if self._closed:
            return
        self._closed = self._closing = True
        try:
            self._datasets.abandon()
        finally:
            self._claim.release()

    def _require_not_overwritten(self) -> None:
        """Abandon a file whose content another program has overwritten."""
        error = self._claim.overwrite_error()
        if error:
            self.abandon()
            raise SinkError(error)

    def _is_stored(self, weights: WeightsRecord) -> bool:
        """Return whether the first weights of an appended run equal the last ones in the file."""
        count = self._versions_before.pop(weights.module, 0)
        if not count:
            return False
        module, file = self._header.modules[weights.module], self._datasets.file
        assert file is not None
        with self._translate_errors():
            for suffix, arrays in weights.sites.items():
                for name, array in arrays.items():
                    stored = file[site_path(module, suffix, name)][count - 1]
                    # Compare bytes: NaN is not equal to itself.
                    if stored.tobytes() != np.asarray(array, stored.dtype).tobytes():
                        return False
        return True

    def _publish(self, temporary: Path, mode: str, check: Callable[[Path], None]) -> None:
        """Rename the file to its path. `check` raises an error if it may not be replaced."""
        try:
            if mode == "overwrite":
                check(self.path)
            publish(temporary, self.path, mode)
            if self._fsync:
                with translate_write_errors(self.path, "created"):
                    fsync_directory(self.path)
        except BaseException:
            self.abandon()
            raise

    def _start(self, file: h5py.File, path: Path, positions: dict[str, int]) -> None:
        """Start writing to an open file.

        Args:
            file: The file.
            path: Its current path, which may be temporary.
            positions: Number of committed items of each dataset, by path.
        """
        self._datasets = DatasetWriter(
            file, self._header.modules, positions, self._strings, fsync=self._fsync
        )
        held_file = HeldFile.of(path)
        if held_file is not None:
            self._claim.hold(held_file)
        try:
            with translate_write_errors(self.path, "written"):
                self._datasets.commit(closed=False)
        except BaseException:
            self.abandon()
            raise
        self._uncommitted = False

    def _require_open(self) -> None:
        if self._closed:
            raise SinkError(f"{self.path} is closed: no more records can be written to it")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise SinkError(f"{self.path} cannot be written: {short_message(error)}") from error
