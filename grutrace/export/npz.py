"""Export to a NumPy archive (.npz): `numpy.load` returns each variable by site and name.

An archive is a zip file of .npy files. It is written block by block after NumPy's specification of
both formats, because `numpy.savez` needs complete arrays in memory.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from grutrace.export.portability import NUL, require_representable
from grutrace.export.variables import ExportContent, Group, Variable

#: Separator of site and variable in the name of an array.
SEPARATOR = "/"


def write_npz(content: ExportContent, path: Path) -> list[str]:
    """Write an archive. Returns no notes.

    Raises:
        OptionError: A string ends with NUL, which NumPy would cut off.
    """
    # Not compressed, as in numpy.savez: gates compress badly.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        attributes: dict[str, Any] = dict(content.attributes)
        for group in content.groups():
            for variable in group.variables:
                _write_array(archive, group, variable)
            if group.attributes:
                attributes[group.name] = dict(group.attributes)
        _write_text(archive, "about", json.dumps(attributes))
    return []


def _write_array(archive: zipfile.ZipFile, group: Group, variable: Variable) -> None:
    name = f"{group.name}{SEPARATOR}{variable.name}"
    dtype = _text_type(name, variable) if variable.is_text else np.dtype(variable.dtype)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": variable.shape,
        }
        np.lib.format.write_array_header_1_0(member, header)
        for _, block in variable.blocks():
            member.write(np.ascontiguousarray(block, dtype).data.cast("B") if block.size else b"")


def _text_type(name: str, variable: Variable) -> np.dtype[Any]:
    """Return a fixed-width string type: an array of objects would have to be pickled."""
    longest = 0
    for part, block in variable.blocks():
        require_representable(
            "npz", name, part.start, block, _is_kept, "a string that ends with NUL"
        )
        longest = max((longest, *map(len, block)))
    return np.dtype(f"<U{max(1, longest)}")


def _is_kept(text: str) -> bool:
    # NumPy pads strings with NUL and strips trailing NULs.
    return not text.endswith(NUL)


def _write_text(archive: zipfile.ZipFile, name: str, text: str) -> None:
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, np.array(text), allow_pickle=False)
