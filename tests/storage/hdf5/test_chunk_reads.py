"""Rows that are read by their position in the file are those that HDF5 reads."""

from __future__ import annotations

import os
import threading

import h5py
import numpy as np
import pytest

from grutrace.storage.hdf5 import chunk_reads
from grutrace.storage.hdf5.chunk_reads import find_rows
from grutrace.storage.read.lazy_rows import FileRows

ROWS, WIDTH, CHUNK = 5000, 64, 300

DATA = np.random.default_rng(0).random((ROWS, WIDTH), np.float32)

pytestmark = pytest.mark.skipif(
    not hasattr(os, "preadv") or not hasattr(h5py.h5d.DatasetID, "chunk_iter"),
    reason="the system does not read by position, or HDF5 does not list chunks",
)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(chunk_reads, "SMALLEST", 1)
    monkeypatch.setattr("grutrace.storage.read.lazy_rows.SMALLEST", 1)


def write(path, dtype=np.float32, chunks=(CHUNK, WIDTH), file_options=None, **options):
    with h5py.File(path, "w", **(file_options or {})) as file:
        dataset = file.create_dataset("rows", DATA.shape, dtype, chunks=chunks, **options)
        # The chunks of two datasets alternate, and are not in order.
        other = file.create_dataset("other", DATA.shape, dtype, chunks=(CHUNK, WIDTH))
        for start in (1200, 0, 600, *range(1800, ROWS, 600)):
            dataset[start : start + 600] = DATA[start : start + 600]
            other[start : start + 600] = -1


def read(dataset, start, stop, dtype=np.float32):
    """Rows that are read without HDF5; None if only HDF5 can read them."""
    pieces = find_rows(dataset, start, stop, np.dtype(dtype))
    if pieces is None:
        return None
    target = np.full((stop - start, WIDTH), np.nan, dtype)
    with pieces:
        return target if pieces.read_into(target) else None


@pytest.mark.parametrize("start", [0, 1, 299, 300, 1199, 4900])
@pytest.mark.parametrize("count", [1, 100, 300, 301, 1500, ROWS])
def test_any_rows_are_those_that_hdf5_reads(start, count, tmp_path):
    write(tmp_path / "run.h5")
    stop = min(ROWS, start + count)
    with h5py.File(tmp_path / "run.h5", "r") as file:
        np.testing.assert_array_equal(read(file["rows"], start, stop), file["rows"][start:stop])
        # The control: those of the dataset beside it differ.
        assert not np.array_equal(read(file["other"], start, stop), file["rows"][start:stop])


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "gzip"},
        {"fletcher32": True},
        {"dtype": ">f4"},
        {"dtype": np.float64},
        {"chunks": (CHUNK, 7)},
        {"chunks": None},
        {"file_options": {"userblock_size": 512}},
    ],
)
def test_what_only_hdf5_can_read_is_left_to_it(options, tmp_path):
    write(tmp_path / "run.h5", **options)
    with h5py.File(tmp_path / "run.h5", "r") as file:
        assert read(file["rows"], 0, ROWS) is None
        rows = FileRows(lambda: _context(file["rows"]), DATA.shape, file["rows"].dtype)
        np.testing.assert_array_equal(rows[10:4000], DATA[10:4000])


def test_a_file_with_a_writer_is_left_to_hdf5(tmp_path):
    path = tmp_path / "run.h5"
    write(path)
    with h5py.File(path, "r+") as writer:
        assert read(writer["rows"], 0, ROWS) is None
        with h5py.File(path, "r") as file:
            assert read(file["rows"], 0, ROWS) is None


def test_chunks_that_were_never_written_are_left_to_hdf5(tmp_path):
    with h5py.File(tmp_path / "run.h5", "w") as file:
        dataset = file.create_dataset("rows", DATA.shape, np.float32, chunks=(CHUNK, WIDTH))
        dataset[:CHUNK] = DATA[:CHUNK]
    with h5py.File(tmp_path / "run.h5", "r") as file:
        assert read(file["rows"], 0, CHUNK) is not None
        assert read(file["rows"], 0, CHUNK + 1) is None


def test_a_file_that_ends_too_early_is_left_to_hdf5(tmp_path):
    write(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5", "r") as file:
        rows = FileRows(lambda: _context(file["rows"]), DATA.shape, np.dtype(np.float32))
        np.testing.assert_array_equal(rows[:], DATA)
        os.truncate(tmp_path / "run.h5", 600_000)
        assert read(file["rows"], 0, ROWS) is None
        np.testing.assert_array_equal(rows[:], file["rows"][:])


def test_rows_are_read_into_given_memory(tmp_path):
    write(tmp_path / "run.h5")
    target = np.empty((700, WIDTH), np.float32)
    with h5py.File(tmp_path / "run.h5", "r") as file:
        rows = FileRows(lambda: _context(file["rows"]), DATA.shape, np.dtype(np.float32))
        assert rows.read_into(slice(100, 800), target) is target
    np.testing.assert_array_equal(target, DATA[100:800])


def test_threads_read_at_the_same_time_and_close_what_they_opened(tmp_path):
    write(tmp_path / "run.h5")
    with h5py.File(tmp_path / "run.h5", "r") as file:
        lock, wrong = threading.Lock(), []

        def work(seed):
            random = np.random.default_rng(seed)
            for _ in range(50):
                start, stop = sorted(random.integers(0, ROWS, 2).tolist())
                with lock:
                    pieces = find_rows(file["rows"], start, stop + 1, np.dtype(np.float32))
                target = np.empty((stop + 1 - start, WIDTH), np.float32)
                with pieces:
                    if not (
                        pieces.read_into(target) and np.array_equal(target, DATA[start : stop + 1])
                    ):
                        wrong.append((start, stop))

        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        if before:
            assert len(os.listdir("/proc/self/fd")) == before


class _context:
    """A context that yields a dataset."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __enter__(self):
        return self._dataset

    def __exit__(self, *error):
        pass
