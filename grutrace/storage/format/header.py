"""The header of a trace as attributes of its file, written once and read back checked.

In what two modules differ that should be the same, in words.
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
from grutrace.storage.hdf5.errors import FormatError, UnsupportedVersion, require
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

#: Other files of ours, by their format, and what reads them.
_OTHER_FORMATS = {
    STATISTICS_FORMAT: (
        f"{STATISTICS_FORMAT!r}: grutrace.Statistics.load and `grutrace stats` read this file"
    )
}

#: The end of the year 9999: what comes later is no time of a trace. Seconds since the epoch.
_MAX_CREATED = 253402300800

#: What rows and weights may be kept as.
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
            place = group.create_group(site.suffix)
            _write_attributes(place, site, _SITE)
            if site.derived:
                place.attrs["derived"] = ",".join(site.derived)
            if site.units is not None:
                place.attrs["units"] = np.array(site.units, "<i8")


def _write_attributes(group: h5py.Group, fields: object, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        group.attrs[name] = kind(getattr(fields, name))


def read_header(file: h5py.File) -> TraceHeader:
    """What `write_header` wrote, with the types of rows and weights as the datasets have them.

    Raises:
        FormatError: The file is no trace, is of a newer format, or its header is damaged.
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
    require(len(set(names)) == len(names), "modules", "a name of its own for each site", names)
    return TraceHeader(modules=tuple(modules[index] for index in expected), **root)


def read_root(file: h5py.File) -> dict[str, Any]:
    """What a header says of the whole trace, by the names of `TraceHeader`.

    Raises:
        NewerFormat: The file is of a newer format.
        FormatError: The file is no trace, or this is damaged.
    """
    found = format_of(file)
    require(found == FORMAT, "attribute 'format'", FORMAT, _OTHER_FORMATS.get(found, "another"))
    check_version(file, FORMAT_VERSION[0])
    root = {name: _attribute(file, name, kind) for name, kind in _ROOT.items()}
    place = "attribute 'created'"
    require(0 <= root["created"] < _MAX_CREATED, place, "seconds since the epoch", root["created"])
    for name in ("versions", "options"):
        root[name] = _read_json(root[name], f"attribute {name!r}")
    texts = all(isinstance(version, str) for version in root["versions"].values())
    require(texts, "attribute 'versions'", "texts", "something else")
    return root


def format_of(file: h5py.File) -> str:
    """Which format a file is of by its own account.

    Raises:
        FormatError: It does not say.
    """
    return str(_attribute(file, "format", str))


def check_version(file: h5py.File, newest: int) -> None:
    """Refuse a major version of the format that is not known. A newer minor one only adds.

    Raises:
        NewerFormat: It is newer than the newest known one.
        FormatError: There is no version, or none that ever was.
    """
    place, expected = "attribute 'format_version'", "two integers"
    require("format_version" in file.attrs, place, expected, "nothing")
    attribute = file.attrs.get_id("format_version")
    found = f"{attribute.dtype} of shape {attribute.shape}"
    require((attribute.shape, attribute.dtype.kind) == ((2,), "i"), place, expected, found)
    major, minor = (int(number) for number in file.attrs["format_version"])
    if major > newest:
        raise UnsupportedVersion(f"{major}.{minor}", newest)
    require(major >= 1, place, f"{newest}.x", f"{major}.{minor}")


def _attribute(group: h5py.Group, name: str, kind: type) -> Any:
    value = _value(group, name, kind)
    if type(value) is not kind:
        raise FormatError(_attribute_path(group, name), kind.__name__, type(value).__name__)
    return value


def _value(group: h5py.Group, name: str, kind: type) -> Any:
    """A scalar of one of the types that there are: of others, such as references, nothing is read.

    It takes one look where h5py's own way takes three, and a thousand sites have many.
    """
    try:
        attribute = group.attrs.get_id(name)
    except KeyError:
        raise FormatError(_attribute_path(group, name), kind.__name__, "nothing") from None
    if attribute.shape != ():
        raise FormatError(_attribute_path(group, name), "a scalar", f"shape {attribute.shape}")
    text = h5py.check_string_dtype(attribute.dtype)
    if attribute.dtype.kind not in "biuf" and not (text and text.length is None):
        raise FormatError(_attribute_path(group, name), kind.__name__, attribute.dtype)
    value = np.zeros((), attribute.dtype)
    attribute.read(value)
    found = value.item()
    return found.decode("utf-8", "surrogateescape") if isinstance(found, bytes) else found


def _attribute_path(group: h5py.Group, name: str) -> str:
    return f"{group.name}: attribute {name!r}"


def _read_json(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(place, "a JSON object", "text that is not JSON") from None
    require(isinstance(value, dict), place, "a JSON object", type(value).__name__)
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


def _check_sites(place: str, module: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Each layer reads what the one below it makes, and each direction of it is there once."""
    directions = [(site.layer, site.reverse) for site in sites]
    once = len(set(directions)) == len(directions)
    require(once, place, "each direction of a layer once", directions)
    above = module["hidden_size"] * (2 if module["bidirectional"] else 1)
    for site in sites:
        layers = module["num_layers"]
        require(0 <= site.layer < layers, f"{place}/{site.suffix}", f"{layers} layers", site.layer)
        read = above if site.layer else module["input_size"]
        found = site.input_size
        require(found == read >= 0, f"{place}/{site.suffix}", f"an input size of {read}", found)


def _check_biases(site: h5py.Group, bias: bool) -> None:
    found = [name for name in WEIGHTS if has_member(site, name)]
    expected = [name for name in WEIGHTS if bias or not name.startswith("bias")]
    require(found == expected, site.name, expected, found)


def _check_inputs(groups: Mapping[str, h5py.Group], sites: Sequence[Site]) -> None:
    """Both directions of a layer read the same input, so there is one for both."""
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
    place = f"{group.name}: attribute 'units'"
    attribute = group.attrs.get_id("units")
    expected = f"at least one of {hidden_size} units, each once"
    require(
        attribute.dtype.kind == "i"
        and len(attribute.shape) == 1
        and 1 <= attribute.shape[0] <= hidden_size,
        place,
        expected,
        f"{attribute.dtype} of shape {attribute.shape}",
    )
    units = tuple(int(unit) for unit in group.attrs["units"])
    inside = min(units) >= 0 and max(units) < hidden_size
    require(inside and len(set(units)) == len(units), place, expected, units)
    return units


def _read_derived(
    group: h5py.Group, stored: tuple[str, ...], units: tuple[int, ...] | None
) -> tuple[str, ...]:
    if "derived" not in group.attrs:
        return ()
    names = _attribute(group, "derived", str).split(",")
    expected = tuple(name for name in QUANTITIES if name in names and name not in stored)
    place = f"{group.name}: attribute 'derived'"
    require(expected == tuple(names), place, "quantities that are not stored", names)
    follow = "hidden" in stored and units is None
    require(follow, place, "states of all units, which they follow from", "no such states")
    return expected


def _float_name(group: h5py.Group, name: str) -> str:
    dtype = get_member(group, name, h5py.Dataset).dtype
    place = f"{group.name}/{name}"
    require(dtype.name in _FLOATS, place, " or ".join(_FLOATS), dtype)
    return str(dtype.name)


def module_differences(module: ModuleInfo, other: ModuleInfo) -> Iterator[str]:
    """What differs between two modules of the same path, sites and all."""
    place = f"module {module.path!r}"
    yield from _field_differences(place, module, other, leave_out="sites")
    names = [site.suffix for site in module.sites]
    if names != [site.suffix for site in other.sites]:
        yield describe_difference(f"sites of {place}", names, [site.suffix for site in other.sites])
    for site, other_site in zip(module.sites, other.sites, strict=False):
        yield from _field_differences(f"site {site.name!r}", site, other_site)


def describe_difference(place: str, before: object, now: object) -> str:
    """One difference in words."""
    return f"{place}: there {before!r}, here {now!r}"


def _field_differences(
    place: str, before: object, now: object, leave_out: str = ""
) -> Iterator[str]:
    for field in dataclasses.fields(before):  # type: ignore[arg-type]
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name != leave_out:
            yield describe_difference(f"{field.name} of {place}", old, new)
