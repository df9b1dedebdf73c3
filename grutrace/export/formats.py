"""`export_trace`, which writes a trace in the format of another program, and `FORMATS`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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
    """An export format.

    Attributes:
        write: Writes the content to a path, in bounded memory, and returns notes for the user.
        folder: Whether the path is an existing folder instead of a new file.
        record: The quantities that are exported by default.
    """

    write: Callable[[ExportContent, Path], list[str]]
    folder: bool = False
    record: tuple[str, ...] = QUANTITIES


FORMATS = {
    "npz": Format(write_npz),
    "netcdf": Format(write_netcdf),
    "zarr": Format(write_zarr, folder=True),
    "csv": Format(write_csv, folder=True),
    # LSTMVis shows values between -1 and 1, so the input is left out.
    "lstmvis": Format(write_lstmvis, folder=True, record=DEFAULT_RECORD),
}


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        path: The file or folder.
        format: Name of the format.
        sites: Names of the exported sites.
        notes: Remarks on the exported file, one sentence each.
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
    """Write a trace as a file or folder of another format.

    The export is written under a temporary name and renamed when it is complete. Rows are read in
    blocks, so memory is bounded.

    Args:
        trace: A trace, in memory or in a file. Calls that are recorded during the export are left
            out.
        path: Path of the new file or folder.
        to: npz, netcdf, zarr, csv or lstmvis.
        sites: A glob, or several, for names of sites; None for all.
        record: Quantities to export. None for all available ones, stored or recomputed (without
            the input for lstmvis).
        progress: Called with the number of exported rows and the total.

    Returns:
        The path, the format, the exported sites and remarks on the file.

    Raises:
        OptionError: The format or a quantity is unknown.
        NotRecordedError: No site matches, or no matching site has any of the quantities.
        TraceFileError: The path exists or cannot be written.
        MissingExtraError: The format needs a library that is not installed.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> import grutrace
        >>> from grutrace.export.formats import export_trace
        >>> gru = torch.nn.GRU(2, 3)
        >>> with grutrace.trace(gru) as trace:
        ...     output, state = gru(torch.randn(5, 4, 2))
        >>> export_trace(trace, "run.npz", "npz").sites
        ('l0',)
        >>> with np.load("run.npz") as arrays:
        ...     print(arrays["l0/update"].shape)
        (20, 3)
    """
    require_one_of("to", to, tuple(FORMATS))
    snapshot, format = trace.snapshot, FORMATS[to]
    selected = _select(snapshot, sites, record, format.record)
    total = sum(snapshot.extent(number).rows * len(names) for number, _, names in selected)
    advance = _advance(total, progress)
    content = ExportContent(
        tuple(SiteContent(snapshot, *site, advance) for site in selected),
        calls_group(snapshot),
        _attributes(snapshot),
    )
    path = as_path(path)
    with atomic_output(path, folder=format.folder) as new:
        notes = format.write(content, new)
    names = tuple(site.site.name for site in content.sites)
    return ExportResult(path, to, names, tuple(notes))


def _select(
    snapshot: TraceSnapshot,
    sites: str | Sequence[str] | None,
    record: str | Sequence[str] | None,
    default: tuple[str, ...],
) -> list[tuple[int, Site, tuple[str, ...]]]:
    """Return the selected sites: index of the module, the site and its selected quantities."""
    matching = select_sites(snapshot, sites).values()
    if not matching:
        recorded = [site.name for module in snapshot.header.modules for site in module.sites]
        raise NotRecordedError(
            f"no site matches {short_repr(sites)}; the trace has {join_names(recorded)}"
            if sites
            else "the trace has no sites"
        )
    quantities = select_quantities(default if record is None else record)
    selected = [
        (number, site, tuple(name for name in quantities if name in site.available_quantities))
        for number, site in matching
    ]
    available = {name for _, _, names in selected for name in names}
    missing = [name for name in quantities if name not in available]
    if missing and (record is not None or not available):
        raise NotRecordedError(f"{missing[0]!r} was not recorded at any of the selected sites")
    return [(number, site, names) for number, site, names in selected if names]


def _attributes(snapshot: TraceSnapshot) -> dict[str, str | int | float]:
    header = snapshot.header
    return {
        "source": "grutrace",
        "model": header.model,
        "created": datetime.fromtimestamp(header.created, timezone.utc).isoformat(
            timespec="seconds"
        ),
        "versions": json.dumps(dict(header.versions)),
        "options": json.dumps(dict(header.options)),
    }


def _advance(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Return a function that counts exported rows and reports the count."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    return advance
