"""The formats by name, and the way from a trace to a file of one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grutrace.errors import (
    NotRecordedError,
    as_path,
    join_names,
    reject_unknown_options,
    require_one_of,
    short_repr,
)
from grutrace.export.csv_files import write_csv
from grutrace.export.lstmvis import write_lstmvis
from grutrace.export.netcdf import write_netcdf
from grutrace.export.npz import write_npz
from grutrace.export.output_file import atomic_output
from grutrace.export.variables import ExportContent, SiteContent, calls_group
from grutrace.export.zarr_store import write_zarr
from grutrace.records import DEFAULT_RECORD, QUANTITIES, Site
from grutrace.storage.read.snapshot import TraceSnapshot, select_quantities, select_sites
from grutrace.storage.read.trace import Trace


@dataclass(frozen=True)
class Format:
    """A way to write what a trace holds.

    Attributes:
        write: Writes everything to a path, in bounded memory; returns what the user should know.
        folder: Whether the path is a folder, which is there already.
        record: The quantities that are taken unless asked otherwise.
    """

    write: Callable[[ExportContent, Path], list[str]]
    folder: bool = False
    record: tuple[str, ...] = QUANTITIES


FORMATS = {
    "npz": Format(write_npz),
    "netcdf": Format(write_netcdf),
    "zarr": Format(write_zarr, folder=True),
    "csv": Format(write_csv, folder=True),
    # It shows what lies between -1 and 1.
    "lstmvis": Format(write_lstmvis, folder=True, record=DEFAULT_RECORD),
}


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: Where.
        format: In which format.
        sites: Names of the sites.
        notes: What the reader of it should know, a sentence each.
    """

    path: Path
    format: str
    sites: tuple[str, ...]
    notes: tuple[str, ...]


@reject_unknown_options
def export_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    to: str,
    *,
    sites: str | Sequence[str] | None = None,
    record: str | Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Write what a trace holds as a file, or folder, of another format.

    It appears under its name when it is whole. Rows are read in blocks, so memory is bounded.

    Args:
        trace: A trace, in memory or in a file. Calls recorded meanwhile are left out.
        path: Of the new file or folder.
        to: npz, netcdf, zarr, csv or lstmvis.
        sites: A glob, or several, for names of sites; None for all.
        record: Quantities; None for all that can be read, stored or derived (for lstmvis, all but
            the input).
        progress: Called with how many rows are done, and how many there are.

    Raises:
        OptionError: There is no such format or quantity.
        NotRecordedError: No site matches, or none has any of the quantities.
        TraceFileError: There is something under this name, or it cannot be written.
        MissingExtraError: The format needs a library that is not installed.
    """
    require_one_of("to", to, tuple(FORMATS))
    snapshot, format = trace.snapshot, FORMATS[to]
    chosen = _chosen(snapshot, sites, record, format.record)
    total = sum(snapshot.extent(number).rows * len(names) for number, _, names in chosen)
    advance = _advance(total, progress)
    content = ExportContent(
        tuple(SiteContent(snapshot, *each, advance) for each in chosen),
        calls_group(snapshot),
        _attributes(snapshot),
    )
    path = as_path(path)
    with atomic_output(path, folder=format.folder) as new:
        notes = format.write(content, new)
    names = tuple(site.site.name for site in content.sites)
    return ExportResult(path, to, names, tuple(notes))


def _chosen(
    snapshot: TraceSnapshot,
    sites: str | Sequence[str] | None,
    record: str | Sequence[str] | None,
    default: tuple[str, ...],
) -> list[tuple[int, Site, tuple[str, ...]]]:
    """What is asked for and there: the place of the module, the site and its quantities."""
    matching = select_sites(snapshot, sites).values()
    if not matching:
        recorded = [site.name for module in snapshot.header.modules for site in module.sites]
        raise NotRecordedError(
            f"no site matches {short_repr(sites)}; the trace has {join_names(recorded)}"
            if sites
            else "the trace has no sites"
        )
    asked = select_quantities(default if record is None else record)
    found = [
        (number, site, tuple(name for name in asked if name in site.available_quantities))
        for number, site in matching
    ]
    there = {name for _, _, names in found for name in names}
    missing = [name for name in asked if name not in there]
    if missing and (record is not None or not there):
        raise NotRecordedError(f"{missing[0]!r} was not recorded at any of these sites")
    return [each for each in found if each[2]]


def _attributes(snapshot: TraceSnapshot) -> dict[str, str | int | float]:
    header = snapshot.header
    return {
        "source": "grutrace",
        "model": header.model,
        "created": datetime.fromtimestamp(header.created, UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(dict(header.versions)),
        "options": json.dumps(dict(header.options)),
    }


def _advance(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Count rows, and say how many are done."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    return advance
