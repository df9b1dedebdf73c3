"""Read attributes of an untrusted file, and its format and version."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from grutrace.storage.format.schema import FORMAT, STATISTICS_FORMAT
from grutrace.storage.hdf5.errors import ForeignFile, FormatError, UnsupportedVersion, require

#: Types of attributes, for error messages.
_TYPE_NAMES = {str: "a string", int: "an integer", float: "a float", bool: "a boolean"}

#: Kinds of files that grutrace writes, by their format, for error messages.
_KINDS = {
    FORMAT: "a trace: open it with grutrace.open",
    STATISTICS_FORMAT: "a statistics file: use grutrace.Statistics.load or `grutrace stats`",
}


def format_of(file: h5py.File) -> str:
    """Return the format that a file declares.

    Raises:
        ForeignFile: The file does not declare a format.
    """
    try:
        return str(read_attribute(file, "format", str))
    except FormatError:
        raise ForeignFile("another HDF5 file") from None


def require_format(file: h5py.File, expected: str) -> None:
    """Refuse a file of another format.

    Raises:
        ForeignFile: The file declares another format, or none.
    """
    declared_format = format_of(file)
    if declared_format != expected:
        raise ForeignFile(_KINDS.get(declared_format, "another HDF5 file"))


def check_version(file: h5py.File, newest: int) -> None:
    """Refuse an unknown major version of the format. Newer minor versions only add data.

    Args:
        file: The file.
        newest: Newest major version that this code reads.

    Raises:
        UnsupportedVersion: The file has a newer major version.
        FormatError: The version is missing or invalid.
    """
    where, expected = "attribute 'format_version'", "two integers"
    require("format_version" in file.attrs, where, expected, "nothing")
    attribute = file.attrs.get_id("format_version")
    actual = f"{attribute.dtype} of shape {attribute.shape}"
    require((attribute.shape, attribute.dtype.kind) == ((2,), "i"), where, expected, actual)
    major, minor = (int(number) for number in file.attrs["format_version"])
    if major > newest:
        raise UnsupportedVersion(f"{major}.{minor}", newest)
    require(major >= 1, where, f"{newest}.x", f"{major}.{minor}")


def read_attribute(group: h5py.Group, name: str, kind: type) -> Any:
    """Read a scalar attribute of this Python type.

    Raises:
        FormatError: The attribute is missing or has another type.
    """
    value = _scalar_value(group, name, kind)
    if type(value) is not kind:
        actual = _TYPE_NAMES.get(type(value), type(value).__name__)
        raise FormatError(attribute_path(group, name), _TYPE_NAMES[kind], actual)
    return value


def _scalar_value(group: h5py.Group, name: str, kind: type) -> Any:
    """Read a scalar attribute: a bool, number or string. Refuse other types, such as references.

    h5py's high-level access opens an attribute three times, which is slow for a thousand sites.
    """
    try:
        attribute = group.attrs.get_id(name)
    except KeyError:
        raise FormatError(attribute_path(group, name), _TYPE_NAMES[kind], "nothing") from None
    if attribute.shape != ():
        raise FormatError(attribute_path(group, name), "a scalar", f"shape {attribute.shape}")
    text = h5py.check_string_dtype(attribute.dtype)
    if attribute.dtype.kind not in "biuf" and not (text and text.length is None):
        raise FormatError(attribute_path(group, name), _TYPE_NAMES[kind], attribute.dtype)
    array = np.zeros((), attribute.dtype)
    attribute.read(array)
    value = array.item()
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """Parse the JSON text of an attribute.

    Args:
        text: The text.
        where: Name of the attribute, for messages.

    Raises:
        FormatError: The text is not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(where, "a JSON object", "text that is not JSON") from None
    require(isinstance(value, dict), where, "a JSON object", type(value).__name__)
    return dict(value)


def attribute_path(group: h5py.Group, name: str) -> str:
    """Return the name of an attribute in messages."""
    return f"{group.name}: attribute {name!r}"
