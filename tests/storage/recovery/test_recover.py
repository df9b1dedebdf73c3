"""Tests of recovery: an abandoned, truncated or damaged file becomes a file for any HDF5 tool."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

import grutrace
from grutrace.__main__ import main
from grutrace.errors import TraceFileError
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired
from grutrace.storage.open import open_trace
from grutrace.storage.recovery.recover import recover_file
from grutrace.storage.shards.run_parts import RunPart, part_path
from grutrace.storage.write.writer import Writer
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage import coded
from tests.storage.oracle import check_trace
from tests.storage.streams import Stream, full_stream, make_header, make_module

ROWS = "modules/rnn/l0/update"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "clean.h5"


def left_behind(path, records, header, uncommitted=()):
    """A file as a writer leaves it that dies after its last commit, with more on its way."""
    writer = Writer(path, header)
    for record in records:
        writer.write(record)
    writer.commit()
    for record in uncommitted:
        writer.write(record)
    writer._datasets.write_buffers()
    writer.abandon()


def coded_file(path, shape="stepwise", calls=2000, closed=True):
    writer = Writer(path, coded.HEADER)
    writer.write(coded.weights())
    for call in range(calls):
        writer.write(coded.block(call, shape))
        if call % 100 == 0:
            writer.commit()
    writer.commit()
    writer.close() if closed else writer.abandon()


def opens_anywhere(path):
    """With HDF5's defaults, in another process."""
    code = "import h5py, sys; print(len(h5py.File(sys.argv[1])['calls']))"
    return int(forks.run("-c", code, path, check=True).stdout)


def test_exactly_the_committed_rows_are_recovered(path, output):
    stream = full_stream()
    half = len(stream.records) - 4
    left_behind(path, stream.records[:half], stream.header, stream.records[half:])
    with pytest.raises(OSError, match="already open for write"):
        h5py.File(path)
    before = path.read_bytes()
    (report,) = recover_file(path, output)
    assert path.read_bytes() == before
    with open_trace(output) as trace:
        check_trace(trace, stream.header, stream.records[:half])
        assert trace.closed
        assert report.calls == len(trace.calls) == opens_anywhere(output)
    assert (report.closed, report.lost, report.reason, report.repaired) == (False, {}, "", 0)
    with h5py.File(path, "r", swmr=True) as old, h5py.File(output) as new:
        gone = {
            dataset_path: len(old[dataset_path]) - len(new[dataset_path])
            for dataset_path in report.dropped
        }
        assert report.dropped == gone
        assert sum(gone.values()) > 0
        # Nothing but what counts, not even hidden in the last chunk.
        assert len(new["calls"]) == new["committed"]["calls"] == report.calls
    assert sorted(os.listdir(path.parent)) == ["clean.h5", "run.h5"]


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_tools_that_read_netcdf_open_it(engine, path, output):
    xarray = pytest.importorskip("xarray")
    coded_file(path, calls=20, closed=False)
    options = {"group": "modules/rnn/l0", "engine": engine}
    with pytest.raises(OSError):  # noqa: PT011 - each tool has words of its own.
        xarray.open_dataset(path, **options)
    recover_file(path, output)
    with xarray.open_dataset(output, **options) as dataset:
        assert dict(dataset.sizes) | {"step": 160, "sequence": 8} == dict(dataset.sizes)
        rows = np.concatenate([coded.rows(call, 8) for call in range(20)])
        np.testing.assert_array_equal(dataset["update"], rows + 1)


def test_an_intact_file(path, output):
    stream = full_stream()
    writer = Writer(path, stream.header)
    for record in stream.records:
        writer.write(record)
    writer.close()
    (report,) = recover_file(path, output)
    assert (report.closed, report.lost, report.dropped) == (True, {}, {})
    with open_trace(output) as trace:
        check_trace(trace, stream.header, stream.records)


def test_a_file_without_a_call(path, output):
    left_behind(path, [], coded.HEADER)
    (report,) = recover_file(path, output)
    assert (report.calls, report.lost, report.dropped) == (0, {}, {})
    with open_trace(output) as trace:
        assert len(trace.calls) == 0


@pytest.mark.parametrize("compression", ["blosc2", "zstd"])
def test_a_compressed_file_stays_compressed(compression, tmp_path, output):
    import torch

    path = tmp_path / "run.h5"
    layer = torch.nn.GRU(4, 8)
    with grutrace.trace(layer, path, compression=compression) as tracer:
        for _ in range(20):
            layer(torch.randn(500, 16, 4))
            tracer.flush()
    recover_file(path, output)
    with h5py.File(path) as old, h5py.File(output) as new:
        dataset_path = "modules/%/l0/update"
        assert new[dataset_path]._filters == old[dataset_path]._filters != {}
        np.testing.assert_array_equal(new[dataset_path][:], old[dataset_path][:])
        assert new[dataset_path].dims[0][0].shape == (160_000,), "its dimension scale"
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (report,) = recover_file(cut, tmp_path / "cut-clean.h5")
    assert 0 < report.calls < 20
    with open_trace(path) as whole, open_trace(tmp_path / "cut-clean.h5") as part:
        rows = len(part["l0"].update)
        np.testing.assert_array_equal(part["l0"].update, whole["l0"].update[:rows])


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("shape", ["big", "stepwise"])
def test_a_truncated_file_is_recovered(shape, closed, path, output):
    coded_file(path, shape, {"big": 30, "stepwise": 1500}[shape], closed)
    whole = path.read_bytes()
    chance, recovered = random.Random(shape), []
    for size in sorted(chance.randrange(len(whole) // 5, len(whole)) for _ in range(6)):
        path.write_bytes(whole[:size])
        if closed:
            with pytest.raises(OSError, match="truncated file"):
                h5py.File(path)
        (report,) = recover_file(path, output)
        with open_trace(output) as trace:
            assert coded.check_trace(trace) == report.calls
        plain = PlainTrace(output)
        coded.check_plain(plain)
        assert plain.closed
        assert report.lost["calls"] + report.calls == {"big": 30, "stepwise": 1500}[shape]
        assert "item" in report.reason
        recovered.append(report.calls)
        output.unlink()
    assert recovered == sorted(recovered)
    assert recovered[-1] > 2 * recovered[0]


def test_rows_that_a_bad_disk_cannot_read(path, output, monkeypatch):
    """Reading them fails although they lie within the file. The rows before them are kept."""
    coded_file(path, calls=1500)
    with h5py.File(path) as file:
        bad = file[ROWS].id.get_chunk_info(7).byte_offset
    read = os.preadv

    def preadv(descriptor, buffers, offset):
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(5, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr("os.preadv", preadv)
    (report,) = recover_file(path, output)
    assert report.reason == f"{ROWS}: item 7168 cannot be read"
    assert report.calls == 7168 // 8
    with open_trace(output) as trace:
        assert coded.check_trace(trace) == report.calls


def test_counts_beyond_the_rows(path, output):
    coded_file(path, calls=100)
    with h5py.File(path, "r+") as file:
        file["modules/rnn/l0/hidden"].resize(50 * 8, 0)
    (report,) = recover_file(path, output)
    assert (report.calls, report.lost) == (50, {"calls": 50})
    assert report.reason == "modules/rnn/l0/hidden: item 400 is missing"
    with open_trace(output) as trace:
        assert coded.check_trace(trace) == 50


def test_data_of_lost_calls_is_dropped(path, output):
    stream = Stream(make_header(make_module(hidden=16)))
    for call in range(300):
        stream.call([9, 9], tag=f"tag {call}")
        stream.annotate(2 * call, "tokens", ("a", f"b{call}"))
    writer = Writer(path, stream.header)
    for record in stream.records:
        writer.write(record)
    writer.close()
    with h5py.File(path, "r+") as file:
        file["modules/rnn/l0/reset"].resize(100 * 18, 0)
    (report,) = recover_file(path, output)
    assert report.calls == 100
    with open_trace(output) as trace:
        assert trace.calls["tag"].tolist() == [f"tag {call}" for call in range(100)]
        assert trace["rnn.l0"].sequence(198).tokens[:2] == ["a", "b99"]
        assert report.lost["annotations"] == 200


def _header_of(file, dataset_path):
    """Where the object header of a dataset is."""
    return h5py.h5o.get_info(file[dataset_path].id).addr


def test_a_half_written_header(path, output):
    """After a power loss, its length is new and its checksum is old."""
    coded_file(path, calls=100)
    before = path.read_bytes()
    with h5py.File(path, "r+") as file:
        file[ROWS].resize(2000, 0)
        header = _header_of(file, ROWS)
    after = bytearray(path.read_bytes())
    changed = [n for n in range(header, header + 512) if before[n] != after[n]]
    (length, *_), checksum = changed, changed[-1]
    assert checksum - length > 8
    path.write_bytes(bytes(after[: length + 8]) + before[length + 8 : len(before)])
    with h5py.File(path) as file, pytest.raises(KeyError, match="checksum"):
        file[ROWS]
    (report,) = recover_file(path, output)
    assert (report.calls, report.lost, report.repaired) == (100, {}, 1)
    with open_trace(output) as trace:
        assert coded.check_trace(trace) == 100


DAMAGES = {
    "no HDF5 file": (lambda _: b"text", "superblock.*the signature of HDF5, found other bytes"),
    "the superblock": (lambda data: data[:36] + b"\xff" + data[37:], "superblock.*checksum"),
    "cut within the headers": (lambda data: data[:3000], "cannot be read"),
    "cut before the first rows": (lambda data: data[: len(data) // 50], "calls: expected at least"),
    "not of a trace": (None, "is not a grutrace trace .it is another HDF5 file."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_cannot_be_read_is_one_clear_error(damage, path, output):
    change, message = DAMAGES[damage]
    if change is None:
        with h5py.File(path, "w", libver=("v110", "v110")) as file:
            file["x"] = 1
    else:
        coded_file(path, calls=300)
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TraceFileError, match=message) as caught:
        recover_file(path, output)
    assert str(path) in str(caught.value)
    assert os.listdir(path.parent) == ["run.h5"]


def test_nothing_is_overwritten(path, output):
    coded_file(path, calls=3)
    output.write_text("precious")
    with pytest.raises(TraceFileError, match=r"clean\.h5 exists: choose another output path"):
        recover_file(path, output)
    with pytest.raises(TraceFileError, match=r"run\.h5 exists"):
        recover_file(path, path)
    with pytest.raises(TraceFileError, match="no folder"):
        recover_file(path, path.parent / "none" / "clean.h5")
    with pytest.raises(TraceFileError, match="does not exist"):
        recover_file(path.with_name("other.h5"), path.with_name("clean2.h5"))
    assert output.read_text() == "precious"
    assert sorted(os.listdir(path.parent)) == ["clean.h5", "run.h5"]


def test_a_file_that_changes_during_recovery_is_refused(path, output):
    coded_file(path, calls=500, closed=False)

    def write(done, total):
        os.utime(path, ns=(1, 1))

    with pytest.raises(TraceFileError, match="its writer is still running"):
        recover_file(path, output, write)
    assert os.listdir(path.parent) == ["run.h5"]


def test_the_parts_of_a_run(path, output):
    header = make_header(make_module(hidden=4))
    for number in (1, 2, 3):
        options = {**header.options, **RunPart("a" * 32, number).options}
        stream = Stream(make_header(make_module(hidden=4), options=options), seed=number)
        for _ in range(number):
            stream.call([3, 2])
        left_behind(part_path(path, number), stream.records, stream.header)
    with grutrace.open(path) as trace:
        expected = trace.sites, trace.calls["steps"].tolist()
    report = recover_file(path, output)
    assert [part.path for part in report] == [part_path(output, number) for number in (1, 2, 3)]
    assert [part.calls for part in report] == [1, 2, 3]
    with grutrace.open(output) as trace:
        assert (trace.sites, trace.calls["steps"].tolist()) == expected
        assert trace.closed
    # A part alone.
    (alone,) = recover_file(part_path(path, 2), path.with_name("alone.h5"))
    assert alone.calls == 2
    # One that is lost is said to be.
    part_path(path, 2).unlink()
    with pytest.raises(TraceFileError, match=r"part 2 of its run is missing"):
        recover_file(path, path.with_name("again.h5"))
    # One that is damaged leaves nothing behind.
    part_path(path, 3).write_bytes(b"\x89HDF")
    part_path(path, 2).write_bytes(b"\x89HDF")
    before = sorted(os.listdir(path.parent))
    with pytest.raises(TraceFileError, match=r"part0002"):
        recover_file(path, path.with_name("again.h5"))
    assert sorted(os.listdir(path.parent)) == before


@pytest.mark.measures
def test_memory_is_bounded(path, output):
    """A file of 400 MB with 120 MB to spare."""
    writer = Writer(path, coded.HEADER)
    writer.write(coded.weights())
    for call in range(400):
        writer.write(coded.block(call, "big"))
    writer.commit()
    writer.abandon()
    size = path.stat().st_size
    assert size > 400e6
    code = f"""
import resource
import grutrace.storage.recovery.recover as recovery
grown = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = grown()
recovery.recover_file({str(path)!r}, {str(output)!r})
print(grown() - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code]))
    assert grown < 120e6
    with open_trace(output) as trace:
        assert coded.check_trace(trace) == 400


def test_a_full_disk_leaves_nothing_behind(path, output):
    coded_file(path, calls=500)
    code = f"""
import resource, signal
from grutrace.storage.recovery.recover import recover_file
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
recover_file({str(path)!r}, {str(output)!r})
"""
    done = forks.run("-c", code)
    assert "TraceFileError" in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert os.listdir(path.parent) == ["run.h5"]


def test_the_checksum_equals_hdf5s(path):
    """A superblock written by HDF5 is accepted, and HDF5 accepts a changed one."""
    coded_file(path, calls=3, closed=False)
    with RepairedFile(path) as file, open_repaired(file, 0) as hdf5:
        assert len(hdf5["calls"]) == 3


def test_the_command(path, output, capsys):
    stream = full_stream()
    left_behind(path, stream.records[:-4], stream.header, stream.records[-4:])
    assert main(["recover", str(path), "-o", str(output)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{output}: ")
    assert "left behind by its writer" in said
    assert "were not committed" in said
    assert main(["recover", str(path), "-o", str(output)]) == 2
    assert "exists: choose another output path" in capsys.readouterr().err
    assert main(["recover", str(output), "-o", str(path.with_name("2.h5")), "--json"]) == 0
    (about,) = json.loads(capsys.readouterr().out)
    assert (about["lost"], about["dropped"], about["closed"]) == ({}, {}, True)
    cut = path.with_name("cut.h5")
    coded_file(path.with_name("coded.h5"), calls=500)
    shutil.copy(path.with_name("coded.h5"), cut)
    os.truncate(cut, cut.stat().st_size // 2)
    assert main(["recover", str(cut), "-o", str(path.with_name("3.h5"))]) == 1
    assert "lost of what was committed: " in capsys.readouterr().out
    assert main(["verify", str(cut)]) == 2
    assert main(["recover", str(path.with_name("none.h5")), "-o", "x.h5"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_file_sizes_are_unlimited_by_default():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
