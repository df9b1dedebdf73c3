"""What makes a merged file more than a trace: whose calls are whose, and rows in its shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from grutrace.record import Array, Header
from grutrace.storage.faults import require
from grutrace.storage.handle import ReadHandle
from grutrace.storage.rows import FileRows
from grutrace.storage.schema import Column
from grutrace.storage.source import Rows
from grutrace.storage.stacked import StackedRows
from grutrace.storage.stamps import merged_of
from grutrace.storage.tables import ShardCalls, Tables
from grutrace.storage.virtual import Neighbours, Span, read_spans


class MergedColumns:
    """The columns of a file that lie in the shards that it was merged of; none of any other file.

    Args:
        path: Of the file.
        handle: Of the file, lent meanwhile.
        header: Of the file.
        columns: All datasets that grow, by their place.

    Raises:
        Fault: The file is damaged.
        TraceFileError: A shard is not there.
    """

    def __init__(
        self, path: Path, handle: ReadHandle, header: Header, columns: Mapping[str, Column]
    ) -> None:
        self._shards, self._columns = merged_of(header), columns
        self._spans: dict[str, tuple[Span, ...]] = {}
        self._latest: tuple[Tables, Tables] | None = None
        files = {name: created for each in self._shards for name, created in each.files.items()}
        self._neighbours = Neighbours(path, handle, files)
        for place, column in columns.items() if self._shards else ():
            spans = read_spans(handle.unshaped(place), place, column)
            if spans is not None:
                self._spans[place] = spans

    def __contains__(self, place: str) -> bool:
        return place in self._spans

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards that rows are read from."""
        return self._neighbours.files

    def require_lengths(self, counts: Mapping[str, int]) -> None:
        """Require the columns to have just as many items as the tables count.

        Raises:
            Fault: One has not.
        """
        for place, spans in self._spans.items():
            found = sum(span.count for span in spans)
            require(found == counts[place], place, f"{counts[place]} items", found)

    def ranked(self, tables: Tables) -> Tables:
        """The tables of the file, with whose calls are whose.

        Raises:
            Fault: There are not as many calls as the shards had.
        """
        if not self._shards:
            return tables
        if self._latest is None or self._latest[0] is not tables:
            found = sum(shard.calls for shard in self._shards)
            place = "attribute 'options', shards"
            require(found == len(tables.calls), place, f"{len(tables.calls)} calls", found)
            shards = (ShardCalls(each.rank, each.calls, each.closed) for each in self._shards)
            self._latest = tables, replace(tables, shards=tuple(shards))
        return self._latest[1]

    def rows(self, place: str) -> Rows:
        """All rows of one of these columns, (rows, width), read when they are indexed."""
        column, spans = self._columns[place], self._spans[place]
        (width,) = column.item
        parts = [
            FileRows(
                partial(self._neighbours.lent, span, column), (span.count, width), column.dtype
            )
            for span in spans
        ]
        return StackedRows(parts, (sum(map(len, parts)), width), column.dtype)

    def items(self, place: str, start: int, stop: int) -> Array:
        """Some items of one of these columns."""
        column = self._columns[place]
        found = [np.empty((0, *column.item), column.dtype)]
        for span in self._spans[place]:
            first, last = max(0, start), min(span.count, stop)
            if first < last:
                with self._neighbours.lent(span, column) as dataset:
                    found.append(np.asarray(dataset[first:last]))
            start, stop = start - span.count, stop - span.count
        return np.concatenate(found)

    def close(self) -> None:
        """Close the shards. Closing twice does nothing."""
        self._neighbours.close()
