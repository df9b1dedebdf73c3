"""Whether a trace can go on in an existing file, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from grutrace.errors import TraceFileError
from grutrace.record import Header
from grutrace.storage.committed import CommittedTables
from grutrace.storage.faults import reading
from grutrace.storage.handle import ReadHandle
from grutrace.storage.header import read_header
from grutrace.storage.schema import check_column, layout
from grutrace.storage.tables import Tables, lengths


def existing_tables(path: Path, header: Header) -> Tables:
    """The tables of a trace that one with this header can be appended to.

    Raises:
        TraceFileError: The file is no trace, was not closed, or is of other modules; the message
            says what differs.
    """
    with reading(path):
        handle = ReadHandle(path)
        try:
            with handle.lent() as file:
                before = read_header(file)
                tables = CommittedTables(handle, before.modules).read()
                counts = lengths(tables, before.modules)
                for place, column in layout(before.modules).items():
                    check_column(handle.dataset(place, counts[place]), place, column)
        finally:
            handle.close()
    if not tables.closed:
        raise TraceFileError(
            f"{path} was not closed in order: its writer is still at work or died. It can be read "
            "with grutrace.open, but nothing can be appended to it"
        )
    for difference in _differences(before, header):
        raise TraceFileError(
            f"{path} holds another trace, which this one cannot go on: {difference}"
        )
    return tables


def _differences(before: Header, now: Header) -> Iterator[str]:
    paths = [module.path for module in before.modules]
    if paths != [module.path for module in now.modules]:
        yield _difference("modules", paths, [module.path for module in now.modules])
    for module, other in zip(before.modules, now.modules, strict=False):
        place = f"module {module.path!r}"
        yield from _field_differences(place, module, other, leave_out="sites")
        names = [site.suffix for site in module.sites]
        if names != [site.suffix for site in other.sites]:
            yield _difference(f"sites of {place}", names, [site.suffix for site in other.sites])
        for site, other_site in zip(module.sites, other.sites, strict=False):
            yield from _field_differences(f"site {site.name!r}", site, other_site)


def _field_differences(
    place: str, before: object, now: object, leave_out: str = ""
) -> Iterator[str]:
    for field in dataclasses.fields(before):  # type: ignore[arg-type]
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name != leave_out:
            yield _difference(f"{field.name} of {place}", old, new)


def _difference(place: str, before: object, now: object) -> str:
    return f"{place}: there {before!r}, here {now!r}"
