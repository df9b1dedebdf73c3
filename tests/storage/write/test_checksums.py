"""Rows with checksums: a bit that has flipped is an error in every reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
import torch
import xarray
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.storage.shards.merge import merge_shards
from tests.golden.make import killed
from tests.golden.runs import GOLDENS

GROUP = "modules/%/l0"


def traced(path: Path, **options: object) -> np.ndarray:
    torch.manual_seed(0)
    layer = nn.GRU(4, 16)
    with grutrace.trace(layer, path, **options) as tracer:
        layer(torch.randn(30, 2, 4))
        return np.asarray(tracer["l0"].update)


def flip(path: Path, row: bytes) -> None:
    """Flip one bit of a row, wherever the file has it."""
    content = bytearray(path.read_bytes())
    assert content.count(row) == 1
    content[content.index(row) + 5] ^= 1
    path.write_bytes(content)


def read_ours(path: Path) -> np.ndarray:
    with grutrace.open(path) as trace:
        return np.asarray(trace["l0"].update)


def read_h5py(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file[f"{GROUP}/update"][:]


def read_netcdf(path: Path) -> np.ndarray:
    with netCDF4.Dataset(path) as file:
        return np.asarray(file[f"{GROUP}/update"][:])


def read_xarray(path: Path) -> np.ndarray:
    with xarray.open_dataset(path, group=GROUP, engine="h5netcdf") as dataset:
        return dataset["update"].values


READERS = {
    "grutrace": read_ours,
    "h5py": read_h5py,
    "netCDF4": read_netcdf,
    "xarray": read_xarray,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compression", [None, "gzip", "blosc2"])
def test_a_flipped_bit_is_an_error_in_every_reader(
    reader: str, compression: str | None, tmp_path: Path
) -> None:
    path, read = tmp_path / "run.h5", READERS[reader]
    expected = traced(path, checksums=True, compression=compression)
    if compression == "blosc2" and reader == "netCDF4":
        pytest.skip("netCDF-C has no such filter")
    np.testing.assert_array_equal(read(path), expected)
    with h5py.File(path) as file:
        _, _, offset, size = (file[f"{GROUP}/update"].id.get_chunk_info(0)[i] for i in (0, 1, 2, 3))
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises((OSError, RuntimeError)) as caught:
        read(path)
    if reader == "grutrace":
        assert str(path) in str(caught.value)
        assert "bytes of a chunk have changed" in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_control_without_checksums_nobody_notices(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    expected = traced(path)
    flip(path, expected[7].tobytes())
    found = READERS[reader](path)
    assert (found != expected).sum() == 1


def test_only_rows_have_checksums_and_the_file_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.h5"
    traced(path, checksums=True, record=("update", "input"))
    with h5py.File(path) as file:
        has = {name: file[f"{GROUP}/{name}"].fletcher32 for name in file[GROUP] if name != "unit"}
    assert {name for name, on in has.items() if on} == {"update", "input"}
    with grutrace.open(path) as trace:
        assert trace.options["checksums"] is True
    assert main(["info", str(path)]) == 0
    assert "rows have checksums" in capsys.readouterr().out


def test_appending_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    traced(path, checksums=True)
    second = traced(path, mode="a")
    np.testing.assert_array_equal(read_ours(path), second)
    with h5py.File(path) as file:
        assert file[f"{GROUP}/update"].fletcher32


def test_copies_of_shards_keep_them(tmp_path: Path) -> None:
    expected = [traced(tmp_path / "run.h5", checksums=True, shard=(rank, 2)) for rank in range(2)]
    paths = sorted(tmp_path.glob("run.rank*.h5"))
    merge_shards(paths, tmp_path / "all.h5", copy=True)
    np.testing.assert_array_equal(read_ours(tmp_path / "all.h5"), np.concatenate(expected))
    with h5py.File(tmp_path / "all.h5") as file:
        assert file[f"{GROUP}/update"].fletcher32


def test_rows_of_a_killed_writer_are_there(tmp_path: Path) -> None:
    golden = GOLDENS["deferred"]
    killed(replace(golden, options={**golden.options, "checksums": True}), tmp_path / "run.h5")
    with grutrace.open(tmp_path / "run.h5") as trace:
        assert not trace.closed
        assert len(trace["rnn.l0"].hidden[:]) == 8


def test_without_a_file_they_are_refused() -> None:
    with pytest.raises(grutrace.OptionError, match="checksums: expected False without a path"):
        grutrace.Tracer(nn.GRU(2, 3), checksums=True)
