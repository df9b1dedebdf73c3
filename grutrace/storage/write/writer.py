"""Records to a file. docs/format.md says what is written, and in which order it counts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from grutrace.errors import SinkError, TraceFileError, require_one_of
from grutrace.options import OPTIONS
from grutrace.records import Array, Record, TraceHeader, WeightsRecord
from grutrace.storage.format.dimension_scales import extend_scales
from grutrace.storage.format.schema import COMMITTED, TABLES, dataset_specs, site_path
from grutrace.storage.format.tables import dataset_lengths
from grutrace.storage.hdf5.atomic_write import (
    fsync_directory,
    fsync_file,
    publish,
    temporary_path,
    translate_write_errors,
)
from grutrace.storage.hdf5.errors import H5PY_ERRORS, short_message
from grutrace.storage.hdf5.handle import (
    close_or_quarantine,
    close_readers,
    discard_writes,
    file_identity,
    lock_readers,
    quarantine,
)
from grutrace.storage.hdf5.locks import HeldFile
from grutrace.storage.hdf5.safe_open import has_writer_flag, open_for_reading
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.claims import Claim
from grutrace.storage.write.compact import (
    copy_image,
    copy_permissions,
    has_extra_content,
    has_small_chunks,
    should_compact,
)
from grutrace.storage.write.create import create, existing_trace, open_to_write, reopen
from grutrace.storage.write.encoding import RecordEncoder, StringTable
from grutrace.storage.write.overwrite import require_replaceable
from grutrace.storage.write.validation import RecordValidator
from grutrace.storage.write.writer_thread import COMMIT_SECONDS

#: What is gathered in memory before it is written. Large enough that a stepwise decoder's rows
#: make few writes, small enough to still be in the processor's cache. Bytes.
BUFFER_BYTES = 8 * 1024 * 1024

#: Memory that an array takes beside its elements, about. Bytes.
ARRAY_OVERHEAD = 128


#: A commit packs the last chunk of each dataset, which has not filled up yet, and it takes new room
#: when it is packed again. Seldom enough that this is little beside what is written meanwhile.
COMMIT_SECONDS_COMPRESSED = 10.0


class Writer:
    """Writes one trace file. For one thread at a time; it starts none itself.

    Args:
        path: Of the file.
        header: Of the trace. A file that is appended to keeps its own.
        mode: "w" refuses a path that exists, "overwrite" replaces it if grutrace wrote it, "a"
            appends to a trace of the same modules that was closed in order (and creates one where
            there is none). Numbers of sequences and versions of weights go on from those in the
            file: records count from 0 all the same. First weights that are the file's last version
            are not stored again.
        fsync: Whether every commit waits until the disk holds it: first what is to count, then
            the counts.

    Raises:
        OptionError: The mode is none of these.
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
        self._fsync, self._unsynced = fsync, False
        self._appenders: dict[str, DatasetAppender] = {}
        self._rows: list[DatasetAppender] = []
        self._tables: list[DatasetAppender] = []
        self._buffered_bytes = 0
        self._uncommitted = True
        self._closed = self._closing = False
        self._header = header
        self._validator = RecordValidator(header.modules)
        # Versions of the weights that were there before, where this run has not brought its own.
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
        """Of the path that is written to."""
        return self._claim

    def _create(self, mode: str) -> None:
        """Write to a new file."""
        self._strings = StringTable()
        self._encoder = RecordEncoder(self._header.modules, self._strings)
        new = temporary_path(self.path, mode)
        replaced = None
        if mode == "overwrite":
            require_replaceable(self.path)
            replaced = _file_signature(self.path)

        def require_same(path: Path) -> None:
            # Another one may have come since.
            if _file_signature(path) != replaced:
                require_replaceable(path)

        with _unlink_on_error(new):
            self._file = create(self.path, new, self._header)
            self._start(new, dict.fromkeys(dataset_specs(self._header.modules), 0))
            self._publish(new, mode, require_same)

    def _open_to_append(self) -> None:
        """Write to the file that there is."""
        now = self._header
        self._header, tables = existing_trace(self.path, now)
        self._strings = StringTable(tables.texts, len(tables.characters))
        sequences = [extent.sequences for extent in tables.extents]
        versions = [extent.versions for extent in tables.extents]
        self._versions_before = {number: count for number, count in enumerate(versions) if count}
        self._encoder = RecordEncoder(self._header.modules, self._strings, sequences, versions)
        positions = dataset_lengths(tables, self._header.modules)
        if not self._expand(positions):
            self._file = reopen(self.path)
            self._start(self.path, positions)

    def _expand(self, positions: dict[str, int]) -> bool:
        """Go on in a copy of a small file with chunks for a long one; False if it stays as it is.

        It is the file that there is that is appended to if no other can be put in its place.
        """
        before = _file_signature(self.path)
        if _is_open_for_writing(self.path):
            # HDF5 says so itself.
            return False
        with (
            translate_write_errors(self.path, "appended to"),
            lock_readers(),
            open_for_reading(self.path) as file,
        ):
            if not has_small_chunks(file, self._header, positions):
                return False
            identity, committed = file_identity(file), file["committed"][()]
            image = copy_image(file, self._header, positions, committed, fitted=False)
            if has_extra_content(file, image):
                return False

        def require_same(path: Path) -> None:
            if _file_signature(path) != before:
                raise TraceFileError(f"{path} is another file by now")

        new = temporary_path(self.path, "overwrite")
        try:
            with _unlink_on_error(new):
                new.write_bytes(image)
                if not copy_permissions(self.path, new):
                    new.unlink()
                    return False
                self._file = open_to_write(new)
        except OSError:
            return False
        with _unlink_on_error(new), close_readers(identity):
            self._start(new, positions)
            self._publish(new, "overwrite", require_same)
        return True

    @property
    def commit_seconds(self) -> float:
        """How long what is written should wait at most before it is committed."""
        packed = any(appender.compressed for appender in self._rows)
        return COMMIT_SECONDS_COMPRESSED if packed else COMMIT_SECONDS

    @property
    def name(self) -> str:
        """What errors call it: its path."""
        return str(self.path)

    def write(self, record: Record) -> None:
        """Take a record: it is in the file after the next commit.

        Raises:
            SinkError: It does not fit what came before it, or could not be written.
        """
        self._require_open()
        self._validator.validate(record)
        if isinstance(record, WeightsRecord) and self._is_stored(record):
            self._encoder.reuse_last_weights(record.module)
            return
        for place, items in list(self._encoder.encode(record)):
            self._appenders[place].append(items)
            self._buffered_bytes += items.nbytes + ARRAY_OVERHEAD
        self._uncommitted = True
        if self._buffered_bytes >= BUFFER_BYTES:
            with self._translate_errors():
                self._flush_buffers()

    def commit(self) -> None:
        """Make everything written so far count.

        Raises:
            SinkError: It could not be written, or the file is not at its path any more. What was
                committed before still counts.
        """
        self._require_open()
        self._require_not_overwritten()
        if self._uncommitted:
            with self._translate_errors():
                self._commit(closed=False)
        displaced = self._displaced()
        if displaced:
            # Where it was moved to, it can be read.
            with contextlib.suppress(SinkError):
                self._close_in_order()
            raise SinkError(displaced)

    def require_in_place(self) -> None:
        """Require that the file is still the one at its path. Any thread may ask.

        Raises:
            SinkError: It was deleted, moved, or replaced by another.
        """
        displaced = self._displaced() or self._overwritten()
        # Asked last: another file may take the place of this one while it is closed.
        if displaced and not self._closing:
            raise SinkError(displaced)

    def close(self) -> None:
        """Commit and close the file. Closing twice does nothing.

        Raises:
            SinkError: The rest could not be written, or the file is not at its path any more. The
                file is let go of all the same.
        """
        if self._closed:
            return
        self._require_not_overwritten()
        displaced = self._displaced()
        self._close_in_order()
        if displaced:
            raise SinkError(displaced)

    def _close_in_order(self) -> None:
        self._closing = True
        try:
            with self._translate_errors(), close_readers(self._identity):
                self._write_buffered()
                items = {place: each.position for place, each in self._appenders.items()}
                errors: tuple[type[Exception], ...] = ()
                if self._compact(items):
                    # The copy has it all: the file itself is for those who still read it.
                    errors, self._fsync = H5PY_ERRORS, False
                with contextlib.suppress(*errors), self._dup_descriptor() as descriptor:
                    extend_scales(self._file, self._header.modules, items)
                    self._commit(closed=True)
                    self._close_file()
                    self._fsync_if_asked(descriptor)
        finally:
            self.abandon()

    def _compact(self, items: dict[str, int]) -> bool:
        """Put a closed copy with chunks of its size in the place of a small file.

        It takes the place while the file is marked as being written, and so nobody else's to
        replace. The file is whole as it is: where it cannot be made smaller, it stays.

        Returns:
            Whether there is a copy in its place.
        """
        if not should_compact(self._header, items) or self._displaced():
            return False
        self._commit(closed=False)
        if not self._publish_compacted(items):
            return False
        if self._fsync:
            fsync_directory(self.path)
        return True

    def _publish_compacted(self, items: dict[str, int]) -> bool:
        with contextlib.suppress(*H5PY_ERRORS):
            counts = self._counts(closed=True)
            image = copy_image(self._file, self._header, items, counts, fitted=True)
            if self._appending and has_extra_content(self._file, image):
                return False
            new = temporary_path(self.path, "overwrite")
            with _unlink_on_error(new):
                with new.open("xb") as file:
                    file.write(image)
                    if self._fsync:
                        file.flush()
                        fsync_file(file.fileno())
                if not copy_permissions(self.path, new):
                    raise OSError(f"{new} cannot have the owner of {self.path}")
                new.replace(self.path)
            return True
        return False

    def abandon(self) -> None:
        """Let go of the file without another byte written to it: what was committed counts.

        For a file that could not be written, and for a forked child whose parent has the file.
        HDF5 would write what it holds in memory, at the latest when the process ends; and on a full
        disk it would then mark a file as whole of which it could not write the end.
        """
        if self._closed:
            return
        self._closed = self._closing = True
        self._appenders, self._rows, self._tables = {}, [], []
        try:
            if self._file is None:
                return
            # Readers share the descriptor, and would read zeros from it: they are kept out. They
            # are closed once it leads nowhere, for then, too, HDF5 writes what it holds.
            with lock_readers():
                discard_writes(self._descriptor, self._identity)
                with close_readers(self._identity):
                    close_or_quarantine(self._file, self._identity)
        finally:
            self._claim.release()

    def _displaced(self) -> str:
        """What became of the file, if it is not at its path any more."""
        what = self._claim.displaced()
        return f"{self.path} {what}: nothing more can be recorded to it" if what else ""

    def _overwritten(self) -> str:
        """What became of the file, if it is at its path with other content."""
        with contextlib.suppress(OSError):
            if not self._claim.displaced() and not has_writer_flag(self.path):
                return (
                    f"{self.path} was written over by another program: nothing more can be "
                    "recorded to it"
                )
        return ""

    def _require_not_overwritten(self) -> None:
        """Write nothing into a file whose content is another program's by now."""
        found = self._overwritten()
        if found:
            self.abandon()
            raise SinkError(found)

    def _is_stored(self, weights: WeightsRecord) -> bool:
        """Whether these are the first weights of a run that goes on, and those before them."""
        count = self._versions_before.pop(weights.module, 0)
        if not count:
            return False
        module = self._header.modules[weights.module]
        with self._translate_errors():
            for suffix, arrays in weights.sites.items():
                for name, array in arrays.items():
                    last = self._file[site_path(module, suffix, name)][count - 1]
                    # Their bytes: what is not a number is not equal to itself.
                    if last.tobytes() != np.asarray(array, last.dtype).tobytes():
                        return False
        return True

    def _publish(self, new: Path, mode: str, require: Callable[[Path], None]) -> None:
        try:
            if mode == "overwrite":
                require(self.path)
            publish(new, self.path, mode)
            if self._fsync:
                with translate_write_errors(self.path, "created"):
                    fsync_directory(self.path)
        except BaseException:
            self.abandon()
            raise

    def _start(self, path: Path, positions: dict[str, int]) -> None:
        """Write from these positions on to the file that is open, by whatever path it has now."""
        self._identity = file_identity(self._file)
        self._descriptor: int = self._file.id.get_vfd_handle()
        held = HeldFile.of(path)
        if held is not None:
            self._claim.hold(held)
        columns = dataset_specs(self._header.modules)
        self._appenders = {
            place: DatasetAppender(self._file[place], positions[place]) for place in columns
        }
        self._rows = [self._appenders[place] for place, column in columns.items() if column.axes]
        self._tables = [
            self._appenders[place] for place, column in columns.items() if not column.axes
        ]
        try:
            with translate_write_errors(self.path, "written"):
                self._commit(closed=False)
        except BaseException:
            self.abandon()
            raise

    def _flush_buffers(self) -> None:
        """Write what is staged; of what is compressed only whole chunks, if the rest is little."""
        compressed = [appender for appender in self._rows if appender.compressed]
        self._write_buffered(whole_chunks=True)
        self._buffered_bytes = sum(appender.buffered_bytes for appender in compressed)
        if self._buffered_bytes > BUFFER_BYTES // 2:
            self._write_buffered()

    def _write_buffered(self, *, whole_chunks: bool = False) -> None:
        ends, characters = self._strings.pop_new()
        self._appenders["strings"].append(ends)
        self._appenders["characters"].append(characters)
        for appender in self._rows:
            appender.write(whole_chunks=whole_chunks and appender.compressed)
        self._file.flush()
        for appender in self._tables:
            appender.write()
        self._buffered_bytes = 0

    def _commit(self, *, closed: bool) -> None:
        self._write_buffered()
        self._file.flush()
        self._fsync_if_asked(self._descriptor)
        committed = self._file["committed"]
        committed[()] = self._counts(closed=closed)
        # Flushing the file does not write these counts out while a reading handle of this process
        # has them open too.
        committed.flush()
        self._file.flush()
        self._fsync_if_asked(self._descriptor)
        self._uncommitted = False

    def _counts(self, *, closed: bool) -> Array:
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = self._appenders[name].position
        counts["closed"] = closed
        return counts

    def _close_file(self) -> None:
        file, self._file = self._file, None
        try:
            file.close()
        except BaseException:
            # It would be written to again when the process ends, and then marked as whole.
            discard_writes(self._descriptor, self._identity)
            quarantine(file, self._identity)
            raise

    def _fsync_if_asked(self, descriptor: int) -> None:
        """Have the disk hold what was written so far, if that was asked for."""
        if self._fsync:
            # A second try would be told that all is well of what the first one has lost.
            if self._unsynced:
                raise OSError("what was written before was not put on the disk")
            self._unsynced = True
            fsync_file(descriptor)
            self._unsynced = False

    @contextmanager
    def _dup_descriptor(self) -> Iterator[int]:
        """A descriptor of the file that stays open while HDF5 closes its own."""
        descriptor = os.dup(self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _require_open(self) -> None:
        if self._closed:
            raise SinkError(f"{self.path} is closed: nothing more can be written to it")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise SinkError(f"{self.path} cannot be written: {short_message(error)}") from error


def _is_open_for_writing(path: Path) -> bool:
    """Whether something in this process has a file open to write, such as a handle of h5py's."""
    for file in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        name = os.fsdecode(h5py.h5f.get_name(file))
        if file.get_intent() & h5py.h5f.ACC_RDWR and _file_signature(Path(name)) == _file_signature(
            path
        ):
            return True
    return False


def _file_signature(path: Path) -> tuple[int, int, int, int] | None:
    """What tells one file at a path from the next: None if there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _unlink_on_error(new: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
