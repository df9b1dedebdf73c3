"""Zarr: a folder of chunks, one group a site. Format 2, which every reader of Zarr knows.

Arrays name their axes as xarray does (`_ARRAY_DIMENSIONS`), and the metadata is consolidated, so
that `xarray.open_zarr(path, group=...)` opens a site.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grutrace.errors import TraceFileError, require_extra
from grutrace.export.portability import case_collisions, ignores_case
from grutrace.export.variables import ExportContent, Group, Variable

#: The size of a chunk of rows, which is a file. Bytes.
CHUNK = 8 * 1024 * 1024

#: The files of a store that hold its metadata and that of everything in it.
GROUP, CONSOLIDATED = ".zgroup", ".zmetadata"


def write_zarr(content: ExportContent, path: Path) -> list[str]:
    """Write into a folder; there is nothing to note.

    Raises:
        MissingExtraError: zarr is not installed.
        TraceFileError: Names differ only in case, and the file system ignores case.
    """
    with require_extra("exporting to zarr", "export"):
        import zarr

    root = zarr.open_group(path, mode="w", zarr_format=2)
    groups = list(content.groups())
    _require_distinct_folders(path, groups)
    root.attrs.update(dict(content.attributes))
    for group in groups:
        made = root.create_group(group.name)
        made.attrs.update(dict(group.attributes))
        for variable in group.variables:
            array = _write_array(made, variable)
            axes = {"_ARRAY_DIMENSIONS": list(variable.axes)}
            array.attrs.update(axes | group.variable_attributes(variable))
    zarr.consolidate_metadata(path, zarr_format=2)
    _sort_metadata(path / CONSOLIDATED)
    return []


def _require_distinct_folders(path: Path, groups: Sequence[Group]) -> None:
    """Refuse names that would be one folder."""
    names = [f"{group.name}/{each.name}" for group in groups for each in group.variables]
    clashes = case_collisions([*(group.name for group in groups), *names])
    if clashes and ignores_case(path, GROUP):
        found = " and ".join(map(repr, clashes[0]))
        raise TraceFileError(
            f"{path.parent} cannot hold {found}, which differ only in case, as folders of a Zarr "
            "store: export to csv, npz or netcdf, or one of them at a time with sites"
        )


def _sort_metadata(path: Path) -> None:
    """Put metadata of the same group side by side, where zarr looks for it.

    zarr 3 writes it in an order that ignores case, and reading takes neighbours together: of two
    groups whose names differ only in case the last variables alone were found.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"] = dict(sorted(content["metadata"].items()))
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_array(target: Any, variable: Variable) -> Any:
    items = min(variable.items_per_block(CHUNK), max(1, variable.shape[0]))
    made = target.create_array(
        variable.name,
        shape=variable.shape,
        dtype=str if variable.is_text else variable.dtype,
        chunks=(items, *(max(1, length) for length in variable.shape[1:])),
        # Gates hardly become smaller.
        compressors=None,
        # xarray would take values that are like it for missing ones.
        fill_value=None,
    )
    for part, block in variable.blocks(items):
        made[part] = block
    return made
