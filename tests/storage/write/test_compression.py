"""Compressed rows have the same values, a smaller size, and survive a killed writer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch

import grutrace
from grutrace.errors import MissingExtraError, OptionError
from grutrace.storage.hdf5.filters import COMPRESSIONS
from grutrace.storage.open import open_trace
from grutrace.storage.shards.merge import merge_shards
from grutrace.storage.write import dataset_writer, writer
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage import coded
from tests.storage.format.test_format import check_plain
from tests.storage.oracle import check_trace
from tests.storage.read.test_live import follow
from tests.storage.shard_streams import RUN, full_shards
from tests.storage.streams import Stream, full_stream, make_header, make_module
from tests.storage.write.test_crash import run_until_killed

#: The filters as The HDF Group has registered them; gzip comes after a shuffle of the bytes.
CODES = {"blosc2": [32026], "zstd": [32008], "gzip": [2, 1]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def compressed(stream, compression):
    header = make_header(*stream.header.modules, options={"compression": compression})
    return header, stream.records


def write(path, header, records, mode="w", commits=()):
    file = writer.Writer(path, header, mode)
    for number, record in enumerate(records):
        file.write(record)
        if number in commits:
            file.commit()
    file.close()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_full_streams_are_read_back(compression, path):
    header, records = compressed(full_stream(), compression)
    write(path, header, records, commits=range(0, 99, 3))
    with open_trace(path) as trace:
        check_trace(trace, header, records)
    check_plain(PlainTrace(path), header, records)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_only_rows_are_compressed(compression, path):
    header, records = compressed(full_stream(), compression)
    write(path, header, records)
    with h5py.File(path) as file:
        rows = {"reset", "update", "candidate", "hidden", "input", "gradient"}
        filters = {}

        def note(name, member):
            if isinstance(member, h5py.Dataset):
                made = member.id.get_create_plist()
                codes = [made.get_filter(number)[0] for number in range(made.get_nfilters())]
                filters[name] = codes

        file.visititems(note)
        for name, codes in filters.items():
            assert codes == (CODES[compression] if name.rpartition("/")[2] in rows else []), name
    assert [hdf5plugin.FILTERS["bshuf"]] == CODES["zstd"]
    assert [hdf5plugin.FILTERS["blosc2"]] == CODES["blosc2"]


@pytest.mark.parametrize("steps", [1, 40, 109, 250])
def test_partial_and_full_chunks(steps, path):
    """A chunk has 109 rows of 600 units, and commits come at any row of it."""
    stream = Stream(make_header(make_module(hidden=600)))
    for _ in range(7):
        stream.call([steps])
    header, records = compressed(stream, "blosc2")
    write(path, header, records, commits={1, 2, 5})
    with open_trace(path) as trace:
        check_trace(trace, header, records)


def test_partial_chunks_wait_for_the_next_commit(path, monkeypatch):
    """A rewritten chunk takes new space in the file, so it is compressed when it is full."""
    # More than twice the four chunks that can be held back, of 256 KiB.
    monkeypatch.setattr(dataset_writer, "BUFFER_BYTES", 2_500_000)
    stream = Stream(make_header(make_module(hidden=600)))
    for _ in range(150):
        stream.call([10])
    sizes = {}
    for name, compression in (("plain", None), ("packed", "blosc2"), ("eager", "blosc2")):
        header = make_header(
            *stream.header.modules, options={"compression": compression} if compression else {}
        )
        commits = range(999) if name == "eager" else ()
        write(path.with_name(name), header, stream.records, commits=commits)
        sizes[name] = path.with_name(name).stat().st_size
    # Random numbers pack badly, but no chunk is written twice.
    assert sizes["packed"] < 1.02 * sizes["plain"]
    assert sizes["eager"] > 3 * sizes["packed"]  # control: where every call is committed


def test_many_sites_buffer_little(path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "BUFFER_BYTES", 64 * 1024)
    header = make_header(
        *(make_module(f"m{number}", hidden=32) for number in range(20)),
        options={"compression": "blosc2"},
    )
    stream = Stream(header)
    file = writer.Writer(path, header)
    for number in range(400):
        stream.call([30], module=number % 20)
        for record in stream.records:
            file.write(record)
        stream.records.clear()
        assert (
            sum(appender.buffered_bytes for appender in file._datasets._appenders.values())
            < 2 * 64 * 1024
        )
    file.close()
    with open_trace(path) as trace:
        assert trace["m7.l0"].update.shape == (600, 32)


def test_appending_keeps_the_compression(path):
    """The file keeps its filter, whatever the second run requests."""
    parts = []
    for asked in ("zstd", None, "blosc2"):
        stream = Stream(make_header(make_module(hidden=32)), seed=len(parts))
        stream.call([700, 1500])
        options = {"compression": asked} if asked else {}
        header = make_header(*stream.header.modules, options=options)
        write(path, header, stream.records, mode="a")
        parts.append(stream.records[1].sites["l0"].rows["update"])
    with open_trace(path) as trace:
        np.testing.assert_array_equal(trace["rnn.l0"].update, np.concatenate(parts))
        assert trace.options["compression"] == "zstd"
    with h5py.File(path) as file:
        made = file["modules/rnn/l0/update"].id.get_create_plist()
        assert [made.get_filter(0)[0]] == CODES["zstd"]


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_acknowledged_rows_survive_the_writer(shape, tmp_path):
    chance = random.Random(21)
    most = 0
    for attempt in range(4):
        path = tmp_path / f"{attempt}.h5"
        acknowledged = run_until_killed(path, shape, chance.uniform(0, 0.6), "blosc2")
        with open_trace(path) as trace:
            result = coded.check_trace(trace)
        coded.check_plain(PlainTrace(path))
        assert result >= acknowledged
        most = max(most, acknowledged)
    assert most > 0


def test_following_another_process(tmp_path):
    path = tmp_path / "run.h5"
    with forks.start("-m", "tests.storage.coded", path, "stepwise", "blosc2") as process:
        try:
            process.stdout.readline()
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            seen = follow(path, 1.5)
        finally:
            process.kill()
            drain.join()
    assert len(set(seen)) > 2


def test_a_tracer_compresses(path):
    torch.manual_seed(0)
    model = torch.nn.GRU(8, 64)
    batch = torch.randn(600, 4, 8)
    batch[100:] = 0  # then the states settle, and a compressor has something to find
    results = {}
    for compression in (None, *COMPRESSIONS):
        file = path.with_name(f"{compression}.h5")
        with grutrace.trace(model, file, compression=compression):
            model(batch)
        with grutrace.open(file) as trace:
            results[compression] = np.asarray(trace["l0"].update), file.stat().st_size
            assert trace.options.get("compression") == compression
    for compression in COMPRESSIONS:
        np.testing.assert_array_equal(results[compression][0], results[None][0])
        assert results[compression][1] < 0.75 * results[None][1]


@pytest.mark.parametrize("copy", [False, True])
def test_compressed_shards_are_merged(copy, tmp_path):
    stream = full_shards()[0]
    header, records = compressed(stream, "blosc2")
    paths = []
    for rank in range(2):
        paths.append(tmp_path / f"run.rank{rank:04}.h5")
        options = header.options | {"shard": {"rank": rank, "world_size": 2, "id": RUN}}
        write(paths[-1], make_header(*header.modules, options=options), records)
    merge_shards(paths, tmp_path / "run.h5", copy=copy)
    with open_trace(tmp_path / "run.h5") as merged, open_trace(paths) as joined:
        for name in merged.sites:
            for quantity in merged[name].site.quantities:
                np.testing.assert_array_equal(
                    merged[name].rows(quantity), joined[name].rows(quantity)
                )
    with h5py.File(tmp_path / "run.h5") as file:
        made = file["modules/encoder.rnn/l0/update"].id.get_create_plist()
        assert made.get_nfilters() == copy


def test_wrong_options_and_missing_extras_are_errors(path, monkeypatch):
    model = torch.nn.GRU(2, 3)
    with pytest.raises(
        OptionError, match="compression: expected one of blosc2, zstd, gzip; found 'gz'"
    ):
        grutrace.Tracer(model, path, compression="gz")
    with pytest.raises(OptionError, match="compression: expected None without a path"):
        grutrace.Tracer(model, compression="zstd")
    write(path, *compressed(full_stream(), "zstd"))
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(MissingExtraError, match=r'pip install "hdf5plugin'):
        grutrace.Tracer(model, path.with_name("other.h5"), compression="zstd")
    assert os.listdir(path.parent) == [path.name]
    # Whoever only asks what is in a file needs nothing.
    with grutrace.open(path) as trace:
        assert len(trace["encoder.rnn.l0"]) == 5
        assert len(trace["encoder.rnn.l0"].initial[:]) == 5
        with pytest.raises(MissingExtraError, match=r"bitshuffle needs hdf5plugin.*pip install"):
            np.asarray(trace["encoder.rnn.l0"].update)


def test_gzip_needs_no_plugin(path, monkeypatch):
    """Neither does the writer, nor a reader that knows nothing of grutrace."""
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    model = torch.nn.GRU(2, 3)
    with grutrace.trace(model, path, compression="gzip") as tracer:
        model(torch.randn(4, 5, 2))
        expected = np.asarray(tracer["l0"].update)
    code = f"import h5py; print(h5py.File({str(path)!r})['modules/%/l0/update'][:].tolist())"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert np.array_equal(np.array(json.loads(result.stdout), np.float32), expected)
