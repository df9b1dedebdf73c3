"""Tests of the files of one run: found, named, refused, and readable one by one."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from grutrace.errors import TraceFileError
from grutrace.storage.open import open_trace
from grutrace.storage.shards import run_parts as parts_module
from grutrace.storage.shards.run_parts import (
    RunPart,
    check_writable,
    part_files,
    part_path,
    parts_of,
)
from grutrace.storage.write.file_sink import FileSink
from tests.plain_reader import PlainTrace
from tests.storage.oracle import check_trace
from tests.storage.shards.test_union import split
from tests.storage.streams import full_stream


def part_sink(path, number, header, run="one"):
    header = dataclasses.replace(header, options=header.options | RunPart(run, number).options)
    return FileSink(part_path(path, number), header)


def write_run(path, bounds=(1, 3), run="one"):
    stream = full_stream()
    for number, (header, records) in enumerate(split(stream, list(bounds)), 1):
        sink = part_sink(path, number, header, run)
        for record in records:
            sink.append(record)
        sink.close()
    return stream


def expected_header(stream, run="one"):
    options = stream.header.options | RunPart(run, 1).options
    return dataclasses.replace(stream.header, options=options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def test_opening_a_run_opens_all_its_files(path):
    stream = write_run(path)
    assert parts_of(path) == [path, *(path.with_name(f"run.part000{n}.h5") for n in (2, 3))]
    with open_trace(path) as trace:
        check_trace(trace, expected_header(stream), stream.records)
        assert trace.closed


def test_each_part_is_a_trace(path):
    stream = write_run(path)
    for number, (header, records) in enumerate(split(stream, [1, 3]), 1):
        plain = PlainTrace(part_path(path, number))
        assert [module.path for module in plain.modules] == [
            module.path for module in header.modules
        ]
        assert plain.options["run"] == {"id": "one", "part": number}
        assert len(plain.calls) == sum(hasattr(record, "steps") for record in records)
        if number > 1:
            with open_trace(part_path(path, number)) as trace:
                options = header.options | RunPart("one", number).options
                check_trace(trace, dataclasses.replace(header, options=options), records)


def test_a_refresh_finds_later_parts(path):
    stream = full_stream()
    (first, early), (second, late) = split(stream, [2])
    sink = part_sink(path, 1, first)
    for record in early:
        sink.append(record)
    sink.flush()
    with open_trace(path) as trace:
        site = trace[trace.sites[0]]
        assert trace.sites == tuple(site.name for m in first.modules for site in m.sites)
        other = part_sink(path, 2, second)
        snapshot = trace._refresh_snapshot()
        for record in late:
            other.append(record)
        other.close()
        assert len(trace.calls) == len(snapshot.calls)
        trace.refresh()
        assert len(snapshot.sequences) == sum(e.sequences for e in snapshot.tables.module_counts)
        assert not trace.closed
        sink.close()
        trace.refresh()
        assert trace.closed
        check_trace(trace, expected_header(stream), stream.records)
        assert len(site) == len(trace[site.name])


def test_a_file_that_is_no_part_of_the_run_is_ignored(path):
    stream = write_run(path)
    write_run(other := path.with_name("other.h5"), run="two")
    shutil.copy(part_path(other, 2), part_path(path, 4))
    with open_trace(path) as trace:
        check_trace(trace, expected_header(stream), stream.records)


def test_a_missing_part_is_an_error(path):
    write_run(path)
    part_path(path, 2).unlink()
    with pytest.raises(
        TraceFileError, match=r"run.part0002.h5 is missing, and run.part0003.h5 exists"
    ):
        open_trace(path)
    part_path(path, 3).unlink()
    with open_trace(path) as trace:
        assert len(trace.modules) == 1


def test_a_damaged_part_is_an_error_that_names_it(path):
    write_run(path)
    part_path(path, 2).write_bytes(b"not HDF5")
    with pytest.raises(TraceFileError, match=r"run.part0002.h5"):
        open_trace(path)


def test_a_part_with_the_name_of_another_is_an_error(path):
    write_run(path)
    shutil.copy(part_path(path, 3), part_path(path, 2))
    with pytest.raises(TraceFileError, match=r"run.part0002.h5 is part 3"):
        open_trace(path)


@pytest.mark.parametrize(
    "stamp", ["one", {}, {"id": 1, "part": 1}, {"id": "one", "part": True}, {"id": "", "part": 0}]
)
def test_an_invalid_run_attribute_is_an_error(path, stamp):
    header = full_stream().header
    FileSink(path, dataclasses.replace(header, options={"run": stamp})).close()
    with pytest.raises(TraceFileError, match=r"run.h5 is damaged.*options.*run"):
        open_trace(path)


@pytest.mark.parametrize(
    ("name", "number"),
    [("run.part0002.h5", 2), ("run.part10000.h5", 10000), ("run.part0001.h5", None)]
    + [(name, None) for name in ("run.part2.h5", "run.part00002.h5", "runxpart0002.h5", "run.part")]
    + [
        ("run.part\u0660\u0660\u0660\u0662.h5", None),
        ("run.part0002.h5.new-1", None),
        ("a.part0002.h5", None),
    ],
)
def test_names_of_part_files(path, name, number):
    path.with_name(name).touch()
    assert list(part_files(path)) == ([] if number is None else [number])


def test_the_name_of_a_part():
    assert part_path(parts_module.Path("a/trace"), 12).name == "trace.part0012"


def test_existing_files_at_the_path_of_a_run(path):
    check_writable(path, "w")
    assert not list(path.parent.iterdir())
    write_run(path)
    for mode in ("a", "overwrite"):
        check_writable(path, mode)
    with pytest.raises(TraceFileError, match="exists"):
        check_writable(path, "w")
    write_run(other := path.with_name("other.h5"), run="two")
    shutil.copy(part_path(other, 2), part_path(path, 4))
    for mode in ("a", "overwrite"):
        with pytest.raises(TraceFileError, match=r"run.part0004.h5 is in the way"):
            check_writable(path, mode)
    path.unlink()
    with pytest.raises(TraceFileError, match=r"run.part0002.h5 is in the way"):
        check_writable(path, "w")
    with pytest.raises(TraceFileError, match="no folder"):
        check_writable(path.parent / "none" / "run.h5", "w")
    with pytest.raises(TraceFileError, match="not a file"):
        check_writable(path.parent, "overwrite")


def test_only_files_of_a_run_can_be_appended_to(path):
    FileSink(path, full_stream().header).close()
    with pytest.raises(TraceFileError, match="grutrace run did not make it"):
        check_writable(path, "a")
