"""A trace that was appended to reads as if one run had written it."""

from __future__ import annotations

import dataclasses

import pytest

from grutrace.errors import TraceFileError
from grutrace.records import QUANTITIES, AnnotationRecord, CallRecord, Fork, WeightsRecord
from grutrace.storage.open import open_sink, open_source, open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.write.file_sink import FileSink
from tests.plain_reader import PlainTrace
from tests.storage import coded
from tests.storage.format.test_format import check_plain
from tests.storage.oracle import check_trace
from tests.storage.streams import full_stream, make_header, make_module


def run(path, stream, mode):
    sink = open_sink(path, stream.header, mode)
    for record in stream.records:
        sink.append(record)
    sink.close()


def moved(record, sequences, versions):
    """A record as the second run in a file should read: numbers go on from the first's."""
    if isinstance(record, WeightsRecord):
        return dataclasses.replace(record, version=record.version + versions[record.module])
    first = sequences[record.module]
    if isinstance(record, AnnotationRecord):
        return dataclasses.replace(record, sequence=record.sequence + first)
    assert isinstance(record, CallRecord)
    forks = tuple(
        Fork(fork.sequence + first, fork.parent + first, fork.steps) for fork in record.forks
    )
    return dataclasses.replace(
        record,
        weights=record.weights + versions[record.module],
        sequences=record.sequences + first,
        forks=forks,
    )


def test_numbers_continue_from_those_in_the_file(tmp_path):
    path = tmp_path / "run.h5"
    stream = full_stream()
    run(path, stream, "a")
    once = stream.records
    # Versions that no call used do not count.
    used = [
        1
        + max(
            (b.weights for b in once if isinstance(b, CallRecord) and b.module == module),
            default=-1,
        )
        for module in range(len(stream.header.modules))
    ]
    # Weights that are those of the file's last version are not stored again.
    new = [0 if count == 1 else count for count in used]
    expected = list(once)
    for again in (1, 2):
        run(path, stream, "a")
        sequences = [again * count for count in stream.begun]
        versions = [again * count for count in new]
        expected += [
            moved(record, sequences, versions)
            for record in once
            if not (isinstance(record, WeightsRecord) and used[record.module] == 1)
        ]
        with open_trace(path) as trace:
            check_trace(trace, stream.header, expected)
    check_plain(PlainTrace(path), stream.header, expected)


def test_a_live_trace_shows_earlier_calls(tmp_path):
    path = tmp_path / "run.h5"
    coded.write(path, "big", calls=2)
    with open_trace(path) as reader:
        assert coded.check_trace(reader) == 2
        sink = FileSink(path, coded.HEADER, "a")
        with Trace(open_source(sink)) as trace:
            assert len(trace.calls) == 2
            sink.append(coded.weights())
            sink.append(coded.block(0, "big"))
            assert len(trace.calls) == 3
            assert trace.calls["weights"].tolist() == [0, 0, 0]
            assert len(reader.calls) == 2
            reader.refresh()
            assert len(reader.calls) == 3
        sink.close()


def test_appending_creates_a_missing_file(tmp_path):
    run(tmp_path / "run.h5", full_stream(), "a")
    with open_trace(tmp_path / "run.h5") as trace:
        check_trace(trace, full_stream().header, full_stream().records)


MODULE = make_module("rnn", layers=2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            [make_module("rnn2", layers=2)],
            r"modules: the file has \['rnn'\], the model has \['rnn2'\]",
        ),
        (
            [MODULE, make_module("b")],
            r"modules: the file has \['rnn'\], the model has \['rnn', 'b'\]",
        ),
        (
            [make_module("rnn", layers=2, hidden=4)],
            "hidden_size of module 'rnn': the file has 3, the model has 4",
        ),
        (
            [make_module("rnn", layers=2, dtype="float64")],
            "dtype of module 'rnn'.*float32.*float64",
        ),
        ([make_module("rnn", layers=2, record=QUANTITIES)], "quantities of site 'rnn.l0'"),
        (
            [dataclasses.replace(MODULE, sites=MODULE.sites[:1])],
            r"sites of module 'rnn': the file has \['l0', 'l1'\], the model has \['l0'\]",
        ),
    ],
)
def test_appending_to_another_models_trace_is_an_error(tmp_path, other, message):
    path = tmp_path / "run.h5"
    open_sink(path, make_header(MODULE), "w").close()
    before = path.read_bytes()
    with pytest.raises(TraceFileError, match=message) as caught:
        open_sink(path, make_header(*other), "a")
    assert "run.h5" in str(caught.value)
    assert path.read_bytes() == before


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "run.h5"
    path.write_text("not HDF5")
    with pytest.raises(TraceFileError, match=r"run\.h5"):
        FileSink(path, coded.HEADER, "a")
    assert path.read_text() == "not HDF5"


def test_uncommitted_rows_are_overwritten(tmp_path):
    """A run that was killed and recovered may have left some."""
    import h5py

    path = tmp_path / "run.h5"
    coded.write(path, "stepwise", calls=3)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for dataset_path in ("modules/rnn/l0/update", "modules/rnn/pieces", "calls", "characters"):
            file[dataset_path].resize(len(file[dataset_path]) + 5, 0)
    sink = FileSink(path, coded.HEADER, "a")
    sink.append(coded.weights())
    sink.append(coded.block(0, "stepwise"))
    sink.close()
    with open_trace(path) as trace:
        assert trace.calls["tag"].tolist() == ["tag 0"] * 4
        assert (
            trace["rnn.l0"].update[24:] == coded.block(0, "stepwise").sites["l0"].rows["update"]
        ).all()
