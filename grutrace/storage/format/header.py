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

from grutrace.records import (
    LOG_PREFIX,
    QUANTITIES,
    WEIGHTS,
    ModuleInfo,
    Site,
    TraceHeader,
    is_log_name,
)
from grutrace.storage.format.attributes import (
    attribute_path,
    check_version,
    parse_json_object,
    read_attribute,
    require_format,
)
from grutrace.storage.format.schema import FORMAT, FORMAT_VERSION, module_path
from grutrace.storage.hdf5.errors import require
from grutrace.storage.hdf5.safe_access import get_member, has_member, is_dataset

#: Attributes of the root group, with their Python types.
_ROOT = {"model": str, "created": float, "versions": str, "options": str}

#: Attributes of the group of a module.
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

#: Attributes of the group of a site.
_SITE = {"name": str, "layer": int, "reverse": bool, "input_size": int}


#: The end of the year 9999, in seconds since the epoch. Later times are refused.
_MAX_CREATED = 253402300800

#: Largest number of logged values per step.
_MAX_LOG_WIDTH = 2**31

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
            if site.logs:
                site_group.attrs["logs"] = json.dumps(dict(site.logs))
            if site.units is not None:
                site_group.attrs["units"] = np.array(site.units, "<i8")


def _write_attributes(
    group: h5py.Group, info: ModuleInfo | Site, kinds: Mapping[str, type]
) -> None:
    for name, kind in kinds.items():
        group.attrs[name] = kind(getattr(info, name))


def read_header(file: h5py.File) -> TraceHeader:
    """Read a header. The types of rows and weights are those of the datasets.

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
        modules[read_attribute(group, "index", int)] = _read_module(group)
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
    root = {name: read_attribute(file, name, kind) for name, kind in _ROOT.items()}
    created = root["created"]
    in_range = 0 <= created < _MAX_CREATED
    require(in_range, "attribute 'created'", "seconds since the epoch", created)
    for name in ("versions", "options"):
        root[name] = parse_json_object(root[name], f"attribute {name!r}")
    are_strings = all(isinstance(version, str) for version in root["versions"].values())
    require(are_strings, "attribute 'versions'", "strings", "other values")
    return root


def _read_module(group: h5py.Group) -> ModuleInfo:
    fields = {name: read_attribute(group, name, kind) for name, kind in _MODULE.items()}
    del fields["index"]
    for name in ("hidden_size", "num_layers"):
        require(fields[name] > 0, attribute_path(group, name), "at least 1", fields[name])
    names = [name for name in group if not is_dataset(group, name)]
    groups = {name: get_member(group, name, h5py.Group) for name in names}
    hidden_size = fields["hidden_size"]
    sites = [_read_site(site_group, name, hidden_size) for name, site_group in groups.items()]
    require(sites, group.name, "at least one site", "none")
    sites.sort(key=lambda site: (site.layer, site.reverse))
    _check_sites(group.name, fields, sites)
    for site_group in groups.values():
        _check_biases(site_group, fields["bias"])
    _check_inputs(groups, sites)
    site_group = groups[sites[0].suffix]
    return ModuleInfo(
        **fields,
        dtype=_float_name(site_group, "initial"),
        weights_dtype=_float_name(site_group, "weight_hh"),
        sites=tuple(sites),
    )


def _check_sites(where: str, module: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Check the input size of each layer, and that each direction of a layer occurs once."""
    directions = [(site.layer, site.reverse) for site in sites]
    unique = len(set(directions)) == len(directions)
    require(unique, where, "each direction of a layer once", directions)
    output_size = module["hidden_size"] * (2 if module["bidirectional"] else 1)
    layers = module["num_layers"]
    for site in sites:
        path = f"{where}/{site.suffix}"
        require(0 <= site.layer < layers, path, f"{layers} layers", site.layer)
        # The layers above the first read the output of the layer below.
        width = output_size if site.layer else module["input_size"]
        require(site.input_size == width >= 0, path, f"an input size of {width}", site.input_size)


def _check_biases(site: h5py.Group, bias: bool) -> None:
    stored = [name for name in WEIGHTS if has_member(site, name)]
    expected = [name for name in WEIGHTS if bias or not name.startswith("bias")]
    require(stored == expected, site.name, expected, stored)


def _check_inputs(groups: Mapping[str, h5py.Group], sites: Sequence[Site]) -> None:
    """Check that both directions of a layer share one dataset of inputs."""
    for owner, site in pairwise(site for site in sites if "input" in site.quantities):
        if owner.layer == site.layer:
            group = groups[site.suffix]
            dataset = get_member(groups[owner.suffix], "input", h5py.Dataset)
            is_shared = dataset == get_member(group, "input", h5py.Dataset)
            expected = f"the input of {owner.suffix}"
            require(is_shared, f"{group.name}/input", expected, "another dataset")


def _read_site(group: h5py.Group, suffix: str, hidden_size: int) -> Site:
    fields = {name: read_attribute(group, name, kind) for name, kind in _SITE.items()}
    quantities = tuple(quantity for quantity in QUANTITIES if has_member(group, quantity))
    units = _read_units(group, hidden_size)
    derived = _read_derived(group, quantities, units)
    logs = _read_logs(group)
    quantities += tuple(LOG_PREFIX + name for name, _ in logs)
    return Site(
        **fields, suffix=suffix, quantities=quantities, derived=derived, units=units, logs=logs
    )


def _read_logs(group: h5py.Group) -> tuple[tuple[str, int], ...]:
    if "logs" not in group.attrs:
        return ()
    where = attribute_path(group, "logs")
    logs = parse_json_object(read_attribute(group, "logs", str), where)
    for name, width in logs.items():
        is_valid = is_log_name(name) and type(width) is int and 0 < width <= _MAX_LOG_WIDTH
        require(is_valid, where, "numbers of values by name", f"{name!r}: {width!r}")
        path = f"{group.name}/{LOG_PREFIX}{name}"
        require(has_member(group, LOG_PREFIX + name), path, "a dataset", "nothing")
    return tuple(sorted(logs.items()))


def _read_units(group: h5py.Group, hidden_size: int) -> tuple[int, ...] | None:
    if "units" not in group.attrs:
        return None
    where = attribute_path(group, "units")
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
    in_range = min(units) >= 0 and max(units) < hidden_size
    require(in_range and len(set(units)) == len(units), where, expected, units)
    return units


def _read_derived(
    group: h5py.Group, stored: tuple[str, ...], units: tuple[int, ...] | None
) -> tuple[str, ...]:
    if "derived" not in group.attrs:
        return ()
    names = read_attribute(group, "derived", str).split(",")
    expected = tuple(name for name in QUANTITIES if name in names and name not in stored)
    where = attribute_path(group, "derived")
    require(expected == tuple(names), where, "quantities that are not stored", names)
    can_derive = "hidden" in stored and units is None
    require(can_derive, where, "stored states of all units, to derive them from", "none")
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
        owners: Names of the owners of the two modules, as in ("the file", "the model").
    """
    where = f"module {module.path!r}"
    yield from _field_differences(where, module, other, owners, leave_out="sites")
    names = [site.suffix for site in module.sites]
    other_names = [site.suffix for site in other.sites]
    if names != other_names:
        yield describe_difference(f"sites of {where}", names, other_names, owners)
    for site, other_site in zip(module.sites, other.sites, strict=False):
        yield from _field_differences(f"site {site.name!r}", site, other_site, owners)


def describe_difference(
    where: str, value: object, other_value: object, owners: tuple[str, str]
) -> str:
    """Describe one difference of two headers, as in "the file has 3, ..."."""
    return f"{where}: {owners[0]} has {value!r}, {owners[1]} has {other_value!r}"


def _field_differences(
    where: str,
    info: ModuleInfo | Site,
    other: ModuleInfo | Site,
    owners: tuple[str, str],
    leave_out: str = "",
) -> Iterator[str]:
    for field in dataclasses.fields(info):
        value, other_value = getattr(info, field.name), getattr(other, field.name)
        if value != other_value and field.name != leave_out:
            yield describe_difference(f"{field.name} of {where}", value, other_value, owners)
