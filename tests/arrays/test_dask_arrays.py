"""Tests of `Trace.to_dask`: threads, a cluster, files, memory and recomputed gates."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import cloudpickle
import dask.array
import h5py
import numpy as np
import pytest
import torch

import grutrace
from grutrace.arrays import dask_arrays, reopen
from grutrace.errors import MissingExtraError, NotRecordedError, TraceFileError
from tests import forks
from tests.arrays.test_xarray_dataset import in_memory, write
from tests.capture.models import EncoderDecoder
from tests.checks import EVERYTHING
from tests.leaks import open_files
from tests.plain_reader import PlainTrace
from tests.storage.shards.test_run_parts import write_run
from tests.storage.streams import Stream, make_header, make_module

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def small_chunks(monkeypatch):
    """So that little rows make many tasks."""
    monkeypatch.setattr(dask_arrays, "CHUNK", 1)


def long_stream(calls=9, steps=700):
    """Rows of several chunks of the file: a chunk has 262144 / 4 / 32 = 2048 of them."""
    stream = Stream(make_header(make_module(hidden=32, record=EVERYTHING)))
    for _ in range(calls):
        stream.call([steps, 5])
    return stream


def test_chunks_are_those_of_the_file(path, small_chunks):
    write(path, long_stream())
    with grutrace.open(path) as trace:
        for quantity, width in (("update", 32), ("input", 2)):
            array = trace.to_dask("rnn.l0", quantity)
            assert array.shape == (9 * 705, width)
            with h5py.File(path) as file:
                of_file = file[f"modules/rnn/l0/{quantity}"].chunks[0]
            assert all(size % of_file == 0 for size in array.chunks[0][:-1])
            assert array.chunks[1] == (width,)
        assert len(trace.to_dask("rnn.l0", "update").chunks[0]) == 4


def test_a_task_reads_some_mebibytes(path):
    stream = Stream(make_header(make_module(hidden=64)))
    stream.call([300_000])
    write(path, stream)
    with grutrace.open(path) as trace:
        sizes = [64 * 4 * rows for rows in trace.to_dask("rnn.l0", "update").chunks[0]]
    assert len(sizes) > 1
    assert all(4 << 20 <= size <= 32 << 20 for size in sizes[:-1])


def test_values_are_those_of_the_file(path, small_chunks):
    write(path, long_stream())
    rows = PlainTrace(path).modules[0].sites["l0"].rows
    with grutrace.open(path) as trace:
        for quantity in EVERYTHING:
            array = trace.to_dask("rnn.l0", quantity)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array.compute(), rows[quantity])
        array = trace.to_dask("rnn.l0", "update")
        np.testing.assert_array_equal(array[2000:2100:7, ::-1], rows["update"][2000:2100:7, ::-1])
        np.testing.assert_array_equal(array[[5, 3, 6000]], rows["update"][[5, 3, 6000]])
        np.testing.assert_array_equal(array[-1], rows["update"][-1])
        exact = rows["update"].astype(float)
        np.testing.assert_allclose(array.mean(axis=0, dtype=float), exact.mean(axis=0))
        with pytest.raises(AssertionError):  # control: a chunk too far
            np.testing.assert_array_equal(array[2048:4096], rows["update"][:2048])


def deferred(path=None):
    torch.manual_seed(0)
    model = torch.nn.GRU(5, 6, 2, bidirectional=True)
    with grutrace.trace(model, path, gates="deferred") as tracer:
        for _ in range(4):
            model(torch.randn(50, 8, 5))
            with torch.no_grad():
                model.weight_hh_l0.mul_(1.25)
    return tracer  # closed; in memory it stays readable


def derived_exactly(path, suffix, quantity):
    """From the equations, in float64, by the reader that was written from the format's page."""
    module = PlainTrace(path).modules[0]
    site = module.sites[suffix]
    parts = [site.derive(number, quantity) for number in range(module.count)]
    return np.concatenate(parts)


@pytest.mark.parametrize("suffix", ["l0", "l1_reverse"])
def test_gates_that_are_derived(suffix, path, monkeypatch):
    deferred(path)
    with grutrace.open(path) as trace:
        whole = trace.to_dask(suffix, "update")
        monkeypatch.setattr(dask_arrays, "aligned_rows", lambda _: 300)
        parts = trace.to_dask(suffix, "update")
    assert (len(whole.chunks[0]), len(parts.chunks[0])) == (1, 6)
    exact = derived_exactly(path, suffix, "update")
    for array in (whole, parts):
        np.testing.assert_allclose(array.compute(), exact, atol=1e-6)
    other = derived_exactly(path, {"l0": "l0_reverse", "l1_reverse": "l1"}[suffix], "update")
    with pytest.raises(AssertionError):  # control
        np.testing.assert_allclose(whole, other, atol=1e-2)


def test_a_trace_in_memory_is_sent_as_arrays(path, monkeypatch):
    monkeypatch.setattr(dask_arrays, "aligned_rows", lambda _: 300)
    trace = deferred()
    deferred(path)
    for quantity in ("hidden", "update"):
        array = trace.to_dask("l1", quantity)
        assert len(array.chunks[0]) == 6
        with grutrace.open(path) as in_file:
            exact = in_file["l1"].rows(quantity)[:]
        # Derived gates depend in their last bit on how many are derived at once.
        np.testing.assert_allclose(array.compute(), exact, atol=1e-6, rtol=0)
        sent = cloudpickle.dumps(dict(array.dask))
        assert len(sent) > exact.nbytes
        graph = pickle.loads(sent)
        result = dask.array.Array(graph, array.name, array.chunks, meta=array._meta)
        np.testing.assert_array_equal(result.compute(), array.compute())


def test_rows_in_memory_are_not_copied_in_advance():
    trace = in_memory(long_stream())
    snapshot = trace.snapshot
    rows = snapshot.rows(0, snapshot.header.modules[0].sites[0], "update")

    def shares(block):
        return np.array([[np.shares_memory(block, rows)]])

    array = trace.to_dask("rnn.l0", "update")
    assert array.map_blocks(shares, chunks=(1, 1), dtype=bool).compute().all()
    copied = dask.array.from_array(rows)  # control
    assert not copied.map_blocks(shares, chunks=(1, 1), dtype=bool).compute().any()


def test_rows_are_those_of_the_snapshot(path):
    model = EncoderDecoder().eval()
    with grutrace.Tracer(model, path) as tracer:
        model(torch.randn(4, 7, 5))
        array = tracer.to_dask("decoder.cell", "hidden")
        dataset = tracer.to_xarray("decoder.cell", padded=True)
        before = np.asarray(tracer["decoder.cell"].hidden)
        padded, _ = tracer["decoder.cell"].padded("hidden")
        model(torch.randn(4, 7, 5), steps=9)
        assert len(tracer["decoder.cell"].hidden) == 48
        np.testing.assert_array_equal(array.compute(), before)
        np.testing.assert_array_equal(dataset.hidden, padded)
    np.testing.assert_array_equal(array.compute(), before)


def test_an_array_outlives_the_trace_but_not_the_file(path, tmp_path):
    write(path, long_stream())
    with grutrace.open(path) as trace:
        array = trace.to_dask("rnn.l0", "update")
        exact = np.asarray(trace["rnn.l0"].update)
    np.testing.assert_array_equal(array.compute(), exact)
    sent = pickle.dumps(array)
    path.unlink()
    for rows in (array, pickle.loads(sent)):
        with pytest.raises(TraceFileError, match=r"run\.h5 does not exist"):
            rows.compute()
    stream = Stream(make_header(make_module(hidden=32, record=EVERYTHING), created=2e9))
    stream.call([9000])
    write(path, stream)
    for rows in (array, pickle.loads(sent)):
        with pytest.raises(TraceFileError, match="was replaced by another file"):
            rows.compute()


def test_no_file_stays_open_and_the_cache_is_bounded(tmp_path):
    sent = []
    for number in range(reopen.CACHE_SIZE + 3):
        write(tmp_path / f"{number}.h5", long_stream(calls=1, steps=10 + number))
        with grutrace.open(tmp_path / f"{number}.h5") as trace:
            sent.append(pickle.dumps(trace.to_dask("rnn.l0", "update")))
    for number, pickled in enumerate(sent):
        assert pickle.loads(pickled).compute().shape == (15 + number, 32)
        assert not [name for _, name in open_files() if name.startswith(str(tmp_path))]
    assert len(reopen._recent) == reopen.CACHE_SIZE


def test_parts_of_a_run(path, small_chunks):
    stream = write_run(path)
    with grutrace.open(path) as trace:
        array = trace.to_dask("deferred.l0", "hidden")
        exact = np.asarray(trace["deferred.l0"].hidden)
    assert len(exact) == sum(
        r.steps.sum()
        for r in stream.records
        if getattr(r, "module", 0) == 4 and hasattr(r, "steps")
    )
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)).compute(), exact)


def test_missing_sites_and_extras_are_named(monkeypatch):
    trace = in_memory(long_stream(calls=1))
    with pytest.raises(NotRecordedError, match=r"recorded sites: 'rnn\.l0'"):
        trace.to_dask("rnn.l1", "update")
    with pytest.raises(NotRecordedError, match="'gate' was not recorded"):
        trace.to_dask("rnn.l0", "gate")
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(MissingExtraError, match=r'needs dask, .*pip install "dask\[distributed\]'):
        trace.to_dask("rnn.l0", "update")


def test_a_cluster_of_two_processes(path):
    """Large enough for several tasks of the size that users get; what is sent stays small."""
    torch.manual_seed(0)
    model = torch.nn.GRU(16, 64)
    with grutrace.trace(model, path, gates="deferred"), torch.no_grad():
        for _ in range(6):
            model(torch.randn(1000, 64, 16))
    names = ("l0", "hidden", "l0", "update")
    done = forks.run("-m", "tests.arrays.cluster", path, *names, env=os.environ | forks.DASK)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["processes"]) == 2
    assert result["client"] not in result["processes"]
    assert result["left open"] == []
    plain = PlainTrace(path).modules[0]
    hidden = plain.sites["l0"].rows["hidden"].astype(float)
    with grutrace.open(path) as trace:
        update = np.asarray(trace["l0"].update, float)
        weights = trace["l0"].weights()
    # One step by the equations: it is the gate that the trace says, and not another.
    first, initial = plain.sites["l0"].read(0)[0], plain.sites["l0"].previous(0)[0]
    i = weights["weight_ih"] @ first + weights["bias_ih"]
    h = weights["weight_hh"] @ initial + weights["bias_hh"]
    np.testing.assert_allclose(update[0], 1 / (1 + np.exp(-(i + h)[64:128])), atol=1e-6)
    for name, rows in (("hidden", hidden), ("update", update)):
        told = result[f"l0 {name}"]
        assert told["chunks"] >= 6
        assert told["bytes"] < 2_000 * told["chunks"]
        np.testing.assert_allclose(told["sum"], rows.sum(axis=0), rtol=1e-6, atol=1e-3)
        means = rows.reshape(-1, 1000, 64).mean(axis=1)
        np.testing.assert_allclose(told["means"], means, atol=1e-4)
