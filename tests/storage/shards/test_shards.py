"""Tests of shard files: named by rank, found by glob, and readable one by one."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import grutrace
from grutrace.distributed import Shard
from grutrace.errors import GrutraceWarning, OptionError, TraceFileError
from grutrace.storage.open import open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.shards.merge import merge_shards
from grutrace.storage.shards.run_parts import RunPart, part_path
from grutrace.storage.write.file_sink import FileSink
from tests.plain_reader import PlainTrace
from tests.storage.oracle import check_trace
from tests.storage.shard_streams import (
    RUN,
    full_shards,
    joined_header,
    shard_header,
    small_shards,
    write_shards,
)
from tests.storage.shards.test_concatenated import check_as_one
from tests.storage.shards.test_union import split


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def test_a_shard_is_named_by_its_rank():
    assert Shard(3, 8).path("folder/run.h5").as_posix() == "folder/run.rank0003.h5"
    assert Shard(12345, 99999).path("run.x.h5").name == "run.x.rank12345.h5"


def test_a_glob_opens_all_shards_as_one_trace(path):
    streams = full_shards()
    paths = write_shards(path, streams)
    assert [path.name for path in paths] == [f"run.rank000{rank}.h5" for rank in range(3)]
    with open_trace(path.with_name("run.rank*.h5")) as trace:
        check_as_one(trace, streams)
        assert trace.files == tuple(paths)
        assert trace.closed
    with open_trace(str(path.with_name("run.rank000[0-2].h5"))) as trace:
        check_as_one(trace, streams)
    with open_trace(paths[::-1]) as trace:
        check_as_one(trace, streams)


def test_a_shard_opens_as_itself(path):
    streams = full_shards()
    paths = write_shards(path, streams)
    for rank, stream in enumerate(streams):
        for opened in (paths[rank], [paths[rank]]):
            with open_trace(opened) as trace:
                check_trace(trace, shard_header(stream, rank, 3), stream.records)
                assert set(trace.calls["rank"]) == set(trace.sequences["rank"]) == {rank}
        plain = PlainTrace(paths[rank])
        assert plain.options["shard"] == {"rank": rank, "world_size": 3, "id": RUN}


def test_one_process_has_rank_0(path):
    (stream,) = small_shards(1)
    sink = FileSink(path, stream.header)
    for record in stream.records:
        sink.append(record)
    sink.close()
    for opened in (path, path.with_name("ru?.h5")):
        with open_trace(opened) as trace:
            check_trace(trace, stream.header, stream.records)
            assert set(trace.calls["rank"]) == {0}


def test_a_file_whose_name_is_a_glob_comes_first(tmp_path):
    streams = small_shards(2)
    write_shards(tmp_path / "run.h5", streams)
    odd = tmp_path / "run.rank*.h5"
    shutil.copy(tmp_path / "run.rank0001.h5", odd)
    with open_trace(odd) as trace:
        assert set(trace.calls["rank"]) == {1}


def test_a_missing_rank_warns_and_the_others_are_read(path):
    streams = small_shards(3)
    paths = write_shards(path, streams)
    paths[1].unlink()
    pattern = path.with_name("run.rank*.h5")
    with pytest.warns(GrutraceWarning, match=r"of 3 ranks there is no file of 1$") as caught:
        trace = open_trace(pattern)
    assert caught[0].filename == __file__
    with trace:
        assert set(trace.calls["rank"]) == {0, 2}
        # It comes late, as may be while a run begins: then it takes its place.
        with open_trace(paths[0]) as alone:
            assert len(alone.calls) == 2
        write_shards(path, streams[1:2], world_size=3, ranks=[1])
        trace.refresh()
        check_as_one(trace, streams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_trace(pattern).close()


def test_a_shard_of_a_killed_rank_is_read(path):
    """The file is marked as being written. Its committed rows are read."""
    streams = small_shards(3)
    paths = write_shards(path, streams[:2], world_size=3)
    child = os.fork()
    if not child:
        sink = FileSink(Shard(2, 3, RUN).path(path), shard_header(streams[2], 2, 3))
        for record in streams[2].records:
            sink.append(record)
        sink.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with open_trace(path.with_name("run.rank*.h5")) as trace:
        check_as_one(trace, streams)
        assert not trace.closed
        assert [shard.closed for shard in trace.snapshot.tables.shards] == [True, True, False]
    assert len(paths) == 2


def mixed_runs(path, paths):
    (other,) = write_shards(path.with_name("other.h5"), small_shards(1), world_size=3, run="b")
    other.rename(paths[0])


def mixed_sizes(path, paths):
    (other,) = write_shards(path.with_name("o.h5"), small_shards(1), world_size=4, run=None)
    other.rename(paths[0])


def twice(path, paths):
    shutil.copy(paths[1], paths[0])


def not_a_shard(path, paths):
    FileSink(path.with_name("x.h5"), small_shards(1)[0].header).close()
    path.with_name("x.h5").rename(paths[0])


def no_trace(path, paths):
    paths[0].write_bytes(b"no HDF5")


def other_model(path, paths):
    stream = small_shards(1)[0]
    module = dataclasses.replace(stream.header.modules[0], hidden_size=4)
    stream.header = dataclasses.replace(stream.header, modules=(module,))
    FileSink(path.with_name("x.h5"), shard_header(stream, 0, 3)).close()
    path.with_name("x.h5").rename(paths[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (mixed_runs, r"run\.rank0000\.h5 and .*run\.rank0001\.h5 are shards of different runs$"),
        (mixed_sizes, r"rank0001\.h5 and .*rank0000\.h5 are .* different runs: of 3 and of 4"),
        (twice, r"run\.rank0000\.h5 and .*run\.rank0001\.h5 are both of rank 1"),
        (
            not_a_shard,
            r"run\.rank0000\.h5 cannot be read together with other files: it is not a shard",
        ),
        (no_trace, r"run\.rank0000\.h5"),
        (
            other_model,
            r"rank0001\.h5 and .*rank0000\.h5 cannot be read as one trace: hidden_size .*"
            "the first has 4, this one has 3",
        ),
    ],
)
def test_shards_of_different_runs_are_an_error(path, spoil, message):
    paths = write_shards(path, small_shards(3))
    paths[0].unlink()
    spoil(path, paths)
    for opened in (path.with_name("run.rank*.h5"), paths):
        with pytest.raises(TraceFileError, match=message):
            open_trace(opened)


def test_shards_without_an_id_count_as_one_run(path):
    """Launchers that torch does not know give no id."""
    streams = small_shards(2)
    write_shards(path, streams, run=None)
    with open_trace(path.with_name("run.rank*.h5")) as trace:
        assert set(trace.calls["rank"]) == {0, 1}
        assert trace.options["shards"]["id"] is None


@pytest.mark.parametrize(
    "stamp",
    [
        "one",
        {},
        {"rank": 3, "world_size": 3, "id": None},
        {"rank": -1, "world_size": 3, "id": None},
        {"rank": True, "world_size": 3, "id": None},
        {"rank": 0, "world_size": 3, "id": 5},
        {"rank": 0.5, "world_size": 3, "id": ""},
        {"rank": 0, "world_size": 2**70, "id": ""},
    ],
)
def test_an_invalid_run_attribute_is_an_error(path, stamp):
    header = small_shards(1)[0].header
    FileSink(path, dataclasses.replace(header, options={"shard": stamp})).close()
    with pytest.raises(TraceFileError, match="options', shard: expected integers 'rank'"):
        open_trace(path)


def test_an_empty_list_and_a_glob_without_a_match(tmp_path):
    with pytest.raises(OptionError, match="found none"):
        open_trace([])
    with pytest.raises(TraceFileError, match=r"run\*\.h5 does not exist, and no file matches it"):
        open_trace(tmp_path / "run*.h5")
    with pytest.raises(TraceFileError, match=r"run\.h5 does not exist"):
        open_trace([tmp_path / "run.h5", tmp_path / "other.h5"])


def write_run(path, streams, bounds):
    """Each rank a run in several parts, as `grutrace run` makes them."""
    for rank, stream in enumerate(streams):
        shard = Shard(rank, len(streams), RUN)
        for number, (header, records) in enumerate(split(stream, bounds), 1):
            options = header.options | shard.options | RunPart(f"run {rank}", number).options
            header = dataclasses.replace(header, options=options, created=1.5e9 + rank)
            sink = FileSink(part_path(shard.path(path), number), header)
            for record in records:
                sink.append(record)
            sink.close()


def test_the_parts_of_each_rank_belong_to_it(path):
    streams = full_shards()
    write_run(path, streams, [1, 3])
    assert len(list(path.parent.iterdir())) == 9
    with open_trace(path.with_name("run.rank*.h5")) as trace:
        assert len(trace.files) == 9
        expected = joined_header(streams, range(3), 3)
        options = {**expected.options, "run": {"id": "run 0", "part": 1}}
        assert trace.header == dataclasses.replace(expected, options=options)
        whole = trace.calls
        assert (np.diff(whole["rank"]) >= 0).all()
        sites = trace.sites
        rows = {
            name: np.asarray(trace[name].rows(q))
            for name in sites
            for q in trace[name].site.quantities[:1]
        }
    flat = path.parent / "flat"
    flat.mkdir()
    write_shards(flat / "run.h5", streams)
    with open_trace(flat / "run.rank*.h5") as trace:
        assert trace.sites == sites
        for name, item in rows.items():
            quantity = trace[name].site.quantities[0]
            np.testing.assert_array_equal(item, trace[name].rows(quantity))
    part_path(Shard(1, 3).path(path), 1).unlink()
    with pytest.raises(
        TraceFileError, match=r"rank0001\.part0002\.h5 is part of a run whose first"
    ):
        open_trace(path.with_name("run.rank*.h5"))


def test_only_its_own_rank_appends_to_a_shard(path):
    stream = small_shards(1)[0]
    (shard,) = write_shards(path, [stream], world_size=2)
    for rank, world_size in ((1, 2), (0, 3)):
        with pytest.raises(
            TraceFileError,
            match=rf"rank: the file has '0 of 2', this process has '{rank} of {world_size}'",
        ):
            FileSink(shard, shard_header(stream, rank, world_size), "a")
    # The run goes on under another id: the file keeps its own.
    FileSink(shard, shard_header(stream, 0, 2, "again"), "a").close()
    with open_trace(shard) as trace:
        assert trace.options["shard"]["id"] == RUN


def test_handles_are_released(path):
    write_shards(path, small_shards(2))
    trace = grutrace.open(path.with_name("run.rank*.h5"))
    trace.close()
    trace.close()
    with pytest.raises(grutrace.StateError, match="closed"):
        trace["rnn.l0"].update[0]


def test_a_snapshot_of_shards_can_be_pickled(path):
    """As dask tasks do. Growing shards cannot, because their rows would move."""
    streams = full_shards()
    paths = write_shards(path, streams)
    with open_trace(path.with_name("run.rank*.h5")) as trace:
        address = pickle.dumps(trace.snapshot.source)
        expected = np.array(trace["decoder/step.cell"].hidden)
    assert len(address) < 2000
    source = pickle.loads(address)
    with Trace(source) as trace:
        check_as_one(trace, streams)
        np.testing.assert_array_equal(trace["decoder/step.cell"].hidden, expected)
    sink = FileSink(paths[0], shard_header(streams[0], 0, 3), "a")
    for record in streams[2].records:
        sink.append(record)
    sink.flush()
    with (
        open_trace(path.with_name("run.rank*.h5")) as trace,
        pytest.raises(TypeError, match="may still grow"),
    ):
        pickle.dumps(trace.snapshot.source)
    sink.close()
    with pytest.raises(TraceFileError, match="has grown since"):
        pickle.loads(address)


def test_dask_and_xarray_read_shards_and_merged_files(path):
    dask = pytest.importorskip("dask")
    pytest.importorskip("xarray")
    paths = write_shards(path, full_shards())
    merge_shards(paths, path)
    for opened in (path, paths):
        # dask's own threads would stay for good.
        with (
            ThreadPoolExecutor(2) as pool,
            dask.config.set(pool=pool, scheduler="threads"),
            open_trace(opened) as trace,
        ):
            site = trace["encoder.rnn.l0"]
            result = trace.to_dask("encoder.rnn.l0", "update").compute()
            np.testing.assert_array_equal(result, site.update)
            dataset = trace.to_xarray("encoder.rnn.l0")
            np.testing.assert_array_equal(dataset["hidden"].values, site.hidden)
            sequences = np.repeat(np.arange(len(site)), site.lengths)
            np.testing.assert_array_equal(dataset["sequence"], sequences)
