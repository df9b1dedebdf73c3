"""Export to Zarr format 2, which all Zarr readers support: one group per site.

Arrays have xarray's `_ARRAY_DIMENSIONS` attribute, and the metadata is consolidated, so
`xarray.open_zarr(path, group=...)` opens a site.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grutrace.errors import TraceFileError, require_extra
from grutrace.export.portability import case_collisions, ignores_case
from grutrace.export.variables import ExportContent, Group, Variable

#: Bytes of a chunk of rows. Each chunk is a file.
CHUNK = 8 * 1024 * 1024

#: Metadata files of a store: its own, and the consolidated metadata.
GROUP, CONSOLIDATED = ".zgroup", ".zmetadata"


def write_zarr(content: ExportContent, path: Path) -> list[str]:
    """Write a store into a folder. Returns no notes.

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
        target = root.create_group(group.name)
        target.attrs.update(dict(group.attributes))
        for variable in group.variables:
            array = _write_array(target, variable)
            axes = {"_ARRAY_DIMENSIONS": list(variable.axes)}
            array.attrs.update(axes | group.variable_attributes(variable))
    zarr.consolidate_metadata(path, zarr_format=2)
    _sort_metadata(path / CONSOLIDATED)
    return []


def _require_distinct_folders(path: Path, groups: Sequence[Group]) -> None:
    """Check that no two names are the same folder on a case-insensitive file system."""
    paths = [f"{group.name}/{variable.name}" for group in groups for variable in group.variables]
    clashes = case_collisions([*(group.name for group in groups), *paths])
    if clashes and ignores_case(path, GROUP):
        names = " and ".join(map(repr, clashes[0]))
        raise TraceFileError(
            f"the file system of {path.parent} ignores case, and cannot store {names}, which "
            "differ only in case: export to csv, npz or netcdf, or export each separately with "
            "sites="
        )


def _sort_metadata(path: Path) -> None:
    """Sort the consolidated metadata by name, so that the entries of a group are consecutive.

    zarr 3 writes the entries in an order that ignores case, and reads consecutive entries as one
    group. For two groups whose names differ only in case, it found only the last variables.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content["metadata"] = dict(sorted(content["metadata"].items()))
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_array(target: Any, variable: Variable) -> Any:
    items = min(variable.items_per_block(CHUNK), max(1, variable.shape[0]))
    array = target.create_array(
        variable.name,
        shape=variable.shape,
        dtype=str if variable.is_text else variable.dtype,
        chunks=(items, *(max(1, length) for length in variable.shape[1:])),
        # Gates compress badly.
        compressors=None,
        # xarray treats values that are equal to the fill value as missing.
        fill_value=None,
    )
    for part, block in variable.blocks(items):
        array[part] = block
    return array
