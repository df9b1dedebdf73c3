"""NumPy's own archive: `numpy.load` gives every variable by its site and name.

It is a zip of .npy files, and is written as NumPy's documentation of the two formats has it, member
by member and block by block, since `numpy.savez` would need each array whole.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from grutrace.export.portability import NUL, require_representable
from grutrace.export.variables import ExportContent, Group, Variable

#: numpy.load shows no folders, so their names are part of those of the arrays.
SEPARATOR = "/"


def write_npz(content: ExportContent, path: Path) -> list[str]:
    """Write an archive; there is nothing to note.

    Raises:
        OptionError: A text ends with NUL, which NumPy would cut off.
    """
    # Not compressed, as numpy.savez: gates hardly become smaller.
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
    """As wide as the longest of its texts: objects would have to be pickled."""
    longest = 0
    for part, block in variable.blocks():
        require_representable("npz", name, part.start, block, _is_kept, "a text that ends with NUL")
        longest = max((longest, *map(len, block)))
    return np.dtype(f"<U{max(1, longest)}")


def _is_kept(text: str) -> bool:
    # NumPy pads shorter texts with NUL, and takes trailing ones for padding.
    return not text.endswith(NUL)


def _write_text(archive: zipfile.ZipFile, name: str, text: str) -> None:
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, np.array(text), allow_pickle=False)
