"""A closed trace is as small as what it holds, and stores each version of the weights once."""

from __future__ import annotations

import os
import signal
import stat
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.storage.open import open_trace
from grutrace.storage.read.file_source import FileSource
from grutrace.storage.read.trace import Trace
from grutrace.storage.recovery.recover import recover_file
from grutrace.storage.write import compact, writer
from grutrace.storage.write.file_sink import FileSink
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage import coded
from tests.storage.streams import full_stream, make_header, make_module
from tests.storage.write.test_append import run

#: What a trace of one site and few rows takes at most, beside its weights. Bytes.
SMALL = 50_000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def record(layer, path, calls=1, **options):
    with grutrace.trace(layer, path, **options):
        for _ in range(calls):
            layer(torch.randn(5, 2, layer.input_size))


def weight_bytes(layer):
    return sum(parameter.nbytes for parameter in layer.parameters())


def versions(path):
    with h5py.File(path) as file:
        return len(file["modules/%/l0/weight_hh"])


def block(call, first=0):
    """A call of a run that began with the first."""
    made = coded.block(call, "small")
    return replace(made, sequences=made.sequences - np.uint64(first * len(made.sequences)))


def append_blocks(path, first, last, mode):
    sink = FileSink(path, coded.HEADER, mode)
    sink.append(coded.weights())
    for call in range(first, last):
        sink.append(block(call, first))
    sink.close()


@pytest.mark.parametrize("hidden", [4, 256])
@pytest.mark.parametrize("options", [{}, {"gates": "deferred"}, {"compression": "zstd"}])
def test_a_short_trace_is_small(path, hidden, options):
    layer = nn.GRU(3, hidden)
    record(layer, path, **options)
    rows = 5 * 10 * hidden * 4
    assert path.stat().st_size < SMALL + weight_bytes(layer) + rows
    with grutrace.open(path) as trace:
        assert trace.closed
        assert trace["l0"].hidden.shape == (10, hidden)
    assert os.listdir(path.parent) == ["run.h5"]


def test_control_an_open_trace_is_not_compact(path):
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, path) as tracer:
        layer(torch.randn(5, 2, 3))
        tracer.flush()
        assert path.stat().st_size > 20 * SMALL
    assert path.stat().st_size < SMALL


def test_a_compact_file_holds_everything(path):
    """Read with plain h5py; the dimension scales equal those of a long file."""
    stream = full_stream()
    run(path, stream, "w")
    long = path.with_name("long.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "should_compact", lambda *_: False)
        run(long, stream, "w")
    assert path.stat().st_size < long.stat().st_size / 10
    with h5py.File(path) as small, h5py.File(long) as other:
        assert not list(different(small, other))
        assert not list(different(other, small))
    plain = PlainTrace(path)
    assert len(plain.calls) == len(PlainTrace(long).calls) > 0


def different(group, other):
    """Names of what is not the same in two files, chunks aside."""
    for name, item in group.items():
        if isinstance(item, h5py.Group):
            yield from different(item, other[name])
            continue
        same = item.dtype == other[name].dtype and item.maxshape == other[name].maxshape
        if not same or not np.array_equal(item[()], other[name][()]):
            yield item.name
        labels = [(axis.label, list(axis.keys())) for axis in item.dims]
        if labels != [(axis.label, list(axis.keys())) for axis in other[name].dims]:
            yield item.name
        if item.attrs.keys() ^ other[name].attrs.keys():
            yield item.name


def test_a_long_trace_keeps_its_chunks(path):
    coded.write(path, "big", calls=100)
    sink = FileSink(path, coded.HEADER, "a")
    sink.close()
    with h5py.File(path) as file:
        assert file["modules/rnn/l0/update"].chunks == (1024, coded.HIDDEN)
    inode = path.stat().st_ino
    FileSink(path, coded.HEADER, "a").close()
    assert path.stat().st_ino == inode


def test_appending_to_a_compact_file_restores_large_chunks(path):
    def chunks():
        with h5py.File(path) as file:
            return file["modules/rnn/l0/update"].chunks[0], file["calls"].chunks[0]

    append_blocks(path, 0, 1, "w")
    assert chunks() == (6, 1)
    append_blocks(path, 1, 3, "a")
    assert chunks() == (18, 3)
    assert path.stat().st_size < SMALL + coded.weights().nbytes + 18 * 4 * coded.HIDDEN * 8
    append_blocks(path, 3, 2000, "a")
    assert chunks() == (1024, 1310)
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 2000
        assert trace.calls["weights"].tolist() == [0] * 2000


@pytest.mark.parametrize("change", ["none", "values", "not a number", "the sign of a zero"])
def test_weights_are_stored_once_per_version(path, change):
    layer = nn.GRU(3, 4)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("nan") if change == "not a number" else 0.0
    record(layer, path, check="off")
    if change == "values":
        with torch.no_grad():
            layer.weight_hh_l0[0, 1] += 1
    if change == "the sign of a zero":
        with torch.no_grad():
            layer.weight_hh_l0[0, 0] = -0.0
    for _ in range(3):
        record(layer, path, mode="a", check="off")
    new = change in ("values", "the sign of a zero")
    assert versions(path) == 1 + new
    with grutrace.open(path) as trace:
        assert trace.calls["weights"].tolist() == [0, new, new, new]
        last = trace["l0"].weights(int(new))["weight_hh"]
    assert last.tobytes() == layer.weight_hh_l0.detach().numpy().tobytes()


def test_weights_that_change_later_are_new_versions(path):
    layer = nn.GRU(3, 4)
    record(layer, path)
    with grutrace.trace(layer, path, mode="a"):
        layer(torch.randn(5, 2, 3))
        with torch.no_grad():
            layer.weight_hh_l0 += 1
        layer(torch.randn(5, 2, 3))
    record(layer, path, mode="a")
    with grutrace.open(path) as trace:
        assert trace.calls["weights"].tolist() == [0, 0, 1, 1]


def test_versions_are_counted_per_module(path):
    model = nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 4)])

    def call(mode):
        with grutrace.trace(model, path, mode=mode):
            for layer in model:
                layer(torch.randn(5, 2, 3))

    call("w")
    with torch.no_grad():
        model[1].weight_hh_l0 += 1
    call("a")
    with grutrace.open(path) as trace:
        assert trace.calls["weights"].tolist() == [0, 0, 0, 1]


def test_readers_see_the_copy_and_what_is_appended_to_it(path):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(block(0))
    sink.flush()
    source = FileSource(path)
    with Trace(source) as trace, open_trace(path) as other:
        assert coded.check_trace(trace) == 1
        sink.close()
        assert coded.check_trace(trace) == 1
        trace.refresh()
        assert trace.closed
        assert coded.check_trace(other) == 1
        append_blocks(path, 1, 3, "a")
        for reader in (trace, other):
            reader.refresh()
            assert coded.check_trace(reader) == 3
        # Another trace is not followed: what was open is read on, or its end is said.
        append_blocks(path, 0, 1, "overwrite")
        assert len(other.calls) == 3


FOLLOWS = """
import sys
import grutrace
from tests.storage import coded
with grutrace.open(sys.argv[1]) as trace:
    print(coded.check_trace(trace), flush=True)
    for line in sys.stdin:
        trace.refresh()
        print(coded.check_trace(trace), int(trace.closed), flush=True)
"""


def test_a_reader_of_another_process_continues(path):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(block(0))
    sink.flush()
    with forks.start("-c", FOLLOWS, path) as reader:

        def look():
            reader.stdin.write("\n")
            return reader.stdout.readline().split()

        assert reader.stdout.readline() == "1\n"
        sink.append(block(1))
        sink.close()
        assert look() == ["2", "1"]
        append_blocks(path, 2, 3, "a")
        assert look() == ["3", "1"]
        reader.stdin.close()


def test_additions_of_other_programs_stay(path):
    append_blocks(path, 0, 1, "w")
    with h5py.File(path, "r+") as file:
        file["mine"] = np.arange(3)
        file.attrs["comment"] = "keep"
    append_blocks(path, 1, 2, "a")
    with h5py.File(path) as file:
        assert file["mine"][()].tolist() == [0, 1, 2]
        assert file.attrs["comment"] == "keep"
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 2


@pytest.mark.parametrize("where", ["attribute", "label", "filter", "group"])
def test_changes_of_other_programs_stay(path, where):
    append_blocks(path, 0, 1, "w")
    with h5py.File(path, "r+") as file:
        if where == "attribute":
            file["modules/rnn/l0/update"].attrs["mine"] = 1
        elif where == "label":
            file["modules"].attrs["mine"] = 1
        elif where == "group":
            file.create_group("modules/rnn/l0/mine")
        else:
            rows = file["modules/rnn/l0/update"][()]
            del file["modules/rnn/l0/update"]
            file.create_dataset(
                "modules/rnn/l0/update",
                data=rows,
                maxshape=(None, coded.HIDDEN),
                chunks=(10, coded.HIDDEN),
                compression="gzip",
            )
    append_blocks(path, 1, 2, "a")
    with h5py.File(path) as file:
        assert "mine" in file["modules/rnn/l0/update"].attrs or where != "attribute"
        assert "mine" in file["modules"].attrs or where != "label"
        assert "mine" in file["modules/rnn/l0"] or where != "group"
        assert file["modules/rnn/l0/update"].compression == "gzip" or where != "filter"
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 2


def test_permissions_and_links_stay(path):
    append_blocks(path, 0, 1, "w")
    path.chmod(0o640)
    append_blocks(path, 1, 2, "a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    second = path.with_name("second.h5")
    os.link(path, second)
    append_blocks(path, 2, 3, "a")
    assert os.path.samefile(path, second)
    with open_trace(second) as trace:
        assert coded.check_trace(trace) == 3
    link = path.with_name("link.h5")
    link.symlink_to(path)
    append_blocks(link, 3, 4, "a")
    assert link.is_symlink()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 4


@pytest.mark.parametrize("step", ["_copy_image", "_copy_permissions", "fsync_file"])
def test_a_failed_copy_leaves_the_file_unchanged(path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    sink = FileSink(path, coded.HEADER, fsync=True)
    sink.append(coded.weights())
    sink.append(block(0))
    sink.flush()
    if step == "fsync_file":
        fsync_file = compact.fsync_file
        size = path.stat().st_size

        def fail(descriptor):
            # Only that of the copy, which is smaller.
            if os.fstat(descriptor).st_size < size / 2:
                raise OSError(28, "No space left on device")
            fsync_file(descriptor)

    monkeypatch.setattr(compact, step, fail)
    sink.close()
    assert os.listdir(path.parent) == ["run.h5"]
    assert path.stat().st_size > 100_000
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 1
        assert trace.closed


@pytest.mark.parametrize("reason", ["owner", "size"])
def test_a_compact_file_that_cannot_be_copied_is_appended_to_in_place(path, monkeypatch, reason):
    append_blocks(path, 0, 1, "w")
    if reason == "owner":
        monkeypatch.setattr(compact, "_copy_permissions", lambda *_: False)
    else:
        monkeypatch.setattr(compact, "MAX_DATA_BYTES", 0)
    inode = path.stat().st_ino
    append_blocks(path, 1, 3, "a")
    assert path.stat().st_ino == inode
    assert os.listdir(path.parent) == ["run.h5"]
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 3


DIES = """
import os, signal, sys
from pathlib import Path
from tests.storage.write.test_compact import append_blocks
path, mode, when = sys.argv[1:]
replaced = Path.replace
def replace(self, target):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.replace = replace
append_blocks(path, 1 if mode == "a" else 0, 2, mode)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["w", "a"])
def test_a_writer_killed_during_the_copy_leaves_a_complete_file(path, mode, when):
    if mode == "a":
        append_blocks(path, 0, 1, "w")
    done = forks.run("-c", DIES, path, mode, when)
    assert done.returncode == -signal.SIGKILL
    with open_trace(path) as trace:
        # Of a run that goes on, the copy comes before its first call.
        assert coded.check_trace(trace) == (2 if mode == "w" else 1)
        assert trace.closed == (when == "after" if mode == "w" else when == "before")


def test_a_recovered_file_is_compact(path):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "stepwise"))
    sink.flush()
    copied = path.with_name("left.h5")
    copied.write_bytes(path.read_bytes())
    sink.close()
    clean = path.with_name("clean.h5")
    recover_file(copied, clean)
    assert clean.stat().st_size < SMALL + coded.weights().nbytes < copied.stat().st_size
    with open_trace(clean) as trace:
        assert coded.check_trace(trace) == 1
    append_blocks(clean, 1, 2, "a")


def test_sizes_that_are_made_compact():
    header = make_header(make_module(hidden=64, width=64))
    columns = compact.dataset_specs(header.modules)

    def items(rows, calls=1):
        counts = {"calls": calls, "modules/rnn/pieces": calls, "modules/rnn/l0/initial": calls}
        weights = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        counts |= {f"modules/rnn/l0/{name}": 1 for name in weights}
        return {dataset_path: counts.get(dataset_path, rows if column.axes else 0)
                for dataset_path, column in columns.items()}  # fmt: skip

    assert compact.should_compact(header, items(10))
    assert compact.should_compact(header, items(100))
    # As many rows as a chunk has, nearly.
    assert not compact.should_compact(header, items(1000))
    assert not compact.should_compact(header, items(0, 0) | dict.fromkeys(columns, 0))
    assert not compact.should_compact(header, items(100_000, 100))
    many = make_header(*[make_module(str(number)) for number in range(compact.MAX_SITES + 1)])
    assert not compact.should_compact(many, dict.fromkeys(compact.dataset_specs(many.modules), 1))
