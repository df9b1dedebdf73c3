"""A saved trace equals the file of a tracer with that path."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from grutrace.errors import OptionError, StateError, TraceFileError
from grutrace.records import CallRecord, WeightsRecord
from grutrace.storage.memory import MemorySink
from grutrace.storage.open import open_sink, open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.write import appender
from tests.storage.oracle import check_trace
from tests.storage.streams import drawn_streams, full_stream

ROOT = Path(__file__).parents[2]


def in_memory(stream: Any) -> Trace:
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    return Trace(sink)


def streamed(stream: Any, path: Path) -> None:
    """Write it as a tracer does, which announces no weights that no call uses."""
    used: dict[int, int] = {}
    for record in stream.records:
        if isinstance(record, CallRecord):
            used[record.module] = max(used.get(record.module, -1), record.weights)
    sink = open_sink(path, stream.header)
    for record in stream.records:
        if not isinstance(record, WeightsRecord) or record.version <= used.get(record.module, -1):
            sink.append(record)
    sink.close()


def contents(path: Path) -> dict[str, Any]:
    """By its name, the attributes, the shape and the bytes of each dataset, as h5py reads them."""
    results: dict[str, Any] = {}
    with h5py.File(path) as file:
        names = ["/"]
        file.visit(names.append)
        for name in names:
            item = file[name]
            attributes = {
                key: str(value)
                for key, value in item.attrs.items()
                if key not in ("DIMENSION_LIST", "REFERENCE_LIST")
            }
            if isinstance(item, h5py.Dataset):
                data = item[()]
                results[name] = attributes, data.dtype, data.shape, data.tobytes()
            else:
                results[name] = attributes
    return results


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams())
def test_a_saved_file_equals_that_of_a_tracer_bit_for_bit(stream, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("saved")
    in_memory(stream).save(folder / "saved.h5")
    streamed(stream, folder / "streamed.h5")
    assert contents(folder / "saved.h5") == contents(folder / "streamed.h5")
    with open_trace(folder / "saved.h5") as trace:
        assert trace.closed
        check_trace(trace, stream.header, stream.records)


def test_control_another_stream_makes_another_file(tmp_path) -> None:
    stream = full_stream()
    in_memory(stream).save(tmp_path / "saved.h5")
    del stream.records[-1]
    streamed(stream, tmp_path / "streamed.h5")
    assert contents(tmp_path / "saved.h5") != contents(tmp_path / "streamed.h5")


def test_a_saved_trace_can_be_appended_to(tmp_path) -> None:
    stream = full_stream()
    in_memory(stream).save(tmp_path / "run.h5")
    sink = open_sink(tmp_path / "run.h5", stream.header, "a")
    for record in stream.records:
        sink.append(record)
    sink.close()
    with open_trace(tmp_path / "run.h5") as trace:
        blocks = len(in_memory(stream).calls)
        assert len(trace.calls) == 2 * blocks


def test_an_existing_path_is_refused_and_unchanged(tmp_path) -> None:
    stream = full_stream()
    trace = in_memory(stream)
    path = tmp_path / "run.h5"
    trace.save(path)
    before = path.read_bytes()
    with pytest.raises(TraceFileError, match=r"run\.h5 exists"):
        trace.save(path)
    assert path.read_bytes() == before
    trace.clear()
    trace.save(path, mode="overwrite")
    assert list(tmp_path.iterdir()) == [path]
    with open_trace(path) as opened:
        assert len(opened.calls) == 0
    with pytest.raises(TraceFileError, match="no folder"):
        trace.save(tmp_path / "nowhere" / "run.h5")
    for wrong in (5, None, 1.5):
        with pytest.raises(OptionError, match="path"):
            trace.save(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mode"):
        trace.save(path, mode="a")  # type: ignore[arg-type]
    with open_trace(path) as opened, pytest.raises(StateError, match=r"run\.h5: copy that file"):
        opened.save(tmp_path / "other.h5")


@pytest.mark.parametrize("mode", ["w", "overwrite"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_no_file(mode, error, tmp_path, monkeypatch) -> None:
    trace = in_memory(full_stream())
    path = tmp_path / "run.h5"
    if mode == "overwrite":
        trace.save(path)
        before = path.read_bytes()
    writes = iter(range(1000))
    put = appender.DatasetAppender._write_items

    def fail(self: Any, items: Any) -> None:
        if next(writes) == 7:
            raise error
        put(self, items)

    monkeypatch.setattr(appender.DatasetAppender, "_write_items", fail)
    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TraceFileError
    ):
        trace.save(path, mode=mode)
    if mode == "overwrite":
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    else:
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    trace.save(path, mode="overwrite")
    with open_trace(path) as opened:
        check_trace(opened, full_stream().header, full_stream().records)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams())
def test_a_pickled_trace_reads_the_same(stream) -> None:
    trace = in_memory(stream)
    other = pickle.loads(pickle.dumps(trace))
    check_trace(other, stream.header, stream.records)
    check_trace(pickle.loads(pickle.dumps(other)), stream.header, stream.records)
    check_trace(copy.deepcopy(trace), stream.header, stream.records)


def test_a_pickled_trace_does_not_change(tmp_path) -> None:
    stream = full_stream()
    sink = MemorySink(stream.header)
    for record in stream.records[:5]:
        sink.append(record)
    trace = Trace(sink)
    other = pickle.loads(pickle.dumps(trace))
    for record in stream.records[5:]:
        sink.append(record)
    check_trace(other, stream.header, stream.records[:5])
    check_trace(trace, stream.header, stream.records)
    other.save(tmp_path / "run.h5")
    with open_trace(tmp_path / "run.h5") as opened:
        check_trace(opened, stream.header, stream.records[:5])
        # Of a file the path travels: little, however long the trace is.
        assert len(pickle.dumps(opened)) < 2000
        with pickle.loads(pickle.dumps(opened)) as again:
            check_trace(again, stream.header, stream.records[:5])


def test_a_trace_is_unpickled_in_another_process_without_torch(tmp_path) -> None:
    trace = in_memory(full_stream())
    path = tmp_path / "trace.pickle"
    path.write_bytes(pickle.dumps(trace))
    script = (
        "import pickle, sys; trace = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(len(trace.calls), trace.sites[0], float(trace[trace.sites[0]].hidden.sum()))\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    site = trace.sites[0]
    assert result.stdout.split() == [
        str(len(trace.calls)), site, str(float(trace[site].hidden.sum()))
    ]  # fmt: skip


def test_parts_of_a_trace_are_pickled_with_it(tmp_path) -> None:
    trace = in_memory(full_stream())
    name = trace.sites[0]
    for part in (trace[name], trace[name].frozen(), trace[name][0]):
        other = pickle.loads(pickle.dumps(part))
        np.testing.assert_array_equal(other.hidden, part.hidden)
        np.testing.assert_array_equal(other.initial, part.initial)
    trace.save(tmp_path / "run.h5")
    with open_trace(tmp_path / "run.h5") as file:
        for source in (trace, file):
            other = pickle.loads(pickle.dumps(source[name].hidden))
            np.testing.assert_array_equal(other, source[name].hidden)


def test_numbers_restart_in_a_cleared_trace() -> None:
    stream = full_stream()
    sink = MemorySink(stream.header)
    trace = Trace(sink)
    for record in stream.records:
        sink.append(record)
    site = trace[trace.sites[0]]
    sequence, hidden, rows = site[0], site[0].hidden, site.hidden
    held = sum(
        trace[name].rows(trace[name].site.available_quantities[-1]).nbytes for name in trace.sites
    )
    assert trace.nbytes > held
    trace.clear()
    assert (len(trace.calls), len(site), site.hidden.shape[0], trace.nbytes) == (0, 0, 0, 0)
    check_trace(trace, stream.header, [])
    for record in stream.records:
        sink.append(record)
    check_trace(trace, stream.header, stream.records)
    # What was handed out before does not show other rows now.
    trace.clear()
    np.testing.assert_array_equal(sequence.hidden, hidden)
    np.testing.assert_array_equal(rows[: len(hidden)], hidden)
    detached = pickle.loads(pickle.dumps(in_memory(full_stream())))
    detached.clear()
    assert len(detached.calls) == 0
