"""HDF5 dimension scales: named axes of the datasets, for tools that do not know grutrace.

The scales follow the conventions of netCDF-4, which xarray, h5netcdf and netCDF-C read. Only the
scale of units has values; all others have just a length. A scale along a growing axis gets its
length when the file is closed: to extend it at each commit would cost as much as a dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import h5py
import numpy as np
from h5py import h5d, h5ds, h5p, h5s, h5t

from grutrace.records import ModuleInfo
from grutrace.storage.format.schema import SITE_AXES, dataset_specs, scale_path, site_path

#: The name by which netCDF-4 marks a dimension without values.
_WITHOUT_VALUES = "This is a netCDF dimension but not a netCDF variable.{:10d}"

#: Items in a chunk of a growing scale. No chunk is ever written.
_CHUNK = 1024


def create_scales(file: h5py.File, modules: Sequence[ModuleInfo]) -> None:
    """Create and attach the scales of all datasets of `dataset_specs`, which must exist."""
    scales = {
        path: _create_unit_scale(file, path, numbers) for path, numbers in _unit_scales(modules)
    }
    for path, spec in dataset_specs(modules).items():
        dataset = h5d.open(file.id, path.encode())
        for axis, scale in enumerate(spec.scales):
            if scale not in scales:
                scales[scale] = _create_empty_scale(
                    file, scale, spec.item_shape[axis - 1] if axis else None
                )
            h5ds.attach_scale(dataset, scales[scale], axis)
    for link, path in _scale_links(modules):
        file[link] = file[path]


def extend_scales(
    file: h5py.File, modules: Sequence[ModuleInfo], lengths: Mapping[str, int]
) -> None:
    """Set the length of the scales along growing axes.

    Args:
        file: The file. A file of version 1.0 has no scales and stays unchanged.
        modules: Modules of the trace.
        lengths: Committed items of each dataset of `dataset_specs`.
    """
    growing = {spec.scales[0]: lengths[path] for path, spec in dataset_specs(modules).items()}
    for path, length in growing.items():
        if length and path in file:
            h5d.open(file.id, path.encode()).set_extent((length,))


def _unit_scales(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path of each scale of units, and its values."""
    for module in modules:
        for site in module.sites:
            path = scale_path(module, site, "unit")
            if path == site_path(module, site.suffix, "unit"):
                yield path, site.units or tuple(range(module.hidden_size))


def _scale_links(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, str]]:
    """Yield the hard links to shared scales: (path of the link, path of the scale).

    netCDF-C compares scales by identity, h5netcdf by name. Both search the group of a dataset and
    its parents.
    """
    for module in modules:
        for site in module.sites:
            for axis in SITE_AXES:
                link, path = site_path(module, site.suffix, axis), scale_path(module, site, axis)
                if link != path:
                    yield link, path


def _create_unit_scale(file: h5py.File, path: str, numbers: Sequence[int]) -> h5d.DatasetID:
    scale = file.create_dataset(path, data=np.array(numbers, "<i8"))
    h5ds.set_scale(scale.id, b"unit")
    return scale.id


def _create_empty_scale(file: h5py.File, path: str, length: int | None) -> h5d.DatasetID:
    """Create a scale without values, of a fixed length or growing."""
    # Low-level calls are faster, and a module of one layer has seven scales.
    properties = h5p.create(h5p.DATASET_CREATE)
    # As in netCDF-C: tools that read the values of a scale show zeros, and not what memory held.
    properties.set_fill_time(h5d.FILL_TIME_IFSET)
    if length is None:
        properties.set_chunk((_CHUNK,))
        space = h5s.create_simple((0,), (h5s.UNLIMITED,))
    else:
        space = h5s.create_simple((length,))
    scale = h5d.create(file.id, path.encode(), h5t.IEEE_F32BE, space, properties)
    h5ds.set_scale(scale, _WITHOUT_VALUES.format(length or 0).encode())
    return scale
