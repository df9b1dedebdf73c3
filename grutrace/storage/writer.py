"""Records to a file. docs/format.md says what is written, and in which order it counts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from grutrace.errors import SinkError, require_one_of
from grutrace.record import Header, Record
from grutrace.storage.admission import Admission
from grutrace.storage.appender import Appender
from grutrace.storage.continuing import existing_tables
from grutrace.storage.creating import create, reopen
from grutrace.storage.entries import Entries
from grutrace.storage.faults import in_brief
from grutrace.storage.handle import file_identity, keep_off, no_reading, readers_out
from grutrace.storage.letting_go import lead_nowhere, let_go
from grutrace.storage.placing import naming, put_in_place, room_for, sync, sync_name
from grutrace.storage.pump import COMMIT_SECONDS
from grutrace.storage.scales import extend_scales
from grutrace.storage.schema import COMMITTED, TABLES, layout
from grutrace.storage.strings import Strings
from grutrace.storage.tables import lengths

#: What may become of a file that exists: it is refused, replaced, or appended to.
MODES = ("w", "overwrite", "a")

#: What is gathered in memory before it is written. Large enough that a stepwise decoder's rows
#: make few writes, small enough to still be in the processor's cache. Bytes.
STAGED = 8 * 1024 * 1024

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
        mode: "w" refuses a path that exists, "overwrite" replaces it, "a" appends to a trace of
            the same modules that was closed in order (and creates one where there is none).
            Numbers of sequences and versions of weights go on from those in the file: records
            count from 0 all the same.
        fsync: Whether every commit waits until the disk holds it: first what is to count, then
            the counts.

    Raises:
        OptionError: The mode is none of these.
        TraceFileError: The file cannot be created or appended to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Header,
        mode: str = "w",
        *,
        fsync: bool = False,
    ) -> None:
        require_one_of("mode", mode, MODES)
        self.path = Path(os.path.realpath(path))
        self._fsync, self._unsynced = fsync, False
        self._appenders: dict[str, Appender] = {}
        self._rows: list[Appender] = []
        self._tables: list[Appender] = []
        self._staged = 0
        self._uncommitted = True
        self._closed = False
        self._modules = header.modules
        self._admission = Admission(header.modules)
        if mode == "a" and self.path.exists():
            tables = existing_tables(self.path, header)
            self._strings = Strings(tables.texts, len(tables.characters))
            sequences = [extent.sequences for extent in tables.extents]
            versions = [extent.versions for extent in tables.extents]
            self._entries = Entries(header.modules, self._strings, sequences, versions)
            self._file = reopen(self.path)
            self._start(header, lengths(tables, header.modules))
        else:
            self._strings = Strings()
            self._entries = Entries(header.modules, self._strings)
            new = room_for(self.path, mode)
            try:
                self._file = create(self.path, new, header)
                self._start(header, dict.fromkeys(layout(header.modules), 0))
                self._put_in_place(new, mode)
            except BaseException:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
                raise

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
        self._admission.admit(record)
        for place, items in list(self._entries.of(record)):
            self._appenders[place].stage(items)
            self._staged += items.nbytes + ARRAY_OVERHEAD
        self._uncommitted = True
        if self._staged >= STAGED:
            with self._storing():
                self._make_room()

    def commit(self) -> None:
        """Make everything written so far count.

        Raises:
            SinkError: It could not be written. What was committed before still counts.
        """
        self._require_open()
        if self._uncommitted:
            with self._storing():
                self._commit(closed=False)

    def close(self) -> None:
        """Commit and close the file. Closing twice does nothing.

        Raises:
            SinkError: The rest could not be written. The file is let go of all the same.
        """
        if self._closed:
            return
        try:
            with self._storing():
                self._write_staged()
                counts = {place: each.position for place, each in self._appenders.items()}
                extend_scales(self._file, self._modules, counts)
                self._commit(closed=True)
                with self._kept_for_sync() as descriptor, readers_out(self._identity):
                    self._close_file()
                    self._sync(descriptor)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file without another byte written to it: what was committed counts.

        For a file that could not be written, and for a forked child whose parent has the file.
        HDF5 would write what it holds in memory, at the latest when the process ends; and on a full
        disk it would then mark a file as whole of which it could not write the end.
        """
        if self._closed:
            return
        self._closed = True
        self._appenders, self._rows, self._tables = {}, [], []
        if self._file is None:
            return
        # Readers share the descriptor, and would read zeros from it: they are kept out. They are
        # closed once it leads nowhere, for then, too, HDF5 writes what it holds.
        with no_reading():
            lead_nowhere(self._descriptor, self._identity)
            with readers_out(self._identity):
                let_go(self._file, self._identity)

    def _put_in_place(self, new: Path, mode: str) -> None:
        try:
            put_in_place(new, self.path, mode)
            if self._fsync:
                with naming(self.path, "created"):
                    sync_name(self.path)
        except BaseException:
            self.abandon()
            raise

    def _start(self, header: Header, positions: dict[str, int]) -> None:
        """Write from these positions on."""
        self._identity = file_identity(self._file)
        self._descriptor: int = self._file.id.get_vfd_handle()
        columns = layout(header.modules)
        self._appenders = {
            place: Appender(self._file[place], positions[place]) for place in columns
        }
        self._rows = [self._appenders[place] for place, column in columns.items() if column.axes]
        self._tables = [
            self._appenders[place] for place, column in columns.items() if not column.axes
        ]
        try:
            with naming(self.path, "written"):
                self._commit(closed=False)
        except BaseException:
            self.abandon()
            raise

    def _make_room(self) -> None:
        """Write what is staged; of what is compressed only whole chunks, if the rest is little."""
        compressed = [appender for appender in self._rows if appender.compressed]
        self._write_staged(whole_chunks=True)
        self._staged = sum(appender.staged for appender in compressed)
        if self._staged > STAGED // 2:
            self._write_staged()

    def _write_staged(self, *, whole_chunks: bool = False) -> None:
        ends, characters = self._strings.take()
        self._appenders["strings"].stage(ends)
        self._appenders["characters"].stage(characters)
        for appender in self._rows:
            appender.write(whole_chunks=whole_chunks and appender.compressed)
        self._file.flush()
        for appender in self._tables:
            appender.write()
        self._staged = 0

    def _commit(self, *, closed: bool) -> None:
        self._write_staged()
        self._file.flush()
        self._sync(self._descriptor)
        counts = np.zeros((), COMMITTED)
        for name in TABLES:
            counts[name] = self._appenders[name].position
        counts["closed"] = closed
        committed = self._file["committed"]
        committed[()] = counts
        # Flushing the file does not write these counts out while a reading handle of this process
        # has them open too.
        committed.flush()
        self._file.flush()
        self._sync(self._descriptor)
        self._uncommitted = False

    def _close_file(self) -> None:
        file, self._file = self._file, None
        try:
            file.close()
        except BaseException:
            # It would be written to again when the process ends, and then marked as whole.
            lead_nowhere(self._descriptor, self._identity)
            keep_off(file, self._identity)
            raise

    def _sync(self, descriptor: int) -> None:
        """Have the disk hold what was written so far, if that was asked for."""
        if self._fsync:
            # A second try would be told that all is well of what the first one has lost.
            if self._unsynced:
                raise OSError("what was written before was not put on the disk")
            self._unsynced = True
            sync(descriptor)
            self._unsynced = False

    @contextmanager
    def _kept_for_sync(self) -> Iterator[int]:
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
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise SinkError(f"{self.path} cannot be written: {in_brief(error)}") from error
