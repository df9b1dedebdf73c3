"""Rows in a file are indexed as in NumPy, with few reads."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grutrace.storage.open import open_trace
from grutrace.storage.read import lazy_rows as rows_module
from grutrace.storage.read.lazy_rows import FileRows
from grutrace.storage.write.file_sink import FileSink
from tests.storage import coded

DATA = np.arange(60, dtype=np.float32).reshape(20, 3)


class Counting:
    """Stands in for a dataset, and counts its reads and the elements that they bring."""

    #: It is not compressed, and can only be read by HDF5.
    id = SimpleNamespace(get_create_plist=lambda: SimpleNamespace(get_nfilters=lambda: 0))
    file = SimpleNamespace(id=SimpleNamespace(get_intent=lambda: None))

    def __init__(self, data):
        self.data, self.shape, self.reads, self.elements = data, data.shape, 0, 0

    @contextmanager
    def acquire(self):
        yield self

    def __getitem__(self, key):
        self.reads += 1
        # A copy, as h5py gives.
        result = np.array(self.data[key])
        self.elements += result.size
        return result


def file_rows(data):
    counting = Counting(data)
    return FileRows(counting.acquire, data.shape, data.dtype), counting


def index(length):
    number = st.integers(-length - 2, length + 2)
    many = st.lists(st.integers(-length, length - 1), max_size=2 * length).map(
        lambda numbers: np.array(numbers, np.int64)
    )
    mask = st.lists(st.booleans(), min_size=length, max_size=length).map(
        lambda values: np.array(values, bool)
    )
    return st.one_of(number, st.slices(length), many, mask)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=index(20), columns=index(3) | st.none())
@example(rows=slice(None, None, -1), columns=slice(None, None, -1))
@example(rows=np.array([3, 3, -1, 0]), columns=1)
@example(rows=Ellipsis, columns=1)
@example(rows=1, columns=Ellipsis)
@example(rows=Ellipsis, columns=None)
def test_an_index_gives_what_numpy_gives(rows, columns):
    key = rows if columns is None else (rows, columns)
    result = file_rows(DATA)[0]
    try:
        exact = DATA[key]
    except IndexError:
        with pytest.raises(IndexError):
            result[key]
        return
    np.testing.assert_array_equal(result[key], exact)
    assert np.shape(result[key]) == np.shape(exact)


@pytest.mark.parametrize("key", [(0, 0, 0), (None, 0, 0, 0), "a", 1.5, np.zeros((2, 2))])
def test_an_invalid_index_is_an_error(key):
    with pytest.raises((IndexError, TypeError)):
        file_rows(DATA)[0][key]


def test_numpy_accepts_rows_as_an_array():
    result, _ = file_rows(DATA)
    assert (result.shape, result.ndim, result.dtype, len(result)) == ((20, 3), 2, np.float32, 20)
    np.testing.assert_array_equal(np.asarray(result), DATA)
    np.testing.assert_array_equal(np.asarray(result, np.float64), DATA)
    np.testing.assert_array_equal(np.stack(list(result)), DATA)
    assert np.mean(result) == DATA.mean()
    with pytest.raises(ValueError, match="copy"):
        np.array(result, copy=False)
    assert "not read yet" in repr(result)


def test_picked_rows_are_read_in_few_spans_of_bounded_size(monkeypatch):
    data = np.arange(300_000, dtype=np.float64).reshape(100_000, 3)
    result, counting = file_rows(data)
    picked = np.arange(0, 100_000, 16)
    np.testing.assert_array_equal(result[picked], data[picked])
    assert counting.reads == 1
    result, counting = file_rows(data)
    apart = np.array([0, 99_999, 5])
    np.testing.assert_array_equal(result[apart], data[apart])
    assert counting.reads == 2
    assert counting.elements < 100
    monkeypatch.setattr(rows_module, "BLOCK", 24 * 1000)
    result, counting = file_rows(data)
    np.testing.assert_array_equal(result[picked], data[picked])
    assert 100 <= counting.reads <= 110
    assert counting.elements <= data.size


def test_a_long_stepwise_sequence_takes_few_reads(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    coded.write(path, "stepwise", calls=2000, flush_every=500)
    reads = []
    # All reads through HDF5, where they are counted.
    monkeypatch.setattr(rows_module, "SMALLEST", np.inf)
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset,
        "__getitem__",
        lambda dataset, *args, **named: reads.append(dataset.name) or read(dataset, *args, **named),
    )
    with open_trace(path) as trace:
        sequence = trace["rnn.l0"].sequence(3)
        reads.clear()
        update = sequence.update
        assert len(reads) == 1
        assert len(update) == len(sequence) == 2000
        np.testing.assert_array_equal(update[1500], coded.rows(1500, 8)[3] + 1)


def test_rows_of_a_file_stop_at_what_was_committed(tmp_path):
    path = tmp_path / "run.h5"
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "stepwise"))
    sink.close()
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["modules/rnn/l0/update"].resize(100, 0)
    with open_trace(path) as trace:
        assert trace["rnn.l0"].update.shape == (8, coded.HIDDEN)
        assert trace["rnn.l0"].update[:].shape == (8, coded.HIDDEN)
        with pytest.raises(IndexError):
            trace["rnn.l0"].update[8]
