"""Several sources read as one trace equal the trace of one sink with all modules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grutrace.storage.memory import MemorySink
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards import joined_tables
from grutrace.storage.shards.union import UnionSource, distinct_modules
from grutrace.storage.write.file_sink import FileSink
from tests.storage.oracle import check_trace
from tests.storage.streams import Stream, drawn_streams, full_stream, make_header, make_module


def split(stream, bounds):
    """The header and records of each part, the modules being cut at these bounds."""
    modules = stream.header.modules
    for start, stop in zip([0, *bounds], [*bounds, len(modules)], strict=True):
        header = dataclasses.replace(stream.header, modules=modules[start:stop])
        yield (
            header,
            [
                dataclasses.replace(record, module=record.module - start)
                for record in stream.records
                if start <= record.module < stop
            ],
        )


def in_memory(stream, bounds):
    sinks = []
    for header, records in split(stream, bounds):
        sink = MemorySink(header)
        for record in records:
            sink.append(record)
        sinks.append(sink)
    return sinks


@pytest.mark.parametrize("bounds", [[], [1], [2], [1, 2, 3]])
def test_parts_in_memory_equal_one_trace(bounds):
    stream = full_stream()
    with Trace(UnionSource("all", in_memory(stream, bounds))) as trace:
        check_trace(trace, stream.header, stream.records)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams(), data=st.data())
def test_drawn_parts_equal_one_trace(stream, data):
    boundaries = st.integers(1, max(1, len(stream.header.modules) - 1))
    bounds = sorted(data.draw(st.sets(boundaries, max_size=len(stream.header.modules) - 1)))
    with Trace(UnionSource("all", in_memory(stream, bounds))) as trace:
        check_trace(trace, stream.header, stream.records)


def test_growing_parts_in_files_equal_one_trace(tmp_path):
    stream = full_stream()
    parts = list(split(stream, [1, 3]))
    sinks = [
        FileSink(tmp_path / f"{number}.h5", header) for number, (header, _) in enumerate(parts)
    ]
    source = UnionSource("all", [FileSource(sink.path) for sink in sinks])
    bounds = np.array([1, 3])
    with Trace(source) as trace:
        for seen, record in enumerate(stream.records, 1):
            part = int(np.searchsorted(bounds, record.module, side="right"))
            start = [0, 1, 3][part]
            sinks[part].append(dataclasses.replace(record, module=record.module - start))
            sinks[part].flush()
            trace.refresh()
            if seen % 6 == 0:
                check_trace(trace, stream.header, stream.records[:seen])
        tables = trace._refresh_snapshot().tables
        trace.refresh()
        assert trace._refresh_snapshot().tables is tables
        for sink in sinks:
            assert not trace.closed
            sink.close()
            trace.refresh()
        check_trace(trace, stream.header, stream.records)
        assert trace.closed


@pytest.mark.parametrize("wrong", ["texts", "time", "modules"])
def test_control_the_comparison_detects_unshifted_numbers(wrong, monkeypatch):
    stream = full_stream()
    if wrong == "texts":
        monkeypatch.setattr(joined_tables, "annotation_values", lambda tables, _: tables.values)
    elif wrong == "time":
        monkeypatch.setattr(
            joined_tables, "_in_time_order", lambda calls: np.arange(sum(map(len, calls)))
        )
    else:
        monkeypatch.setattr(joined_tables._Offsets, "apply", lambda _, table: table)
    with (
        pytest.raises((AssertionError, IndexError, ValueError)),
        Trace(UnionSource("all", in_memory(stream, [1]))) as trace,
    ):
        check_trace(trace, stream.header, stream.records)


def test_calls_keep_their_order_if_the_clock_is_set_back():
    stream = Stream(make_header(make_module("a"), make_module("b")))
    for module, steps in ((0, 1), (0, 2), (1, 3), (0, 4)):
        stream.call([steps], module=module)
    times = iter([10.0, 5.0, 7.0, 6.0])
    stream.records = [
        dataclasses.replace(record, time=next(times)) if hasattr(record, "time") else record
        for record in stream.records
    ]
    with Trace(UnionSource("all", in_memory(stream, [1]))) as trace:
        assert trace.calls["steps"].tolist() == [3, 1, 2, 4]
        assert [len(sequence) for sequence in trace["a.l0"]] == [1, 2, 4]


def paths(*parts, labels):
    modules = [[make_module(path) for path in part] for part in parts]
    result = distinct_modules(modules, labels)
    for module in result:
        dot = "." if module.path else ""
        assert [site.name for site in module.sites] == [f"{module.path}{dot}l0"]
    return [module.path for module in result]


@pytest.mark.parametrize(
    ("parts", "labels", "expected"),
    [
        ([["a", "b"], ["c"]], ["M", "M"], ["a", "b", "c"]),
        ([["a"], ["a", "b"], ["a"]], ["M", "M", "M"], ["a", "M#2.a", "M#2.b", "M#3.a"]),
        ([["gru"], ["gru"], ["gru"]], ["E", "D", "D"], ["gru", "D.gru", "D#2.gru"]),
        ([[""], [""]], ["GRU", "GRU"], ["", "GRU#2"]),
        ([["a", "D.a"], ["a"]], ["M", "D"], ["a", "D.a", "D#2.a"]),
    ],
)
def test_same_paths_become_distinct(parts, labels, expected):
    assert paths(*parts, labels=labels) == expected
