"""A merged file gives any HDF5 tool the content of its shards."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import h5py
import numpy as np
import pytest

import grutrace
from grutrace.distributed import Shard
from grutrace.errors import GrutraceWarning, TraceFileError
from grutrace.storage.open import open_trace
from grutrace.storage.shards import merge
from grutrace.storage.shards.merge import merge_shards
from grutrace.storage.write.file_sink import FileSink
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage.oracle import check_trace
from tests.storage.shard_streams import (
    RUN,
    as_one,
    full_shards,
    joined_header,
    shard_header,
    small_shards,
    write_shards,
)
from tests.storage.shards.test_shards import write_run

PATTERN = "run.rank*.h5"


def merged_header(streams, created, closed=None):
    """What the header of a merged file must be."""
    header = joined_header(streams, range(len(streams)), len(streams))
    calls = [sum(hasattr(record, "steps") for record in stream.records) for stream in streams]
    closed = closed or [True] * len(streams)
    of = [
        {"rank": rank, "calls": count, "closed": ended, "files": files}
        for rank, (count, ended, files) in enumerate(zip(calls, closed, created, strict=True))
    ]
    options = header.options | {"shards": header.options["shards"] | {"of": of}}
    return dataclasses.replace(header, options=options)


def in_place(count):
    return [{f"run.rank{rank:04}.h5": 1.5e9 + rank} for rank in range(count)]


def check_merged(path, streams, created, closed=None):
    """Ours and plain h5py show what one process would have recorded."""
    with open_trace(path) as trace:
        check_trace(trace, merged_header(streams, created, closed), as_one(streams))
        assert trace.closed
        calls = [rank["calls"] for rank in trace.options["shards"]["of"]]
        assert trace.calls["rank"].tolist() == np.repeat(np.arange(len(calls)), calls).tolist()
        check_plain(path, trace)


def check_plain(path, trace):
    """Compare what a reader with h5py alone finds with what ours does, all of it."""
    plain = PlainTrace(path, swmr=False)
    assert plain.closed
    assert len(plain.calls) == len(trace.calls)
    assert [plain.tag(call) for call in plain.calls] == trace.calls["tag"].tolist()
    for module in plain.modules:
        for site in module.sites.values():
            ours = trace[site.name]
            assert len(ours) == module.count
            for name, rows in site.rows.items():
                np.testing.assert_array_equal(rows, ours.rows(name))
                for number in range(module.count):
                    expected = ours.sequence(number).rows(name)
                    np.testing.assert_array_equal(site.sequence(number, name), expected)
            np.testing.assert_array_equal(site.initial, ours.initial)
            np.testing.assert_array_equal(site.checks, ours.checks)
            for name, weights in site.weights.items():
                for version, array in enumerate(weights):
                    np.testing.assert_array_equal(array, ours.weights(version)[name])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


def virtual_datasets(path):
    results = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and item.is_virtual:
            results.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return results


def test_merging_copies_no_rows(path, monkeypatch):
    """Only tables are read."""
    streams = full_shards()
    paths = write_shards(path, streams)
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr(merge._Merge, "_copy_rows", None)
    report = merge_shards(path.with_name(PATTERN), path)
    assert (report.copied, report.unclosed) == (0, ())
    assert [shard.rank for shard in report.shards] == [0, 1, 2]
    assert [path.read_bytes() for path in paths] == before
    check_merged(path, streams, in_place(3))
    virtual = virtual_datasets(path)
    assert all(
        f"modules/encoder.rnn/{path_in_module}" in virtual
        for path_in_module in ("l0/update", "l1/weight_hh")
    )
    assert "modules/%/l0/initial" in virtual
    assert not any("pieces" in name or name == "calls" for name in virtual)


@pytest.mark.parametrize("copy", [False, True])
def test_plain_h5py_reads_the_rows_of_the_shards(path, copy):
    """Nothing of grutrace reads here."""
    paths = write_shards(path, full_shards())
    merge_shards(paths, path, copy=copy)
    merged, shards = PlainTrace(path, swmr=False), [PlainTrace(path) for path in paths]
    assert len(merged.calls) == sum(len(shard.calls) for shard in shards)
    sequences = 0
    for number, module in enumerate(merged.modules):
        own = [shard.modules[number] for shard in shards]
        assert module.count == sum(shard_module.count for shard_module in own)
        for suffix, site in module.sites.items():
            sites = [shard_module.sites[suffix] for shard_module in own]
            for name in ("rows", "weights"):
                for key, item in getattr(site, name).items():
                    parts = [getattr(site, name)[key] for site in sites]
                    np.testing.assert_array_equal(item, np.concatenate(parts))
                    assert item.dtype == parts[0].dtype
            for name in ("initial", "checks"):
                parts = [getattr(site, name) for site in sites]
                np.testing.assert_array_equal(getattr(site, name), np.concatenate(parts))
            assert site.labels == sites[0].labels
            merged_sequences = [
                (shard_module, number)
                for shard_module in own
                for number in range(shard_module.count)
            ]
            for sequence, (shard_module, number) in enumerate(merged_sequences):
                of = shard_module.sites[suffix]
                for quantity in site.rows:
                    item = site.sequence(sequence, quantity)
                    np.testing.assert_array_equal(item, of.sequence(number, quantity))
                assert module.annotated(sequence) == shard_module.annotated(number)
                sequences += 1
    assert sequences > 50


def test_a_merged_file_can_be_moved_with_its_shards(path, tmp_path):
    streams = small_shards(3)
    paths = write_shards(path, streams)
    merge_shards(paths, path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for file in (*paths, path):
        file.rename(folder / file.name)
    code = "import h5py; print(h5py.File('{}')['modules/rnn/l0/update'][()].sum())"
    done = forks.run("-c", code.format(folder / "run.h5"), cwd="/", check=True).stdout
    rows = [
        record.sites["l0"].rows["update"] for record in as_one(streams) if hasattr(record, "steps")
    ]
    assert float(done) == pytest.approx(np.concatenate(rows).sum(), rel=1e-5)
    check_merged(folder / "run.h5", streams, in_place(3))
    link = tmp_path / "link.h5"
    link.symlink_to(folder / "run.h5")
    with open_trace(link) as trace:
        assert trace["rnn.l0"].update[:].shape == (12, 3)


def test_a_copy_needs_no_shards(path):
    streams = full_shards()
    paths = write_shards(path, streams)
    messages = []
    report = merge_shards(
        paths, path, copy=True, progress=lambda done, total: messages.append((done, total))
    )
    assert messages[-1] == (report.copied, report.copied)
    for shard_path in paths:
        shard_path.unlink()
    assert virtual_datasets(path) == []
    check_merged(path, streams, [{}] * 3)


def test_only_a_copy_may_be_in_another_folder(path, tmp_path):
    streams = small_shards(2)
    paths = write_shards(path, streams)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(TraceFileError, match=r"rank0000\.h5, which is not a file of the same"):
        merge_shards(paths, other / "run.h5")
    assert not list(other.iterdir())
    merge_shards(paths, other / "run.h5", copy=True)
    check_merged(other / "run.h5", streams, [{}] * 2)
    paths[1].rename(other / "real.h5")
    paths[1].symlink_to(other / "real.h5")
    with pytest.raises(TraceFileError, match=r"rank0001\.h5, which is not a file of the same"):
        merge_shards(paths, path)


def test_an_unclosed_shard_is_copied(path):
    """HDF5 would not open it for a virtual dataset. The shard itself is not changed."""
    streams = full_shards()
    write_shards(path, streams[:2], world_size=3)
    sink = FileSink(Shard(2, 3, RUN).path(path), shard_header(streams[2], 2, 3))
    for record in streams[2].records:
        sink.append(record)
    sink.flush()
    before = sink.path.read_bytes()
    report = merge_shards(path.with_name(PATTERN), path)
    assert sink.path.read_bytes() == before
    assert report.unclosed == (sink.path,)
    assert report.copied > 0
    created = [*in_place(2), {}]
    check_merged(path, streams, created, [True, True, False])
    sink.close()
    sink.path.unlink()
    check_merged(path, streams, created, [True, True, False])
    with h5py.File(path) as file:
        assert list(file["copied"]) == ["rank0002"]


def test_control_a_virtual_dataset_cannot_read_an_unclosed_shard(path, monkeypatch):
    streams = small_shards(2)
    write_shards(path, streams[:1], world_size=2)
    sink = FileSink(Shard(1, 2, RUN).path(path), shard_header(streams[1], 1, 2))
    for record in streams[1].records:
        sink.append(record)
    sink.flush()
    made = merge._Shard
    monkeypatch.setattr(
        merge, "_Shard", lambda *args, **named: made(*args, **named | {"linked": True})
    )
    merge_shards(path.with_name(PATTERN), path)
    code = f"import h5py; print(h5py.File({str(path)!r})['modules/rnn/l0/update'][()].sum())"
    assert forks.run("-c", code).returncode != 0
    sink.close()


def test_appending_to_a_shard_does_not_change_the_merged_file(path):
    """The merged file refers to its first rows."""
    streams = small_shards(2)
    paths = write_shards(path, streams)
    merge_shards(paths, path)
    sink = FileSink(paths[0], shard_header(streams[0], 0, 2), "a")
    more = small_shards(1, calls=3)[0].records
    for record in more:
        sink.append(record)
    sink.flush()
    with open_trace(path) as trace:
        check_trace(trace, merged_header(streams, in_place(2)), as_one(streams))
    sink.close()
    check_merged(path, streams, in_place(2))


def test_the_parts_of_each_rank_are_merged_too(path):
    streams = full_shards()
    write_run(path, streams, [1, 3])
    with open_trace(path.with_name(PATTERN)) as joined:
        merge_shards(path.with_name(PATTERN), path)
        with open_trace(path) as trace:
            assert len(trace.files) == 10
            assert trace.sites == joined.sites
            for name in trace.sites:
                for quantity in trace[name].site.quantities:
                    np.testing.assert_array_equal(
                        trace[name].rows(quantity), joined[name].rows(quantity)
                    )
            assert (trace.calls == joined.calls).all()
            check_plain(path, trace)


def test_an_empty_rank_and_empty_shards(path):
    streams = small_shards(3)
    streams[1].records.clear()
    paths = write_shards(path, streams)
    merge_shards(paths, path)
    check_merged(path, streams, in_place(3))
    for stream in streams:
        stream.records.clear()
    empty = write_shards(path.with_name("empty.h5"), streams)
    merge_shards(empty, path.with_name("empty.h5"))
    with open_trace(path.with_name("empty.h5")) as trace:
        assert len(trace.calls) == 0


def test_a_missing_rank_is_reported_at_every_step(path):
    paths = write_shards(path, small_shards(3))
    with pytest.warns(GrutraceWarning, match="of 3 ranks there is no file of 1") as caught:
        merge_shards([paths[0], paths[2]], path)
    assert caught[0].filename == __file__
    with pytest.warns(GrutraceWarning, match=r"run\.h5: of 3 ranks there is nothing of 1"):
        open_trace(path).close()


def test_existing_files_and_other_shards_are_errors(path):
    paths = write_shards(path, small_shards(2))
    with pytest.raises(TraceFileError, match=r"rank0000\.h5 is one file: expected several shards"):
        merge_shards(paths[0], path)
    path.write_text("mine")
    with pytest.raises(TraceFileError, match=r"run\.h5 exists"):
        merge_shards(paths, path)
    assert path.read_text() == "mine"
    path.unlink()
    with pytest.raises(TraceFileError, match="no folder"):
        merge_shards(paths, path.parent / "nowhere" / "run.h5")
    merge_shards(paths, path)
    with pytest.raises(TraceFileError, match="it is not a shard"):
        merge_shards([path, paths[0]], path.with_name("again.h5"))
    with pytest.raises(
        TraceFileError, match=r"cannot append to .*run\.h5: it was merged from shards"
    ):
        FileSink(path, small_shards(1)[0].header, "a")


def test_a_failure_leaves_no_partial_file(path, monkeypatch):
    paths = write_shards(path, small_shards(2))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge._Merge, "_write_tables", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_shards(paths, path)
    assert sorted(path.parent.iterdir()) == paths


def test_other_tools_see_nan_for_a_missing_shard(path):
    """HDF5 gives no error."""
    paths = write_shards(path, small_shards(2))
    merge_shards(paths, path)
    paths[1].unlink()
    with h5py.File(path) as file:
        site = file["modules/rnn/l0"]
        for name in ("update", "initial", "weight_hh", "bias_ih"):
            half = len(site[name]) // 2
            assert not np.isnan(site[name][:half]).any()
            assert np.isnan(site[name][half:]).all()
        assert np.isnan(site["checks"]["residual"][2:]).all()


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_replaced_shard_is_named(path, missing):
    streams = small_shards(2)
    paths = write_shards(path, streams)
    merge_shards(paths, path)
    paths[1].unlink()
    if missing:
        with pytest.raises(TraceFileError, match=r"rank0001\.h5 is missing: keep them together"):
            open_trace(path)
        return
    stream = dataclasses.replace(streams[1].header, created=7.0)
    FileSink(paths[1], stream).close()
    with (
        open_trace(path) as trace,
        pytest.raises(TraceFileError, match=r"rank0001\.h5 is not the file that .*run\.h5 was"),
    ):
        trace["rnn.l0"].update[:]


def test_a_writer_can_close_a_shard_with_open_readers(path):
    """Its readers close their handles, also those of a merged file."""
    streams = small_shards(2)
    paths = write_shards(path, streams)
    merge_shards(paths, path)
    with open_trace(path) as trace:
        before = trace["rnn.l0"].update[:]
        sink = FileSink(paths[0], shard_header(streams[0], 0, 2), "a")
        np.testing.assert_array_equal(trace["rnn.l0"].update[:], before)
        sink.close()
        code = f"import h5py; h5py.File({str(paths[0])!r})"
        assert forks.run("-c", code).returncode == 0
    with pytest.raises(grutrace.StateError, match="closed"):
        trace["rnn.l0"].update[:]


SITE = "modules/rnn/l0"


def relink(path, *spans, path_in_file=f"{SITE}/update", shape=(8, 3), dtype="<f4", width=3):
    """Put a virtual dataset of these (rows, file, place, selection) in the place of another."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file[path_in_file]
        layout = h5py.VirtualLayout((shape[0], width, *shape[2:]), dtype)
        for rows, name, source, length, selection in spans:
            whole = h5py.VirtualSource(name, source, (length, width), "<f4", (None, width))
            layout[rows] = whole if selection is None else whole[selection]
        file.create_virtual_dataset(path_in_file, layout)


def first(name, source=f"{SITE}/update", rows=slice(0, 4), source_rows=slice(0, 4), length=9):
    return rows, name, source, length, source_rows


def second(name="run.rank0001.h5", source=f"{SITE}/update", source_rows=slice(0, 4), length=9):
    return slice(4, 8), name, source, length, source_rows


def fifo(path):
    os.mkfifo(path.with_name("pipe.h5"))
    relink(path, first("pipe.h5"), second())


def symlink(path):
    real = path.parent / "inner" / "real.h5"
    real.parent.mkdir()
    path.with_name("run.rank0000.h5").rename(real)
    path.with_name("run.rank0000.h5").symlink_to(real)


def fifo_in_the_place_of_a_shard(path):
    path.with_name("run.rank0000.h5").unlink()
    os.mkfifo(path.with_name("run.rank0000.h5"))


def unlimited(path):
    os.mkfifo(path.with_name("pipe.h5"))
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file[f"{SITE}/update"]
        layout = h5py.VirtualLayout((8, 3), "<f4", maxshape=(None, 3))
        endless = slice(0, h5py.h5s.UNLIMITED)
        source = h5py.VirtualSource("pipe.h5", "x", (8, 3), "<f4", (None, 3))
        layout[endless] = source[endless]
        file.create_virtual_dataset(f"{SITE}/update", layout)


def printf(path):
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file[f"{SITE}/update"]
        space = h5py.h5s.create_simple((8, 3), (h5py.h5s.UNLIMITED, 3))
        space.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (4, 1), (4, 3))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        names = b"run.rank000%b.h5", f"{SITE}/update".encode()
        creation.set_virtual(space, *names, h5py.h5s.create_simple((4, 3)))
        kind = h5py.h5t.py_create(np.dtype("<f4"))
        h5py.h5d.create(file.id, f"{SITE}/update".encode(), kind, space, creation)


def spoil_options(path, change):
    with h5py.File(path, "r+") as file:
        options = json.loads(file.attrs["options"])
        change(options["shards"])
        file.attrs["options"] = json.dumps(options)


def shard_is_virtual(path):
    """A virtual dataset in a shard, which would lead on."""
    shard = path.with_name("run.rank0000.h5")
    with h5py.File(shard, "r+", libver=("v110", "v110")) as file:
        del file[f"{SITE}/update"]
        layout = h5py.VirtualLayout((4, 3), "<f4")
        layout[:] = h5py.VirtualSource("run.rank0001.h5", f"{SITE}/update", (4, 3))
        file.create_virtual_dataset(f"{SITE}/update", layout)


def shard_is_short(path):
    with h5py.File(path.with_name("run.rank0000.h5"), "r+") as file:
        file[f"{SITE}/update"].resize(3, axis=0)


def itself(path):
    """A virtual dataset of itself."""
    relink(path, first("."), second())


RANK_0 = "run.rank0000.h5"

HOSTILE = {
    "a folder above": (
        lambda p: (
            relink(p, first("../run.rank0000.h5"), second()),
            spoil_options(p, lambda s: s["of"][0]["files"].update({"../run.rank0000.h5": 1.5e9})),
        ),
        "plain file name",
    ),
    "an absolute path": (
        lambda p: (
            relink(p, first("/etc/passwd"), second()),
            spoil_options(p, lambda s: s["of"][0]["files"].update({"/etc/passwd": 1.5e9})),
        ),
        "plain file name",
    ),
    "a file that is no shard of it": (
        lambda p: relink(p, first("other.h5"), second()),
        "plain file name",
    ),
    "the folder itself": (
        lambda p: spoil_options(p, lambda s: s["of"][0]["files"].update({"..": 1.5e9})),
        "not a regular file|plain file name",
    ),
    "a pipe": (fifo, "plain file name"),
    "a pipe in the place of a shard": (fifo_in_the_place_of_a_shard, "not a regular file"),
    "a symbolic link": (symlink, "not a regular file"),
    "without end": (unlimited, "fixed size"),
    "a pattern of names": (printf, "one block"),
    "itself": (itself, "same column"),
    "another column": (
        lambda p: relink(p, first(RANK_0, f"{SITE}/reset"), second()),
        "same column",
    ),
    "something else altogether": (
        lambda p: relink(p, first(RANK_0, "calls"), second()),
        "same column",
    ),
    "rows twice": (
        lambda p: relink(
            p, first(RANK_0), (slice(3, 7), "run.rank0001.h5", f"{SITE}/update", 9, slice(0, 4))
        ),
        "from 4 on",
    ),
    "a gap": (
        lambda p: relink(p, first(RANK_0, rows=slice(0, 3), source_rows=slice(0, 3)), second()),
        "from 3 on",
    ),
    "not to the end": (lambda p: relink(p, first(RANK_0)), "8 items in its sources"),
    "none": (lambda p: relink(p), "items in its sources"),
    "more than there are": (
        lambda p: relink(
            p,
            first(RANK_0),
            second(),
            (slice(8, 10), *second(source_rows=slice(4, 6))[1:]),
            shape=(10, 3),
        ),
        "first of their source",
    ),
    "not the first rows": (
        lambda p: relink(p, first(RANK_0, source_rows=slice(1, 5)), second()),
        "first of their source",
    ),
    "every other row": (
        lambda p: relink(p, first(RANK_0, source_rows=slice(0, 8, 2)), second()),
        "one block",
    ),
    "all of a source": (
        lambda p: relink(p, first(RANK_0, source_rows=None, length=4), second()),
        "mapping of blocks",
    ),
    "another width": (
        lambda p: relink(p, first(RANK_0), second(), width=4),
        "first of their source",
    ),
    "another type": (lambda p: relink(p, first(RANK_0), second(), dtype="<f8"), "l0/update"),
    "in three axes": (
        lambda p: relink(p, shape=(8, 3, 1)),
        "items in its sources|update",
    ),
    "a shard that is virtual": (shard_is_virtual, r"rank0000\.h5.*its own data"),
    "a shard that is short": (shard_is_short, r"rank0000\.h5.*at least 4 items"),
    "calls that are not there": (
        lambda p: spoil_options(p, lambda s: s["of"][0].update(calls=99)),
        "shards: expected 4 calls, found 101",
    ),
    "calls that are no number": (
        lambda p: spoil_options(p, lambda s: s["of"][0].update(calls="2")),
        "'rank', 'calls'",
    ),
    "calls beyond all numbers": (
        lambda p: spoil_options(p, lambda s: s["of"][0].update(calls=2**80)),
        "'rank', 'calls'",
    ),
    "ranks in another order": (
        lambda p: spoil_options(p, lambda s: s["of"].reverse()),
        "increasing ranks",
    ),
    "a rank beyond the size": (
        lambda p: spoil_options(p, lambda s: s.update(world_size=1)),
        "increasing ranks",
    ),
    "no shards": (lambda p: spoil_options(p, lambda s: s.update(of=[])), "increasing ranks"),
    "files that are none": (
        lambda p: spoil_options(p, lambda s: s["of"][0].update(files=["x"])),
        "times of 'files'",
    ),
    "times that are none": (
        lambda p: spoil_options(p, lambda s: s["of"][0].update(files={RANK_0: "x"})),
        "times of 'files'",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    paths = write_shards(folder / "run.h5", small_shards(2))
    merge_shards(paths, folder / "run.h5")
    return folder


@pytest.mark.parametrize("hostility", HOSTILE)
def test_a_hostile_merged_file_is_one_error(sound, tmp_path, hostility):
    """Opening and reading it does not hang. A pipe would block a reader that opens it."""
    spoil, message = HOSTILE[hostility]
    for file in sound.iterdir():
        shutil.copy(file, tmp_path / file.name)
    path = tmp_path / "run.h5"
    spoil(path)
    with pytest.raises(TraceFileError, match=message) as caught:
        read_all(path)
    assert str(tmp_path) in str(caught.value)


def read_all(path):
    with open_trace(path) as trace:
        for name in trace.sites:
            site = trace[name]
            for quantity in site.site.quantities:
                np.asarray(site.rows(quantity))
            np.asarray(site.initial)
            assert len(site.checks) == len(trace.calls)
            site.weights()


def test_control_a_correct_mapping_is_read(sound, tmp_path):
    for path in sound.iterdir():
        shutil.copy(path, tmp_path / path.name)
    relink(tmp_path / "run.h5", first(RANK_0), second())
    read_all(tmp_path / "run.h5")
    with open_trace(tmp_path / "run.h5") as trace, open_trace(sound / "run.h5") as expected:
        for name in expected.sites:
            for quantity in expected[name].site.quantities:
                rows = np.asarray(expected[name].rows(quantity))
                np.testing.assert_array_equal(np.asarray(trace[name].rows(quantity)), rows)


def test_control_hdf5_follows_the_refused_mappings(sound, tmp_path):
    """Plain h5py opens a file in another folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in sound.iterdir():
        shutil.copy(path, folder / path.name)
    shutil.move(folder / RANK_0, tmp_path / "secret.h5")
    relink(folder / "run.h5", first("../secret.h5"), second())
    with h5py.File(folder / "run.h5") as file, h5py.File(tmp_path / "secret.h5") as secret:
        expected = secret[f"{SITE}/update"][:4]
        np.testing.assert_array_equal(file[f"{SITE}/update"][:4], expected)
