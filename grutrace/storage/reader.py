"""Reading a trace from its file: complete, growing, or left behind by a writer that died."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import TraceFileError
from grutrace.record import Array, Header
from grutrace.storage.faults import reading, require
from grutrace.storage.handle import ReadHandle
from grutrace.storage.header import read_header
from grutrace.storage.rows import FileRows
from grutrace.storage.schema import (
    COMMITTED,
    TABLES,
    Column,
    layout,
    pieces_place,
    quantity_place,
    site_place,
    weight_shapes,
)
from grutrace.storage.tables import Tables, check_tables, extent


class FileSource:
    """A trace file as a `Source`.

    Args:
        path: Of the file.

    Raises:
        TraceFileError: It is not there, is no trace, is of a newer format, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.name = str(path)
        if not self._path.is_file():
            found = "is no file" if self._path.exists() else "does not exist"
            raise TraceFileError(f"{self.name} {found}")
        self._known: Tables | None = None
        self._committed: Array | None = None
        with reading(self._path):
            self._handle = ReadHandle(self._path)
            try:
                self._begin()
            except BaseException:
                self._handle.close()
                raise

    def _begin(self) -> None:
        with self._handle.lent() as file:
            self.header = read_header(file)
            self._columns = layout(self.header.modules)
            for place, column in self._columns.items():
                _check_column(self._handle.dataset(place, 0), place, column)
            committed = self._handle.dataset("committed"
