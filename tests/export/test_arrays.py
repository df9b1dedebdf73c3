"""Tests of npz, NetCDF and Zarr: an independent reader sees the values of a plain reader."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import netCDF4
import numpy as np
import pytest
import xarray
import zarr

import grutrace
from grutrace.export.formats import export_trace
from tests.export.expected import Expected, Read, assert_as_expected

FORMATS = ("npz", "netcdf", "zarr")


def reader(to: str, path: Any, stack: ExitStack) -> Read:
    if to == "npz":
        archive = stack.enter_context(np.load(path, allow_pickle=False))
        return lambda group, name: archive[f"{group}/{name}"]
    if to == "netcdf":
        file = stack.enter_context(netCDF4.Dataset(path))
        file.set_auto_mask(False)
        return lambda group, name: file.groups[group].variables[name][:]
    root = zarr.open_group(path, mode="r")
    return lambda group, name: root[group][name][:]


@pytest.fixture(params=FORMATS)
def to(request: Any) -> str:
    return str(request.param)


def exported(full: Any, tmp_path: Any, to: str, **options: Any) -> Any:
    path = tmp_path / f"out.{to}"
    with grutrace.open(full) as trace:
        export_trace(trace, path, to, **options)
    return path


def test_everything_is_exported(full, tmp_path, to) -> None:
    path, expected = exported(full, tmp_path, to), Expected(full)
    with ExitStack() as stack:
        read = reader(to, path, stack)
        assert assert_as_expected(expected, read) > 100


def test_control_any_wrong_value_is_noticed(full, tmp_path, to) -> None:
    path, expected = exported(full, tmp_path, to), Expected(full)
    with ExitStack() as stack:
        read = reader(to, path, stack)
        names = [(group, name) for group, arrays in expected.groups.items() for name in arrays]
        results = {path_and_name: np.array(read(*path_and_name)) for path_and_name in names}
    wrong = 0
    for path_and_name, values in results.items():
        if values.size:
            planted = values.copy()
            last = planted.reshape(-1)[-1:]
            last[:] = last + 1 if values.dtype.kind in "fiu" and last == last else 0
            if values.dtype.kind not in "fiu":
                planted = np.array([*values[:-1], f"{values[-1]}x"], object)
            with pytest.raises(AssertionError):
                assert_as_expected(
                    expected,
                    lambda *asked, v=planted, p=path_and_name: v if asked == p else results[asked],
                )
            wrong += 1
    assert wrong > 80


def test_types_are_kept_where_the_format_has_them(full, tmp_path, to) -> None:
    path, trace = exported(full, tmp_path, to), grutrace.open(full)
    with ExitStack() as stack:
        read = reader(to, path, stack)
        for name in trace.sites:
            stored = np.dtype(trace[name].module.dtype)
            result = read(name.replace("/", "%2F"), "initial").dtype
            assert result == (np.float32 if to == "netcdf" and stored == np.float16 else stored)
    trace.close()


def test_attributes_are_exported(full, tmp_path, to) -> None:
    path, group = exported(full, tmp_path, to), "encoder.rnn.l1_reverse"
    with ExitStack() as stack:
        if to == "npz":
            about = json.loads(str(stack.enter_context(np.load(path))["about"]))
            site = about[group]
        elif to == "netcdf":
            file = stack.enter_context(netCDF4.Dataset(path))
            about, site = file.__dict__, file.groups[group].__dict__
        else:
            root = zarr.open_group(path, mode="r")
            about, site = root.attrs, root[group].attrs
        assert about["model"] == "tests.Model"
        assert about["created"] == "2017-07-14T02:40:00+00:00"
        assert json.loads(about["versions"])["torch"] == "2.13"
        assert (site["site"], site["layer"], site["reverse"]) == (group, 1, 1)
        assert (site["module"], site["kind"], site["hidden_size"]) == ("encoder.rnn", "GRU", 3)


@pytest.mark.parametrize("to", ["netcdf", "zarr"])
def test_xarray_opens_a_site(full, tmp_path, to) -> None:
    path = exported(full, tmp_path, to)
    if to == "zarr":
        site = xarray.open_zarr(path, group="encoder.rnn.l0", chunks=None)
    else:
        site = xarray.open_dataset(path, group="encoder.rnn.l0", engine="h5netcdf")
    with site, grutrace.open(full) as trace:
        here = trace.to_xarray("encoder.rnn.l0")
        assert set(here.coords) <= set(site.coords)
        assert set(here.data_vars) <= set(site.data_vars)
        for name in here.variables:
            assert site[name].dims == here[name].dims
        assert site["update"].dims == ("step", "unit")
        assert site["input"].dims == ("step", "feature")
        assert site["initial"].dims == ("instance", "unit")
        assert site["length"].attrs["sample_dimension"] == "step"
        assert "is kept" in site["update"].attrs["long_name"]
        for number, sequence in enumerate(trace["encoder.rnn.l0"]):
            own = site["sequence"].values == number
            np.testing.assert_array_equal(site["update"].values[own], sequence.update)
            assert [word or None for word in site["token"].values[own]] == (
                sequence.tokens or [None] * len(sequence)
            )


def test_the_netcdf_c_library_masks_no_value(full, tmp_path) -> None:
    """Readers treat some values as missing unless a fill value says otherwise."""
    path = exported(full, tmp_path, "netcdf")
    with netCDF4.Dataset(path) as file:
        for group in file.groups.values():
            for variable in group.variables.values():
                assert not np.ma.is_masked(variable[:])


def test_only_requested_quantities(full, tmp_path, to) -> None:
    path = exported(full, tmp_path, to, sites="encoder*l0*", record=["hidden", "update"])
    with ExitStack() as stack:
        read = reader(to, path, stack)
        for group in ("encoder.rnn.l0", "encoder.rnn.l0_reverse"):
            assert read(group, "update").shape == read(group, "hidden").shape == (10, 3)
            with pytest.raises(KeyError):
                read(group, "reset")
        with pytest.raises(KeyError):
            read("encoder.rnn.l1", "update")
