"""Reading the tables of a file up to its committed counts, all at once or what came since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grutrace.record import Array, Module
from grutrace.storage.faults import require
from grutrace.storage.handle import ReadHandle
from grutrace.storage.schema import (
    COMMITTED,
    PIECE,
    TABLES,
    Column,
    check_column,
    pieces_place,
)
from grutrace.storage.tables import Tables, check_tables, extent

#: How many times smaller a table can be when it is packed: the most that gzip can do.
PACKED_TABLE = 1032


class CommittedTables:
    """The tables of a file, kept up with it. Ask while the handle is lent.

    Args:
        handle: Of the file.
        modules: The modules of its header.
    """

    def __init__(self, handle: ReadHandle, modules: Sequence[Module]) -> None:
        self._handle = handle
        self._modules = modules
        self._counts: Any = None
        self._left = 0
        self._tables: Tables | None = None

    def read(self) -> Tables:
        """The tables up to what is committed by now.

        Raises:
            Fault: The file is damaged.
        """
        counts = self._settled_counts()
        if self._tables is None or counts != self._counts:
            self._tables, self._counts = self._read_up_to(counts), counts
        return self._tables

    def _settled_counts(self) -> Any:
        # A writer may be putting the counts down at this moment: believe what is read twice.
        counts = self._handle.scalar("committed", COMMITTED)[()]
        while (again := self._handle.scalar("committed", COMMITTED)[()]) != counts:
            counts = again
        return counts

    def _read_up_to(self, counts: Any) -> Tables:
        known = self._tables
        # Each table fits into the file, but many could be the same part of it, and all are read.
        self._left = self._handle.size
        tables: dict[str, Any] = {
            name: self._column(name, int(counts[name]), dtype, getattr(known, name, None))
            for name, dtype in TABLES.items()
        }
        calls = tables["calls"]
        pieces, extents = [], []
        for index, module in enumerate(self._modules):
            own = calls[calls["module"] == index]
            count = int(own["batch"].sum(dtype=np.uint64))
            before = known.pieces[index] if known else None
            pieces.append(self._column(pieces_place(module), count, PIECE, before))
            extents.append(extent(own, pieces[-1]))
        found = Tables(
            **tables, pieces=tuple(pieces), extents=tuple(extents), closed=bool(counts["closed"])
        )
        check_tables(found, self._modules)
        return found

    def _column(self, place: str, count: int, dtype: Any, known: Array | None) -> Array:
        start = 0 if known is None else len(known)
        if known is not None and start == count:
            return known
        dataset = self._handle.dataset(place, count)
        check_column(dataset, place, Column(dtype))
        packed = dataset.id.get_create_plist().get_nfilters()
        self._left -= count * dtype.itemsize // (PACKED_TABLE if packed else 1)
        require(self._left >= 0, place, "tables that fit into the file together", f"{count} items")
        items = np.asarray(dataset[start:count], dtype)
        joined = items if known is None else np.concatenate([known, items])
        joined.flags.writeable = False
        return joined
