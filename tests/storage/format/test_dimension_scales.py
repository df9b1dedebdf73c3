"""Other tools read the axes of a closed trace by name."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import xarray

import grutrace
from grutrace.records import FORWARD_QUANTITIES as QUANTITIES
from grutrace.storage.open import open_trace
from grutrace.storage.write import create, writer
from tests.plain_reader import PlainTrace
from tests.storage.oracle import check_trace
from tests.storage.streams import Stream, full_stream, make_header, make_module

#: What each axis of a dataset of a site must be called.
AXES = {
    **dict.fromkeys(("reset", "update", "candidate", "hidden", "gradient"), ("step", "unit")),
    "input": ("step", "feature"),
    "initial": ("sequence", "unit"),
    "checks": ("module_call",),
    "weight_ih": ("version", "gate_unit", "feature"),
    "weight_hh": ("version", "gate_unit", "unit"),
    "bias_ih": ("version", "gate_unit"),
    "bias_hh": ("version", "gate_unit"),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def write(path, stream, mode="w"):
    file = writer.Writer(path, stream.header, mode)
    for record in stream.records:
        file.write(record)
    file.close()


def site_groups(plain):
    """The groups of all sites, with what the reader of the format's page finds in them."""
    for module in plain.modules:
        for suffix, site in module.sites.items():
            yield f"modules/{module.group_name}/{suffix}", site


def arrays(site):
    return {**site.rows, **site.weights, "initial": site.initial}


def test_xarray_opens_every_site(path):
    write(path, full_stream())
    for group, site in site_groups(PlainTrace(path)):
        with xarray.open_dataset(path, group=group, engine="h5netcdf") as dataset:
            for name, array in arrays(site).items():
                assert dataset[name].dims == AXES[name]
                np.testing.assert_array_equal(dataset[name].values, array)
            assert dataset.checks.dims == ("module_call",)
            assert dataset.checks.values["residual"].tolist() == site.checks["residual"].tolist()
            assert dataset.unit.values.tolist() == list(range(site.initial.shape[1]))


def test_xarray_opens_the_whole_file(path):
    write(path, full_stream())
    plain = PlainTrace(path)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert tree["calls"].dims == ("call",)
        assert tree["calls"].values["time"].tolist() == plain.calls["time"].tolist()
        for group, site in site_groups(plain):
            np.testing.assert_array_equal(tree[f"{group}/initial"], site.initial)


def test_control_without_scales_the_axes_have_no_names(path, monkeypatch):
    monkeypatch.setattr(create, "create_scales", lambda *_: None)
    write(path, full_stream())
    group = "modules/encoder.rnn/l0"
    with (
        pytest.warns(UserWarning, match="phony_dims"),
        xarray.open_dataset(path, group=group, engine="h5netcdf") as dataset,
    ):
        assert all(name.startswith("phony_dim") for name in dataset["update"].dims)


#: Run without grutrace in sight. netCDF-C brings another HDF5, which gets a process of its own.
NETCDF = """
import json, sys
sys.modules["grutrace"] = None
import netCDF4

def walk(group):
    for name, variable in group.variables.items():
        place = f"{group.path}/{name}".lstrip("/")
        sums = float(variable[:].sum()) if variable.dtype in ("f4", "f8") else None
        found[place] = [variable.dimensions, variable.shape, sums]
    for each in group.groups.values():
        walk(each)

found = {}
with netCDF4.Dataset(sys.argv[1]) as file:
    walk(file)
print(json.dumps(found))
"""


def test_netcdf_c_opens_the_whole_file(path):
    stream = Stream(
        make_header(
            make_module("a/b", layers=2, directions=(False, True), record=QUANTITIES),
            make_module("cell", kind="GRUCell", bias=False, dtype="float64"),
        )
    )
    stream.call([3, 0, 4], tag="valid")
    stream.call([2, 2], module=1)
    stream.call([1, 1], module=1, go_on=[1, 0])
    stream.annotate(0, "tokens", ["x"] * 3)
    write(path, stream)
    done = subprocess.run(
        [sys.executable, "-c", NETCDF, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for group, site in site_groups(PlainTrace(path)):
        for name, array in arrays(site).items():
            dimensions, shape, total = result[f"{group}/{name}"]
            assert (tuple(dimensions), tuple(shape)) == (AXES[name], array.shape)
            assert total == pytest.approx(array.sum(), rel=1e-4, abs=1e-4)
    assert result["calls"][:2] == [["call"], [3]]


def test_h5py_shows_the_scales(path):
    write(path, full_stream())
    with h5py.File(path) as file:
        layer = file["modules/encoder.rnn"]
        update = layer["l0_reverse/update"]
        assert [axis.label for axis in update.dims] == ["step", "unit"]
        assert update.dims[0][0] == layer["step"]
        assert update.dims[1]["unit"][:].tolist() == [0, 1, 2]
        assert update.dims[1][0] == layer["l0/unit"] == layer["l0_reverse/unit"]
        assert layer["l1/input"].dims[1][0].shape == (6,)
        assert len(layer["step"]) == len(update) == 10
        assert len(layer["sequence"]) == len(layer["l0/initial"]) == 5
        assert len(file["call"]) == 10


def test_units_that_were_asked_for(path):
    import torch

    model = torch.nn.GRU(3, 8, 2)
    with grutrace.trace(model, path, units=[5, 2]):
        model(torch.randn(4, 2, 3))
    with xarray.open_dataset(path, group="modules/%/l1", engine="h5netcdf") as dataset:
        assert dataset.unit.values.tolist() == [5, 2]
        assert dataset.weight_hh.dims == ("version", "gate_unit", "previous_unit")
        assert dataset.weight_hh.shape == (1, 24, 8)
        with open_trace(path) as trace:
            column = trace["l1"].hidden[:, 1]
        np.testing.assert_array_equal(dataset.hidden.sel(unit=2), column)


def test_appending_extends_the_scales(path):
    for calls in (2, 3):
        stream = Stream(make_header(make_module()), seed=calls)
        for _ in range(calls):
            stream.call([4, 1])
        write(path, stream, mode="a")
    with xarray.open_dataset(path, group="modules/rnn/l0", engine="h5netcdf") as dataset:
        assert dict(dataset.sizes) == {
            "step": 25, "unit": 3, "feature": 2, "sequence": 10, "module_call": 5, "version": 2,
            "gate_unit": 9,
        }  # fmt: skip


def test_a_file_of_version_1_0_is_read_and_appended_to(path, monkeypatch):
    """It has no scales and gets none: they cannot be added while other processes may read."""
    with monkeypatch.context() as older:
        older.setattr(create, "create_scales", lambda *_: None)
        older.setattr("grutrace.storage.format.header.FORMAT_VERSION", (1, 0))
        stream = full_stream()
        write(path, stream)
    with h5py.File(path) as file:
        assert file.attrs["format_version"].tolist() == [1, 0]
        assert "call" not in file
    with open_trace(path) as trace:
        check_trace(trace, stream.header, stream.records)
    write(path, full_stream(), mode="a")
    with open_trace(path) as trace:
        assert trace.closed
        assert len(trace.calls) == 20
    with h5py.File(path) as file:
        assert file.attrs["format_version"].tolist() == [1, 0]


def test_scales_of_a_small_trace_are_small(path):
    """The size of one module's scales, compared with a nearly empty file."""
    write(path, Stream(make_header(make_module(hidden=64, width=64))))
    assert path.stat().st_size < 32_000


def test_scales_without_values_are_zero(path):
    write(path, full_stream())
    with h5py.File(path) as file:
        seen = 0
        for name in ("call", "modules/encoder.rnn/step", "modules/encoder.rnn/gate_unit"):
            assert len(file[name])
            assert not file[name][:].any()
            seen += file[name].id.get_create_plist().get_fill_time() == h5py.h5d.FILL_TIME_IFSET
        assert seen == 3
