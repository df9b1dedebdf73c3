"""Zarr: a folder of chunks, one group a site. Format 2, which every reader of Zarr knows.

Arrays name their axes as xarray does (`_ARRAY_DIMENSIONS`), and the metadata is consolidated, so
that `xarray.open_zarr(path, group=...)` opens a site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grutrace.errors import needing
from grutrace.export.content import Content, Variable

#: The size of a chunk of rows, which is a file. Bytes.
CHUNK = 8 * 1024 * 1024


def write_zarr(content: Content, path: Path) -> list[str]:
    """Write into a folder; there is nothing to note.

    Raises:
        MissingExtraError: zarr is not installed.
    """
    with needing("exporting to zarr", "export"):
        import zarr

    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs.update(dict(content.about))
    for group in content.groups():
        made = root.create_group(group.name)
        made.attrs.update(dict(group.about))
        for variable in group.variables:
            array = _write_array(made, variable)
            axes = {"_ARRAY_DIMENSIONS": list(variable.axes)}
            array.attrs.update(axes | group.attributes(variable))
    zarr.consolidate_metadata(path, zarr_format=2)
    return []


def _write_array(target: Any, variable: Variable) -> Any:
    items = min(variable.fitting(CHUNK), max(1, variable.shape[0]))
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
