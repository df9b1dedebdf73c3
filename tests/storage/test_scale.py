"""The number of operations that grow with a trace. `benchmarks --only scale` measures times."""

from __future__ import annotations

import h5py
import pytest

import grutrace
from benchmarks import long_traces, scale
from grutrace.__main__ import main
from grutrace.storage.hdf5 import safe_access, safe_open
from grutrace.storage.read import sequence_index
from tests import forks
from tests.storage.streams import make_module


@pytest.fixture
def counted(monkeypatch):
    """How often objects and files are opened, and indices made."""
    counts = {"objects": 0, "files": 0, "indices": 0}

    def count(owner, name, key):
        original = getattr(owner, name)

        def counting(*arguments, **named):
            counts[key] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)

    count(safe_access.h5o, "open", "objects")
    count(safe_open.h5f, "open", "files")
    count(sequence_index.SequenceIndex, "__init__", "indices")
    return counts


def objects(path):
    """Groups and datasets of a file."""
    results = []
    with h5py.File(path) as file:
        file.visit(results.append)
    return len(results)


@pytest.mark.parametrize("modules", [1, 12])
def test_each_object_is_opened_about_once(tmp_path, counted, modules):
    """The cost of opening grows linearly with the number of sites."""
    path = tmp_path / "run.h5"
    scale.write_many_sites(path, modules)
    count = objects(path)
    counted.update(objects=0, files=0)
    with grutrace.open(path) as trace:
        assert counted["files"] == 1
        assert count <= counted["objects"] <= 1.6 * count
        counted["objects"] = 0
        for name in trace.sites:
            assert trace[name].sequence(1).update.shape == (10, 16)
        assert counted["objects"] == 0


def test_info_opens_a_file_once(tmp_path, counted, capsys):
    path = tmp_path / "run.h5"
    scale.write_many_sites(path, 8)
    count = objects(path)
    counted.update(objects=0, files=0)
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.count("GRU(16, 16)") == 16
    assert counted["files"] == 1
    assert counted["objects"] <= 1.6 * count


#: In a process of its own, which HDF5 may take down.
MANY_SITES = """
import sys
from pathlib import Path
from grutrace.storage.write import create
from benchmarks.scale import write_many_sites

if sys.argv[2] == "left alone":
    create._keep_metadata = lambda access: None
write_many_sites(Path(sys.argv[1]), 300)
"""


def in_another_process(path, how):
    return forks.run("-c", MANY_SITES, path, how)


def test_hundreds_of_sites_are_written(tmp_path):
    path = tmp_path / "run.h5"
    done = in_another_process(path, "as ever")
    assert done.returncode == 0, done.stderr
    with grutrace.open(path) as trace:
        assert len(trace.sites) == 600
        for name in trace.sites:
            assert (trace[name].update[:] == 0.5).all()


@pytest.mark.skipif(h5py.version.hdf5_version != "2.0.0", reason="seen with this HDF5")
def test_control_hdf5_with_its_defaults_fails(tmp_path):
    done = in_another_process(tmp_path / "run.h5", "left alone")
    assert "flush dependency" in done.stderr
    assert done.returncode


@pytest.mark.parametrize("calls", [10, 2000])
def test_the_sequence_index_is_built_once(tmp_path, counted, calls):
    path = tmp_path / "run.h5"
    long_traces.write(path, make_module("rnn", hidden=4, record=("hidden",)), 2, 3, calls)
    with grutrace.open(path) as trace:
        site = trace["rnn.l0"]
        counted.update(objects=0, indices=0)
        for number in range(0, len(site), 7):
            assert site.sequence(number).hidden.shape == (2, 4)
        assert counted["indices"] == 1
        assert counted["objects"] == 0
