"""HDF5 dimension scales: the axes of the datasets by name, for tools that know nothing of grutrace.

They follow the conventions of netCDF-4, as xarray, h5netcdf and netCDF-C read them. The numbers of
the units are values; of any other axis there is only a length. Along what grows that is right once
the file is closed: a scale that grew with each commit would cost as much as a dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import h5py
import numpy as np
from h5py import h5d, h5ds, h5p, h5s, h5t

from grutrace.records import ModuleInfo
from grutrace.storage.format.schema import SITE_AXES, dataset_specs, scale_path, site_path

#: By which netCDF-4 tells a dimension that has no values.
_WITHOUT_VALUES = "This is a netCDF dimension but not a netCDF variable.{:10d}"

#: Items in a chunk of a scale that grows. None is ever written.
_CHUNK = 1024


def create_scales(file: h5py.File, modules: Sequence[ModuleInfo]) -> None:
    """Name the axes of everything that `layout` lists, once that is there."""
    scales = {
        place: _create_unit_scale(file, place, numbers) for place, numbers in _unit_scales(modules)
    }
    for place, column in dataset_specs(modules).items():
        dataset = h5d.open(file.id, place.encode())
        for axis, scale in enumerate(column.scales):
            if scale not in scales:
                scales[scale] = _create_empty_scale(
                    file, scale, column.item[axis - 1] if axis else None
                )
            h5ds.attach_scale(dataset, scales[scale], axis)
    for link, place in _scale_links(modules):
        file[link] = file[place]


def extend_scales(
    file: h5py.File, modules: Sequence[ModuleInfo], lengths: Mapping[str, int]
) -> None:
    """Make the scales along what grows as long as what counts of it.

    Args:
        file: May be one without scales, of version 1.0.
        modules: Of the trace.
        lengths: Items that count of each dataset that `layout` lists.
    """
    growing = {column.scales[0]: lengths[place] for place, column in dataset_specs(modules).items()}
    for place, length in growing.items():
        if length and place in file:
            h5d.open(file.id, place.encode()).set_extent((length,))


def _unit_scales(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The scales of units, and the numbers in them."""
    for module in modules:
        for site in module.sites:
            place = scale_path(module, site, "unit")
            if place == site_path(module, site.suffix, "unit"):
                yield place, site.units or tuple(range(module.hidden_size))


def _scale_links(modules: Sequence[ModuleInfo]) -> Iterator[tuple[str, str]]:
    """What a site has a name for, and where it is.

    netCDF-C asks whether it is the same scale, h5netcdf for one of its name; both look in the group
    of a dataset and in those above.
    """
    for module in modules:
        for site in module.sites:
            for axis in SITE_AXES:
                own, place = site_path(module, site.suffix, axis), scale_path(module, site, axis)
                if own != place:
                    yield own, place


def _create_unit_scale(file: h5py.File, place: str, numbers: Sequence[int]) -> h5d.DatasetID:
    scale = file.create_dataset(place, data=np.array(numbers, "<i8"))
    h5ds.set_scale(scale.id, b"unit")
    return scale.id


def _create_empty_scale(file: h5py.File, place: str, length: int | None) -> h5d.DatasetID:
    """A scale without values: of this length, or one that grows."""
    # h5py's low-level calls, for there are seven scales to a module of one layer.
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    if length is None:
        properties.set_chunk((_CHUNK,))
        space = h5s.create_simple((0,), (h5s.UNLIMITED,))
    else:
        space = h5s.create_simple((length,))
    scale = h5d.create(file.id, place.encode(), h5t.IEEE_F32BE, space, properties)
    h5ds.set_scale(scale, _WITHOUT_VALUES.format(length or 0).encode())
    return scale
