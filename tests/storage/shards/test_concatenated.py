"""Shards read as one trace equal the trace of a single process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grutrace.distributed import Shard
from grutrace.errors import TraceFileError
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.read.lazy_rows import ConcatenatedRows, FileRows
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards import joined_tables
from grutrace.storage.shards.concatenated import ConcatenatedSource
from grutrace.storage.write.file_sink import FileSink
from tests.storage.oracle import check_trace
from tests.storage.shard_streams import (
    RUN,
    as_one,
    full_shards,
    in_memory,
    joined_header,
    shard_header,
    small_shards,
    write_shards,
)
from tests.storage.streams import (
    Stream,
    _draw_annotation,
    _draw_call,
    drawn_modules,
    make_header,
    make_module,
)


def source_of(streams):
    shards = [Shard(rank, len(streams), RUN) for rank in range(len(streams))]
    return ConcatenatedSource("all", shards, in_memory(streams))


def check_as_one(trace, streams):
    """The trace is what one process would have shown, and each call and sequence bears its rank."""
    check_trace(trace, joined_header(streams, range(len(streams)), len(streams)), as_one(streams))
    calls = [sum(hasattr(record, "steps") for record in stream.records) for stream in streams]
    assert trace.calls["rank"].tolist() == np.repeat(np.arange(len(streams)), calls).tolist()
    assert (trace.sequences["rank"] == trace.calls["rank"][trace.sequences["call"]]).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_equal_the_trace_of_one_process(count):
    streams = full_shards()[:count]
    with Trace(source_of(streams)) as trace:
        check_as_one(trace, streams)


@st.composite
def drawn_shards(draw):
    modules = draw(drawn_modules())
    streams = []
    for _ in range(draw(st.integers(1, 3))):
        stream = Stream(make_header(*modules), seed=draw(st.integers(0, 9)))
        for _ in range(draw(st.integers(0, 6))):
            module = draw(st.integers(0, len(modules) - 1))
            action = draw(st.sampled_from(["call", "call", "weights", "annotate"]))
            if action == "weights":
                stream.weights(module)
            elif action == "annotate" and stream.begun[module]:
                _draw_annotation(draw, stream, module)
            else:
                _draw_call(draw, stream, module)
        streams.append(stream)
    return streams


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(streams=drawn_shards())
def test_drawn_shards_equal_the_trace_of_one_process(streams):
    with Trace(source_of(streams)) as trace:
        check_as_one(trace, streams)


@pytest.mark.parametrize("wrong", ["texts", "sequences", "versions", "letters"])
def test_control_the_comparison_detects_unshifted_numbers(wrong, monkeypatch):
    if wrong == "texts":
        monkeypatch.setattr(joined_tables, "annotation_values", lambda tables, _: tables.values)
    else:
        made = joined_tables._Offsets.__init__

        def spoilt(self, numbers, before, texts):
            made(self, numbers, before, 0 if wrong == "letters" else texts)
            if wrong != "letters":
                getattr(self, f"_{wrong}")[:] = 0

        monkeypatch.setattr(joined_tables._Offsets, "__init__", spoilt)
    streams = full_shards()
    with pytest.raises((AssertionError, IndexError)), Trace(source_of(streams)) as trace:
        check_as_one(trace, streams)


def test_control_rows_in_another_order_are_detected():
    streams = full_shards()
    source = source_of(streams)
    with Trace(source) as trace:
        reads = trace.snapshot.source
        reads._module_rows = [shards[::-1] for shards in reads._module_rows]
        with pytest.raises(AssertionError):
            check_as_one(trace, streams)


def test_a_rank_without_some_modules(tmp_path):
    """In pipeline parallelism, each process has a part of the model."""
    first = Stream(make_header(make_module("a"), make_module("b", hidden=4)))
    first.call([2, 1], module=0)
    first.call([3], module=1)
    second = Stream(make_header(make_module("c"), make_module("b", hidden=4)), seed=3)
    second.call([1], module=0)
    second.call([2, 2], module=1)
    with Trace(source_of([first, second])) as trace:
        assert trace.sites == ("a.l0", "b.l0", "c.l0")
        assert [len(trace[site]) for site in trace.sites] == [2, 3, 1]
        assert trace.calls["module"].tolist() == ["a", "b", "c", "b"]
        rows = [stream.records[-1].sites["l0"].rows["update"] for stream in (first, second)]
        np.testing.assert_array_equal(np.asarray(trace["b.l0"].update), np.concatenate(rows))
        np.testing.assert_array_equal(
            trace["c.l0"].update, second.records[1].sites["l0"].rows["update"]
        )
        assert trace.sequences["rank"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 4}, r"hidden_size of module 'rnn': the first has 3, this one has 4"),
        (
            {"record": ("update",)},
            r"quantities of site 'rnn.l0': the first has \(.*this one has \('update',\)",
        ),
        (
            {"dtype": "float16"},
            r"dtype of module 'rnn': the first has 'float32', this one has 'float16'",
        ),
        ({"layers": 2}, r"num_layers of module 'rnn': the first has 1, this one has 2"),
        ({"directions": (False, True)}, r"bidirectional of module"),
        ({"kind": "GRUCell"}, r"kind of module"),
    ],
)
def test_a_module_that_differs_is_an_error(change, message):
    streams = [Stream(make_header(make_module("rnn", **changes))) for changes in ({}, change)]
    with pytest.raises(TraceFileError, match=message):
        source_of(streams)


def test_growing_shards_keep_a_snapshot_unchanged(tmp_path):
    streams = full_shards()[:2]
    sinks = [
        FileSink(tmp_path / f"{rank}.h5", shard_header(stream, rank, 2))
        for rank, stream in enumerate(streams)
    ]
    shards = [Shard(rank, 2, RUN) for rank in range(2)]
    grown = [Stream(stream.header) for stream in streams]
    looked = []
    with Trace(
        ConcatenatedSource("all", shards, [FileSource(sink.path) for sink in sinks])
    ) as trace:
        for step, records in enumerate(zip(*(s.records for s in streams), strict=True)):
            for sink, stream, record in zip(sinks, grown, records, strict=True):
                stream.records.append(record)
                sink.append(record)
                sink.flush()
            trace.refresh()
            if step % 5 == 3:
                check_as_one(trace, grown)
                site = trace["decoder/step.cell"]
                rows, sequence = site.hidden, site.sequence(-1) if len(site) else None
                looked.append((rows, np.array(rows), sequence, sequence and sequence.hidden))
        tables = trace.snapshot.tables
        trace.refresh()
        assert trace.snapshot.tables is tables
        assert len({len(array) for _, array, _, _ in looked}) > 2
        for rows, array, sequence, hidden in looked:
            # In between, rows of rank 0 have come before those of rank 1.
            np.testing.assert_array_equal(rows, array)
            if sequence is not None:
                np.testing.assert_array_equal(sequence.hidden, hidden)
        for sink in sinks:
            assert not trace.closed
            sink.close()
            trace.refresh()
        assert trace.closed
        check_as_one(trace, streams)


def test_control_without_as_of_rows_move(tmp_path):
    """Without `as_of`, a refresh would change the rows at an index."""
    streams = small_shards(2)
    sinks = in_memory(streams)
    source = ConcatenatedSource("all", [Shard(rank, 2, RUN) for rank in range(2)], sinks)
    with Trace(source) as trace:
        rows = trace["rnn.l0"].update
        before, count = np.array(rows), len(rows)
        more = small_shards(1, calls=4)[0].records[-1]
        sinks[0].append(more)
        trace.refresh()
        np.testing.assert_array_equal(rows, before)
        assert not np.array_equal(np.asarray(trace["rnn.l0"].update)[:count], before)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stacked_rows_are_indexed_like_one_array(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    whole = np.arange(3.0 * sum(lengths)).reshape(-1, 3)
    stacked = ConcatenatedRows(np.split(whole, np.cumsum(lengths)[:-1]), whole.shape, whole.dtype)
    bound = st.none() | st.integers(-20, 20)
    step = st.none() | st.integers(-4, 4).filter(bool)
    rows = st.builds(slice, bound, bound, step)
    if len(whole):
        inside = st.integers(-len(whole), len(whole) - 1)
        rows |= inside | st.lists(inside, max_size=6).map(
            lambda numbers: np.array(numbers, np.int64)
        )
        rows |= st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)).map(np.array)
    columns = st.builds(slice, bound, bound, step) | st.integers(-3, 2)
    key = data.draw(rows), data.draw(columns)
    result = stacked[key]
    assert result.dtype == whole.dtype
    np.testing.assert_array_equal(result, whole[key])
    np.testing.assert_array_equal(np.asarray(stacked), whole)


def test_a_sequence_reads_only_its_own_file(tmp_path, monkeypatch):
    """A sequence of one rank does not read the files of others."""
    paths = write_shards(tmp_path / "run.h5", small_shards(3))
    shards = [Shard(rank, 3, RUN) for rank in range(3)]
    read = []
    made = FileRows._read
    monkeypatch.setattr(FileRows, "_read", lambda self, *key: read.append(key) or made(self, *key))
    with Trace(ConcatenatedSource("all", shards, [FileSource(path) for path in paths])) as trace:
        read.clear()
        assert trace["rnn.l0"].sequence(2).update.shape == (2, 3)
        assert len(read) == 1


def test_texts_come_from_each_shard():
    streams = small_shards(3)
    with Trace(source_of(streams)) as trace:
        expected = [f"rank {rank}" for rank in range(3) for _ in range(2)]
        assert [tag for tag in trace.calls["tag"] if tag] == expected[::2]
        assert trace.sequences["tag"].tolist() == expected


def test_shards_in_files_equal_the_trace_of_one_process(tmp_path):
    streams = full_shards()
    paths = write_shards(tmp_path / "run.h5", streams)
    shards = [Shard(rank, 3, RUN) for rank in range(3)]
    with Trace(ConcatenatedSource("all", shards, [FileSource(path) for path in paths])) as trace:
        check_as_one(trace, streams)
