"""What a trace is read from whose rows were counted and not kept: nothing but its header."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from grutrace.errors import NotRecordedError
from grutrace.record import Header
from grutrace.storage.source import Readable
from grutrace.storage.tables import Tables

_REFUSAL = (
    "a statistics sink keeps figures only, and no rows, calls, sequences or weights. The figures "
    "are in the grutrace.Statistics that the tracer was given: statistics[site].update, "
    "statistics.calls"
)


class FiguresOnly:
    """A `Source` with a header and nothing else: whatever else is asked of it is refused.

    Args:
        header: Of the trace.
    """

    name = "statistics"
    live = True
    files: tuple[Path, ...] = ()

    def __init__(self, header: Header) -> None:
        self.header = header
        self._tables = _NoTables()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled, it is its header: what counts stays here."""
        return FiguresOnly, (self.header,)

    def refresh(self) -> Tables:
        """Tables that refuse to be read."""
        return self._tables

    def as_of(self, tables: Tables) -> Readable:  # noqa: ARG002
        """Itself."""
        return self

    def _refuse(self, *_arguments: Any, **_named: Any) -> NoReturn:
        raise NotRecordedError(_REFUSAL)

    rows = initial = checks = weights = _refuse


class _NoTables(Tables):
    closed = False

    def __init__(self) -> None:
        """Set no table: each is refused when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name in {field.name for field in fields(Tables)}:
            raise NotRecordedError(_REFUSAL)
        raise AttributeError(name)
