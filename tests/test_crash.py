"""A training run killed with SIGKILL at random moments leaves every acknowledged row behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

import grutrace
from grutrace.analysis.verification import verify

TRIES = 20
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.crash_victim", str(folder), str(TRIES)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return folder


def acknowledged(folder: Path, number: int) -> int:
    return int.from_bytes((folder / f"{number}.calls").read_bytes(), "little")


@pytest.mark.parametrize("number", range(TRIES))
def test_what_was_acknowledged_is_there_and_whole(folder, number) -> None:
    path = folder / f"{number}.h5"
    if not acknowledged(folder, number) and not path.exists():
        return  # killed before the file was made
    with grutrace.open(path) as trace:
        assert len(trace.calls) >= acknowledged(folder, number)
        assert not trace.closed
        # Every row that counts is consistent with its weights, input and previous state.
        for found in verify(trace):
            assert found.check == "gates"
            assert found.holds, found
            assert found.steps == trace[found.site].update.shape[0]


def _fullest(folder: Path) -> int:
    return max(range(TRIES), key=lambda number: acknowledged(folder, number))


def test_some_tries_had_something_to_lose(folder) -> None:
    assert sum(acknowledged(folder, number) > 0 for number in range(TRIES)) > TRIES // 2


def test_control_a_torn_row_would_be_found(folder) -> None:
    """A file that claims more rows than were committed does not hold."""
    torn = folder / "torn.h5"
    shutil.copy(folder / f"{_fullest(folder)}.h5", torn)
    with h5py.File(torn, "r", swmr=True) as file:
        place = file["modules/decoder/cell/update"].id.get_chunk_info(0).byte_offset
    with torn.open("r+b") as file:
        file.seek(place)
        file.write(bytes(4))
    with grutrace.open(torn) as trace:
        assert [found.site for found in verify(trace) if not found.holds] == ["decoder.cell"]


def test_plain_hdf5_refuses_a_file_that_grutrace_opens(folder) -> None:
    with pytest.raises(OSError, match="already open for write"):
        h5py.File(folder / f"{_fullest(folder)}.h5", "r")
