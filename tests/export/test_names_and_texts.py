"""Tests of names that differ only in case, and of texts with NUL: exported or refused."""

from __future__ import annotations

import csv
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import netCDF4
import numpy as np
import pytest
import torch
import xarray
import yaml
import zarr
from torch import nn

import grutrace
from grutrace.export import zarr_store
from grutrace.export.formats import export_trace
from grutrace.export.portability import file_names, ignores_case

PATHS = ("A", "a", "b")
TOKENS = ["x", "\0", "y\0", "x\0y"]


@pytest.fixture
def trace(tmp_path: Path) -> Any:
    """Two layers, and two labels, whose names differ only in case."""
    torch.manual_seed(0)
    model = nn.ModuleDict({path: nn.GRU(3, 4) for path in PATHS})
    labels = {"Pos": [[1, 2, 3, 4]], "pos": [[5, 6, 7, 8]]}
    tracer = grutrace.Tracer(model, recording=False)
    with tracer, tracer.recording(labels=labels):
        for layer in model.values():
            layer(torch.randn(4, 1, 3))
    return tracer


def with_texts(tokens: list[str], tag: str | None = None) -> Any:
    layer = nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, recording=False)
    with tracer, tracer.recording(tag, tokens=[tokens]):
        layer(torch.randn(len(tokens), 1, 3))
    return tracer


def in_xarray(path: Path, site: str) -> Any:
    # Without dask, whose threads stay.
    return xarray.open_zarr(path, group=site, chunks=None)


@pytest.mark.parametrize("to", ["npz", "netcdf", "zarr", "xarray"])
def test_names_that_differ_only_in_case_are_kept(trace, tmp_path, to) -> None:
    path = tmp_path / "out"
    export_trace(trace, path, "zarr" if to == "xarray" else to)
    with ExitStack() as stack:
        archive = stack.enter_context(np.load(path)) if to == "npz" else {}
        file = stack.enter_context(netCDF4.Dataset(path)) if to == "netcdf" else None
        for site in trace.sites:
            expected = {"hidden": trace[site].hidden, "label_Pos": [1, 2, 3, 4]}
            for name, values in (expected | {"label_pos": [5, 6, 7, 8]}).items():
                result = {
                    "npz": lambda s=site, n=name: archive[f"{s}/{n}"],
                    "netcdf": lambda s=site, n=name: file[s][n][:],
                    "zarr": lambda s=site, n=name: zarr.open(path)[s][n][:],
                    "xarray": lambda s=site, n=name: in_xarray(path, s)[n].values,
                }[to]()
                np.testing.assert_array_equal(result, values)


def test_control_without_ordered_metadata_zarr_finds_half(trace, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zarr_store, "_sort_metadata", lambda _: None)
    export_trace(trace, tmp_path / "out", "zarr")
    store = zarr.open(tmp_path / "out")
    assert not all("hidden" in store[site] for site in trace.sites)


def test_csv_and_lstmvis_files_differ_without_case(trace, tmp_path) -> None:
    for to in ("csv", "lstmvis"):
        export_trace(trace, tmp_path / to, to)
        names = [str(path.relative_to(tmp_path)) for path in (tmp_path / to).rglob("*")]
        assert len({name.casefold() for name in names}) == len(names)
    results = {}
    for file in (tmp_path / "csv").glob("*.hidden.csv"):
        rows = list(csv.DictReader(file.read_text().splitlines()))
        results[unquote(file.name.removesuffix(".hidden.csv"))] = [
            [np.float32(row[f"unit_{unit}"]) for unit in range(4)] for row in rows
        ]
    assert set(results) == set(trace.sites)
    for site in trace.sites:
        np.testing.assert_array_equal(results[site], trace[site].hidden)
    projects = (tmp_path / "lstmvis").rglob("lstm.yml")
    assert {yaml.safe_load(project.read_text())["name"].split()[-1] for project in projects} == set(
        PATHS
    )


def test_only_names_that_clash_are_escaped() -> None:
    names = ["A.l0", "a.l0", "Encoder.l0", "%4E.aB", "%4E.Ab", "%4E.AB"]
    result = file_names(names)
    assert result["A.l0"] == "%41.l0"
    assert (result["a.l0"], result["Encoder.l0"]) == ("a.l0", "Encoder.l0")
    assert result["%4E.aB"] == "%4E.a%42"
    assert len({name.casefold() for name in result.values()}) == len(names)
    assert [unquote(result[name]) for name in names] == [unquote(name) for name in names]


def test_a_file_system_that_ignores_case_is_refused_by_zarr(trace, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zarr_store, "ignores_case", lambda *_: True)
    with pytest.raises(grutrace.TraceFileError, match=r"'A\.l0' and 'a\.l0', which differ only"):
        export_trace(trace, tmp_path / "out", "zarr")
    assert not list(tmp_path.iterdir())
    export_trace(trace, tmp_path / "one", "csv", sites="A.l0")


def test_the_file_system_is_checked_for_case(tmp_path) -> None:
    (tmp_path / ".zgroup").write_text("{}")
    assert not ignores_case(tmp_path, ".zgroup")
    # As on a file system that ignores case: the other spelling is there as well.
    (tmp_path / ".ZGROUP").write_text("{}")
    assert ignores_case(tmp_path, ".zgroup")


def test_texts_with_nul_are_kept(tmp_path) -> None:
    trace = with_texts(TOKENS, tag="run\0")
    for to in ("zarr", "csv", "lstmvis"):
        export_trace(trace, tmp_path / to, to)
    store = zarr.open(tmp_path / "zarr")
    assert list(store["l0"]["token"][:]) == TOKENS
    assert list(store["calls"]["tag"][:]) == ["run\0"]
    with (tmp_path / "csv" / "l0.hidden.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["token"] for row in rows] == TOKENS
    assert {row["tag"] for row in rows} == {"run\0"}
    words = (tmp_path / "lstmvis" / "model" / "words.dict").read_text().splitlines()
    assert [line.split(" ")[0] for line in words] == TOKENS


@pytest.mark.parametrize(
    ("to", "tokens", "tag", "message"),
    [
        ("npz", ["x", "y\0"], None, r"npz .* ends with NUL, found 'y\\x00' in l0/token, item 1"),
        ("npz", ["x"], "t\0", r"npz .* found 't\\x00' in calls/tag, item 0"),
        ("netcdf", ["x\0y", "x"], None, r"netcdf .* found 'x\\x00y' in l0/token, item 0: export"),
        ("netcdf", ["x"], "\0t", r"netcdf .* found '\\x00t' in calls/tag, item 0"),
    ],
)
def test_texts_with_nul_are_refused_where_they_would_change(
    to, tokens, tag, message, tmp_path
) -> None:
    with pytest.raises(grutrace.OptionError, match=message):
        export_trace(with_texts(tokens, tag), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_npz_keeps_nul_within_a_text(tmp_path) -> None:
    export_trace(with_texts(["x\0y", "\0x"]), tmp_path / "out", "npz")
    with np.load(tmp_path / "out") as archive:
        assert archive["l0/token"].tolist() == ["x\0y", "\0x"]


def test_control_numpy_cuts_off_nul_at_the_end() -> None:
    assert np.array(["y\0"], "<U2").tolist() == ["y"]


def test_a_path_with_nul_is_refused_by_netcdf(tmp_path) -> None:
    model = nn.ModuleDict({"a\0b": nn.GRU(3, 4)})
    with grutrace.trace(model) as trace:
        model["a\0b"](torch.randn(2, 1, 3))
    with pytest.raises(grutrace.OptionError, match=r"netcdf .*'a\\x00b"):
        export_trace(trace, tmp_path / "out", "netcdf")
    export_trace(trace, tmp_path / "zarr", "zarr")
    assert zarr.open(tmp_path / "zarr")["a%00b.l0"].attrs["module"] == "a\0b"


@pytest.mark.parametrize("to", ["netcdf", "zarr"])
def test_attributes_of_calls_are_described(trace, tmp_path, to) -> None:
    """The time of a call is not that of a step."""
    path = tmp_path / "out"
    export_trace(trace, path, to)
    if to == "netcdf":
        with netCDF4.Dataset(path) as file:
            of_calls = {
                name: variable.long_name for name, variable in file["calls"].variables.items()
            }
            of_step = file["A.l0"]["time"].long_name
            attributes = file["calls"]["time"].ncattrs()
    else:
        metadata = json.loads((path / ".zmetadata").read_text())["metadata"]
        of_calls = {
            key.split("/")[1]: attributes["long_name"]
            for key, attributes in metadata.items()
            if key.startswith("calls/") and key.count("/") == 2 and key.endswith(".zattrs")
        }
        of_step = metadata["A.l0/time/.zattrs"]["long_name"]
        attributes = metadata["calls/time/.zattrs"]
    assert "seconds since 1970-01-01" in of_calls["time"]
    assert "step" in of_step
    assert of_calls["time"] != of_step
    # Every column of the table says more than its own name.
    assert all(len(text.split()) > 2 for text in of_calls.values())
    # xarray would turn a variable with units of time into dates.
    assert "units" not in attributes
