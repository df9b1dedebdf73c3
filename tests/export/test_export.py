"""Tests of all export formats: names, paths, errors, memory, and the command."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import grutrace
from grutrace.__main__ import main
from grutrace.capture.trace_output import TraceOutput
from grutrace.export import variables
from grutrace.export.formats import FORMATS, export_trace
from grutrace.storage.open import open_sink
from tests import forks
from tests.export.expected import Expected, assert_as_expected
from tests.storage.streams import Stream, make_header, make_module

FOLDERS = ("zarr", "csv", "lstmvis")


@pytest.fixture(params=FORMATS)
def to(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def trace() -> Any:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(2, 3)})
    with grutrace.trace(model) as trace:
        model["rnn"](torch.randn(4, 2, 2))
    return trace


def test_formats_make_files_or_folders(trace, tmp_path, to) -> None:
    done = export_trace(trace, tmp_path / "out", to)
    assert (done.path, done.format, done.sites) == (tmp_path / "out", to, ("rnn.l0",))
    assert (tmp_path / "out").is_dir() == (to in FOLDERS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_overwritten(trace, tmp_path, to, there) -> None:
    path = tmp_path / "out"
    if there == "file":
        path.write_bytes(b"mine")
    elif there == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(grutrace.TraceFileError, match="out exists: choose another"):
        export_trace(trace, path, to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert there != "file" or path.read_bytes() == b"mine"


def test_a_path_that_cannot_be_written(trace, tmp_path, to) -> None:
    with pytest.raises(grutrace.TraceFileError, match="no folder"):
        export_trace(trace, tmp_path / "nowhere" / "out", to)


def test_a_failed_export_leaves_no_partial_file(trace, tmp_path, to) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_trace(trace, tmp_path / "out", to, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error(trace, tmp_path, to) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(grutrace.TraceFileError, match=r"out cannot be written: .*No space left"):
        export_trace(trace, tmp_path / "out", to, progress=full)
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from grutrace.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
for to in sys.argv[3:]:
    assert main(["export", sys.argv[1], "--to", to, "-o", sys.argv[2]]) == 2
"""


def test_a_full_disk_in_a_subprocess(tmp_path) -> None:
    """HDF5 cannot close a file that it could not write, and may abort the process."""
    layer, path = torch.nn.GRU(2, 64), tmp_path / "run.h5"
    with grutrace.trace(layer, path):
        layer(torch.randn(300, 1, 2))
    arguments = [str(path), str(tmp_path / "out"), *FORMATS]
    done = forks.run("-c", FULL, *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(FORMATS)
    assert all("out cannot be written: File too large" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_progress_ends_at_its_total(trace, tmp_path, to) -> None:
    seen = []
    export_trace(trace, tmp_path / "out", to, progress=lambda *both: seen.append(both))
    assert seen[-1] == (4 * 8, 4 * 8)


def test_missing_quantities_are_an_error(trace, tmp_path) -> None:
    for wrong, error, message in (
        ({"to": "xlsx"}, grutrace.OptionError, "expected one of npz, .* found 'xlsx'"),
        ({"record": "gates"}, grutrace.OptionError, "found 'gates'"),
        ({"record": "input"}, grutrace.NotRecordedError, "'input' was not recorded"),
        ({"sites": "decoder.*"}, grutrace.NotRecordedError, r"no site matches 'decoder\.\*'"),
    ):
        with pytest.raises(error, match=message):
            export_trace(trace, tmp_path / "out", **{"to": "npz", **wrong})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["npz", "netcdf", "zarr", "csv"])
def test_an_empty_trace(tmp_path, to) -> None:
    with grutrace.Tracer(torch.nn.GRU(2, 3), recording=False) as tracer:
        pass
    export_trace(tracer, tmp_path / "out", to)
    if to == "npz":
        with np.load(tmp_path / "out") as archive:
            assert archive["l0/update"].shape == (0, 3)
    if to == "netcdf":
        import netCDF4

        with netCDF4.Dataset(tmp_path / "out") as file:
            assert file.groups["l0"].variables["update"].shape == (0, 3)


@pytest.mark.measures
def test_memory_is_bounded(tmp_path, to, monkeypatch) -> None:
    """Some bytes of each block, not of all rows."""
    monkeypatch.setattr(variables, "BLOCK", 8 * 1024)
    for name in ("netcdf.CHUNK", "zarr_store.CHUNK", "csv_files.BLOCK"):
        monkeypatch.setattr(f"grutrace.export.{name}", 8 * 1024)
    stream = Stream(make_header(make_module("rnn", hidden=64, record=("update",))))
    sink = open_sink(tmp_path / "run.h5", stream.header)
    for _ in range(4):
        sink.append(stream.weights())
        sink.append(stream.call([500] * 2))
    sink.close()
    size = 4 * 1000 * 64 * 4
    with grutrace.open(tmp_path / "run.h5") as trace:
        export_trace(trace, tmp_path / "first", to, record="update")
        tracemalloc.start()
        export_trace(trace, tmp_path / "out", to, record="update")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < size / 3


@pytest.mark.parametrize("gathered", [1, 60, 10**9])
@pytest.mark.parametrize("block", [1, 40, 10**9])
def test_blocks_of_any_size(full, tmp_path, monkeypatch, block, gathered) -> None:
    """Sequences of one call are read as they are stored, others are gathered."""
    monkeypatch.setattr(variables, "BLOCK", block)
    monkeypatch.setattr(variables, "GATHER_BYTES", gathered)
    with grutrace.open(full) as trace:
        export_trace(trace, tmp_path / "out", "npz")
    with np.load(tmp_path / "out") as archive:
        assert_as_expected(Expected(full), lambda group, name: archive[f"{group}/{name}"])


def test_parts_of_a_run_are_one_trace(tmp_path, monkeypatch) -> None:
    for part in (1, 2):
        stamp = {"run": {"id": "a" * 32, "part": part}}
        output = partial(TraceOutput, extra_options=stamp)
        monkeypatch.setattr("grutrace.capture.tracer.TraceOutput", output)
        model = torch.nn.ModuleDict({f"m{part}": torch.nn.GRU(2, 3)})
        path = tmp_path / ("run.h5" if part == 1 else "run.part0002.h5")
        with grutrace.trace(model, path):
            model[f"m{part}"](torch.randn(4, 2))
    with grutrace.open(tmp_path / "run.h5") as trace:
        done = export_trace(trace, tmp_path / "out.npz", "npz")
        assert done.sites == ("m1.l0", "m2.l0")
        with np.load(tmp_path / "out.npz") as archive:
            np.testing.assert_array_equal(archive["m2.l0/update"], trace["m2.l0"].update)
            assert archive["calls/module"].tolist() == ["m1", "m2"]


@pytest.mark.parametrize(("to", "library"), [("netcdf", "h5netcdf"), ("zarr", "zarr")])
def test_a_missing_extra_is_named(trace, tmp_path, monkeypatch, to, library) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        grutrace.GrutraceError, match=rf'needs {library}, .*pip install .*"{library}>='
    ):
        export_trace(trace, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_importing_the_package_loads_no_export_library() -> None:
    code = (
        "import sys, grutrace.export.formats;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'zarr', 'h5netcdf', 'xarray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command(full, tmp_path, capsys) -> None:
    out = tmp_path / "out.nc"
    selection = ["--site", "encoder*", "--record", "update,hidden"]
    assert main(["export", str(full), "--to", "netcdf", "-o", str(out), *selection]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["export", str(full), "--to", "netcdf", "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("grutrace: ")
    assert "out.nc exists" in err
    for wrong in (["--to", "xlsx"], ["--to", "npz", "--site", "nothing"], []):
        assert main(["export", str(full), "-o", str(tmp_path / "other"), *wrong]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert main(["export", str(full), "--to", "lstmvis", "-o", str(tmp_path / "vis")]) == 0
    assert "no tokens" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.nc", "vis"]
