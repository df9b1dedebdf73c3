"""Export to NetCDF 4 with h5netcdf: one group per site, in ragged arrays of the CF conventions.

NetCDF has no half precision and no booleans. They are written as float32 and int8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from grutrace.errors import require_extra
from grutrace.export.output_file import DeferredErrorFile, open_for_hdf5
from grutrace.export.portability import NUL, require_representable
from grutrace.export.variables import ExportContent, Group, Variable
from grutrace.records import Array

#: Bytes of a chunk of rows.
CHUNK = 1024 * 1024


def write_netcdf(content: ExportContent, path: Path) -> list[str]:
    """Write a file. Returns no notes.

    Raises:
        MissingExtraError: h5netcdf is not installed.
        OptionError: A string contains NUL, which HDF5 strings cannot hold.
    """
    with require_extra("exporting to netcdf", "export"):
        import h5netcdf

    with open_for_hdf5(path) as raw, h5netcdf.File(raw, "w") as file:
        file.attrs.update(content.attributes)
        for group in content.groups():
            _write_group(file.create_group(group.name), group, raw)
    return []


def _write_group(target: Any, group: Group, raw: DeferredErrorFile) -> None:
    attributes = [value for value in group.attributes.values() if isinstance(value, str)]
    _require_no_nul(f"the attributes of {group.name}", 0, np.array(attributes, object))
    target.attrs.update(group.attributes)
    target.dimensions = group.axes
    for variable in group.variables:
        dataset = _write_variable(target, group, variable, raw)
        dataset.attrs.update(group.variable_attributes(variable))


def _write_variable(target: Any, group: Group, variable: Variable, raw: DeferredErrorFile) -> Any:
    dtype = h5py.string_dtype() if variable.is_text else _numeric(np.dtype(variable.dtype))
    chunks = None
    if len(variable.shape) == 2 and all(variable.shape):
        chunks = min(variable.items_per_block(CHUNK), variable.shape[0]), variable.shape[1]
    dataset = target.create_variable(variable.name, variable.axes, dtype, chunks=chunks)
    for part, block in variable.blocks():
        if variable.is_text:
            _require_no_nul(f"{group.name}/{variable.name}", part.start, block)
        dataset[part] = block if variable.is_text else block.astype(dtype, copy=False)
        raw.check()
    return dataset


def _require_no_nul(where: str, start: int, texts: Array) -> None:
    limit = "a string with NUL"
    require_representable("netcdf", where, start, texts, lambda text: NUL not in text, limit)


def _numeric(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype == np.float16 else dtype
