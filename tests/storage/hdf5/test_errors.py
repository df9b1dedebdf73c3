"""Errors of HDF5 and the system become plain messages that name the user's file."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.__main__ import main
from grutrace.export import output_file
from grutrace.export.formats import FORMATS, export_trace
from grutrace.storage.hdf5 import atomic_write
from grutrace.storage.hdf5.errors import short_message

#: Words of HDF5's and h5py's own, and a part of the name of a temporary file.
RAW = ("Unable to", "synchronously", "sblock", "errno", "Errno", ".new-", "VLEN", "o_flags")


def assert_plain(message: str, path: Path) -> None:
    assert str(path) in message
    assert "\n" not in message
    assert not [word for word in RAW if word in message], message


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path, layer = tmp_path / "run.h5", nn.GRU(2, 3)
    with grutrace.trace(layer, path):
        layer(torch.randn(5, 2, 2))
    return path


def test_a_truncated_file_reports_its_size(run: Path) -> None:
    size = run.stat().st_size
    os.truncate(run, size // 2)
    # The control: what HDF5 itself says of it.
    with pytest.raises(OSError, match="sblock"):
        h5py.File(run)
    with pytest.raises(grutrace.TraceFileError) as caught:
        grutrace.open(run)
    assert f"the file is truncated to {size // 2} of {size} bytes" in str(caught.value)
    assert_plain(str(caught.value), run)


def test_a_file_that_a_viewer_left_open_names_recover(run: Path, tmp_path: Path) -> None:
    """As a viewer that opens a file for writing, and is killed."""
    viewer = "import h5py, os, sys; file = h5py.File(sys.argv[1], 'r+'); os._exit(0)"
    subprocess.run([sys.executable, "-c", viewer, str(run)], check=True)
    # The control: what HDF5 itself says of it.
    with pytest.raises(OSError, match="already open for"):
        h5py.File(run, "r", swmr=True)
    with pytest.raises(grutrace.TraceFileError, match="grutrace recover") as caught:
        grutrace.open(run)
    assert "another program opened it for writing" in str(caught.value)
    assert_plain(str(caught.value), run)
    assert main(["recover", str(run), "-o", str(tmp_path / "good.h5")]) == 0
    with grutrace.open(tmp_path / "good.h5") as trace:
        assert trace["l0"].update.shape == (10, 3)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.8])
def test_a_file_damaged_anywhere(run: Path, share: float) -> None:
    data = bytearray(run.read_bytes())
    first = max(12, int(share * len(data)))
    data[first : first + 4096] = os.urandom(min(4096, len(data) - first))
    run.write_bytes(data)
    try:
        with grutrace.open(run) as trace:
            np.asarray(trace["l0"].hidden)
    except grutrace.TraceFileError as error:
        assert_plain(str(error), run)


def test_a_file_that_another_program_writes_to(run: Path) -> None:
    with h5py.File(run, "r+"), pytest.raises(grutrace.TraceFileError) as caught:
        grutrace.Tracer(nn.GRU(2, 3), run, mode="a")
    assert_plain(str(caught.value), run)


def test_a_name_with_nul_is_refused_in_plain_words(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a\0b": nn.GRU(2, 3)})
    with pytest.raises(grutrace.TraceFileError, match="NUL character") as caught:
        grutrace.Tracer(model, tmp_path / "run.h5")
    assert_plain(str(caught.value), tmp_path / "run.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_export_names_the_requested_file(run, tmp_path, to, monkeypatch):
    """The message does not name the temporary file."""

    def denying(function: Any) -> Any:
        def denied(path: Any, *rest: Any, **options: Any) -> Any:
            if ".new-" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *rest, **options)

        return denied

    with grutrace.open(run) as trace, monkeypatch.context() as patch:
        patch.setattr(io, "open", denying(io.open))
        patch.setattr(Path, "mkdir", denying(Path.mkdir))
        patch.setattr(output_file, "DeferredErrorFile", denying(output_file.DeferredErrorFile))
        with pytest.raises(grutrace.TraceFileError) as caught:
            export_trace(trace, tmp_path / "out", to)
    assert str(caught.value) == f"{tmp_path / 'out'} cannot be written: Permission denied"


def test_a_file_that_cannot_be_renamed_is_named_by_its_target(tmp_path, monkeypatch) -> None:
    def denied(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path), None, str(target))

    new = tmp_path / "run.h5.new-12345678"
    new.touch()
    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(grutrace.TraceFileError) as caught:
        atomic_write.publish(new, tmp_path / "run.h5", "overwrite")
    monkeypatch.undo()
    assert str(caught.value) == f"{tmp_path / 'run.h5'} cannot be created: Permission denied"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(
                "[Errno 11] Unable to synchronously open file (unable to lock file, errno = 11, "
                "error message = 'Resource temporarily unavailable')"
            ),
            "another program has the file open for writing",
        ),
        (
            OSError(
                "Can't write data (file write failed: time = Mon Nov 30 01:02:03 2026\n, filename "
                "= 'run.h5.new-1', errno = 28, error message = 'No space left on device', buf = 0x)"
            ),
            "No space left on device",
        ),
        (
            OSError("Unable to synchronously open object (wrong fractal heap header signature)"),
            "HDF5 reports 'wrong fractal heap header signature'",
        ),
        (
            KeyError("Unable to synchronously open object (object 'x' doesn't exist)"),
            "HDF5 reports \"object 'x' doesn't exist\"",
        ),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_messages_of_hdf5_become_plain(error: Exception, said: str) -> None:
    assert short_message(error) == said
