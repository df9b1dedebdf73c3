"""Write the header of a trace as attributes of its file; read and check it.

`module_differences` describes how the modules of two headers differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from grutrace.records import QUANTITIES, WEIGHTS, ModuleInfo, Site, TraceHeader
from grutrace.storage.format.schema import FORMAT, FORMAT_VERSION, STATISTICS_FORMAT, module_path
from grutrace.storage.hdf5.errors import ForeignFile, FormatError, UnsupportedVersion, require
from grutrace.storage.hdf5.safe_access import get_member, has_member, is_dataset

_ROOT = {"model": str, "created": float, "versions": str, "options": str}

_MODULE = {
    "index": int,
    "path": str,
    "kind": str,
    "type": str,
    "input_size": int,
    "hidden_size": int,
    "num_layers": int,
    "bidirectional": bool,
    "bias": bool,
    "batch_first": bool,
    "dropout": float,
}

_SITE = {"name": str, "layer": int, "reverse": bool, "input_size": int}

#: Types of attributes, for error messages.
_TYPE_NAMES = {str: "a string", int: "an integer", float: "a float", bool: "a boolean"}

#: Kinds of files that grutrace writes, by their format, for error messages.
_KINDS = {
    FORMAT: "a trace: open it with grutrace.open",
    STATISTICS_FORMAT: "a statistics file: use grutrace.Statistics.load or `grutrace stats`",
}

#: The end of the year 9999, in seconds since the epoch. Later times are refused.
_MAX_CREATED = 253402300800

#: The types that rows and weights may have.
_FLOATS = ("float16", "float32", "float64")


def write_header(file: h5py.File, header: TraceHeader) -> None:
    """Create the groups of a trace and all attributes."""
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = np.array(FORMAT_VERSION, "<i8")
    file.attrs["model"] = header.model
    file.attrs["created"] = float(header.created)
    file.attrs["versions"] = json.dumps(dict(header.versions))
    file.attrs["options"] = json.dumps(dict(header.options))
    file.create_group("modules")
    for index, module in enumerate(header.modules):
        group = file.create_group(module_path(module))
        group.attrs["index"] = index
        _write_attributes(
            group, module, {name: kind for name, kind in _MODULE.items() if name != "index"}
        )
        for site in module.sites:
            site_group = group.create_group(site.suffix)
            _write_attributes(site_group, site, _SITE)
            if site.derived:
                site_group.attrs["derived"] = ",".join(site.derived)
            if site.units is not None:
                site_group.attrs["units"] = np.array(site.units, "<i8")


def _write_attributes(group: h5py.Group, fields: object, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        group.attrs[name] = kind(getattr(fields, name))


def read_header(file: h5py.File) -> TraceHeader:
    """Read what `write_header` wrote. Types of rows and weights are those of the datasets.

    Raises:
        ForeignFile: The file is not a trace.
        UnsupportedVersion: The file has a newer format version.
        FormatError: The header is damaged.
    """
    root = read_root(file)
    modules: dict[int, ModuleInfo] = {}
    groups = get_member(file, "modules", h5py.Group)
    for name in groups:
        group = get_member(groups, name, h5py.Group)
        modules[_attribute(group, "index", int)] = _read_module(group)
    expected = list(range(len(groups)))
    require(sorted(modules) == expected, "modules", f"numbers {expected}", sorted(modules))
    names = [site.name for module in modules.values() for site in module.sites]
    require(len(set(names)) == len(names), "modules", "a unique name for each site", names)
    return TraceHeader(modules=tuple(modules[index] for index in expected), **root)


def read_root(file: h5py.File) -> dict[str, Any]:
    """Read the attributes of the whole trace, as keyword arguments of `TraceHeader`.

    Raises:
        ForeignFile: The file is not a trace.
        UnsupportedVersion: The file has a newer format version.
        FormatError: An attribute is damaged.
    """
    require_format(file, FORMAT)
    check_version(file, FORMAT_VERSION[0])
    root = {name: _attribute(file, name, kind) for name, kind in _ROOT.items()}
    where = "attribute 'created'"
    require(0 <= root["created"] < _MAX_CREATED, where, "seconds since the epoch", root["created"])
    for name in ("versions", "options"):
        root[name] = _read_json(root[name], f"attribute {name!r}")
    texts = all(isinstance(version, str) for version in root["versions"].values())
    require(texts, "attribute 'versions'", "strings", "other values")
    return root


def format_of(file: h5py.File) -> str:
    """Return the format that a file declares.

    Raises:
        ForeignFile: The file does not declare a format.
    """
    try:
        return str(_attribute(file, "format", str))
    except FormatError:
        raise ForeignFile("another HDF5 file") from None


def require_format(file: h5py.File, expected: str) -> None:
    """Refuse a file of another format.

    Raises:
        ForeignFile: The file declares another format, or none.
    """
    found = format_of(file)
    if found != expected:
        raise ForeignFile(_KINDS.get(found, "another HDF5 file"))


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
    found = f"{attribute.dtype} of shape {attribute.shape}"
    require((attribute.shape, attribute.dtype.kind) == ((2,), "i"), where, expected, found)
    major, minor = (int(number) for number in file.attrs["format_version"])
    if major > newest:
        raise UnsupportedVersion(f"{major}.{minor}", newest)
    require(major >= 1, where, f"{newest}.x", f"{major}.{minor}")


def _attribute(group: h5py.Group, name: str, kind: type) -> Any:
    value = _value(group, name, kind)
    if type(value) is not kind:
        found = _TYPE_NAMES.get(type(value), type(value).__name__)
        raise FormatError(_attribute_path(group, name), _TYPE_NAMES[kind], found)
    return value


def _value(group: h5py.Group, name: str, kind: type) -> Any:
    """Read a scalar attribute: a bool, number or string. Other types, as references, are refused.

    h5py's high-level access opens an attribute three times, which is slow for a thousand sites.
    """
    try:
        attribute = group.attrs.get_id(name)
    except KeyError:
        raise FormatError(_attribute_path(group, name), _TYPE_NAMES[kind], "nothing") from None
    if attribute.shape != ():
        raise FormatError(_attribute_path(group, name), "a scalar", f"shape {attribute.shape}")
    text = h5py.check_string_dtype(attribute.dtype)
    if attribute.dtype.kind not in "biuf" and not (text and text.length is None):
        raise FormatError(_attribute_path(group, name), _TYPE_NAMES[kind], attribute.dtype)
    value = np.zeros((), attribute.dtype)
    attribute.read(value)
    found = value.item()
    return found.decode("utf-8", "surrogateescape") if isinstance(found, bytes) else found


def _attribute_path(group: h5py.Group, name: str) -> str:
    return f"{group.name}: attribute {name!r}"


def _read_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(where, "a JSON object", "text that is not JSON") from None
    require(isinstance(value, dict), where, "a JSON object", type(value).__name__)
    return dict(value)


def _read_module(group: h5py.Group) -> ModuleInfo:
    fields = {name: _attribute(group, name, kind) for name, kind in _MODULE.items()}
    del fields["index"]
    for name in ("hidden_size", "num_layers"):
        require(fields[name] > 0, f"{group.name}: attribute {name!r}", "at least 1", fields[name])
    names = [name for name in group if not is_dataset(group, name)]
    groups = {name: get_member(group, name, h5py.Group) for name in names}
    hidden_size = fields["hidden_size"]
    sites = [_read_site(each, name, hidden_size) for name, each in groups.items()]
    require(sites, group.name, "at least one site", "none")
    sites.sort(key=lambda site: (site.layer, site.reverse))
    _check_sites(group.name, fields, sites)
    for each in groups.values():
        _check_biases(each, fields["bias"])
    _check_inputs(groups, sites)
    first = groups[sites[0].suffix]
    return ModuleInfo(
        **fields,
        dtype=_float_name(first, "initial"),
        weights_dtype=_float_name(first, "weight_hh"),
        sites=tuple(sites),
    )


def _check_sites(where: str, module: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Check the input size of each layer, and that each direction of a layer occurs once."""
    directions = [(site.layer, site.reverse) for site in sites]
    once = len(set(directions)) == len(directions)
    require(once, where, "each direction of a layer once", directions)
    above = module["hidden_size"] * (2 if module["bidirectional"] else 1)
    for site in sites:
        layers = module["num_layers"]
        require(0 <= site.layer < layers, f"{where}/{site.suffix}", f"{layers} layers", site.layer)
        read = above if site.layer else module["input_size"]
        found = site.input_size
        require(found == read >= 0, f"{where}/{site.suffix}", f"an input size of {read}", found)


def _check_biases(site: h5py.Group, bias: bool) -> None:
    found = [name for name in WEIGHTS if has_member(site, name)]
    expected = [name for name in WEIGHTS if bias or not name.startswith("bias")]
    require(found == expected, site.name, expected, found)


def _check_inputs(groups: Mapping[str, h5py.Group], sites: Sequence[Site]) -> None:
    """Check that both directions of a layer share one dataset of inputs."""
    for first, second in pairwise(site for site in sites if "input" in site.quantities):
        if first.layer == second.layer:
            group = groups[second.suffix]
            one = get_member(groups[first.suffix], "input", h5py.Dataset)
            same = one == get_member(group, "input", h5py.Dataset)
            require(same, f"{group.name}/input", f"the input of {first.suffix}", "another dataset")


def _read_site(group: h5py.Group, suffix: str, hidden_size: int) -> Site:
    fields = {name: _attribute(group, name, kind) for name, kind in _SITE.items()}
    quantities = tuple(quantity for quantity in QUANTITIES if has_member(group, quantity))
    units = _read_units(group, hidden_size)
    derived = _read_derived(group, quantities, units)
    return Site(**fields, suffix=suffix, quantities=quantities, derived=derived, units=units)


def _read_units(group: h5py.Group, hidden_size: int) -> tuple[int, ...] | None:
    if "units" not in group.attrs:
        return None
    where = f"{group.name}: attribute 'units'"
    attribute = group.attrs.get_id("units")
    expected = f"at least one of {hidden_size} units, each once"
    require(
        attribute.dtype.kind == "i"
        and len(attribute.shape) == 1
        and 1 <= attribute.shape[0] <= hidden_size,
        where,
        expected,
        f"{attribute.dtype} of shape {attribute.shape}",
    )
    units = tuple(int(unit) for unit in group.attrs["units"])
    inside = min(units) >= 0 and max(units) < hidden_size
    require(inside and len(set(units)) == len(units), where, expected, units)
    return units


def _read_derived(
    group: h5py.Group, stored: tuple[str, ...], units: tuple[int, ...] | None
) -> tuple[str, ...]:
    if "derived" not in group.attrs:
        return ()
    names = _attribute(group, "derived", str).split(",")
    expected = tuple(name for name in QUANTITIES if name in names and name not in stored)
    where = f"{group.name}: attribute 'derived'"
    require(expected == tuple(names), where, "quantities that are not stored", names)
    follow = "hidden" in stored and units is None
    require(follow, where, "stored states of all units, to derive them from", "none")
    return expected


def _float_name(group: h5py.Group, name: str) -> str:
    dtype = get_member(group, name, h5py.Dataset).dtype
    where = f"{group.name}/{name}"
    require(dtype.name in _FLOATS, where, " or ".join(_FLOATS), dtype)
    return str(dtype.name)


def module_differences(
    module: ModuleInfo, other: ModuleInfo, owners: tuple[str, str]
) -> Iterator[str]:
    """Describe the differences of two modules with the same path, and of their sites.

    Args:
        module: A module.
        other: The module to compare it with.
        owners: What the two modules belong to, as in ("the file", "the model").
    """
    where = f"module {module.path!r}"
    yield from _field_differences(where, module, other, owners, leave_out="sites")
    names, other_names = ([site.suffix for site in each.sites] for each in (module, other))
    if names != other_names:
        yield describe_difference(f"sites of {where}", names, other_names, owners)
    for site, other_site in zip(module.sites, other.sites, strict=False):
        yield from _field_differences(f"site {site.name!r}", site, other_site, owners)


def describe_difference(where: str, value: object, other: object, owners: tuple[str, str]) -> str:
    """Describe one difference of two headers, as in "the file has 3, ..."."""
    return f"{where}: {owners[0]} has {value!r}, {owners[1]} has {other!r}"


def _field_differences(
    where: str, fields: object, others: object, owners: tuple[str, str], leave_out: str = ""
) -> Iterator[str]:
    for field in dataclasses.fields(fields):  # type: ignore[arg-type]
        value, other = getattr(fields, field.name), getattr(others, field.name)
        if value != other and field.name != leave_out:
            yield describe_difference(f"{field.name} of {where}", value, other, owners)
