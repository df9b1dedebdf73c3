"""What a writer may overwrite, who else writes to its path, and what became of its file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.errors import GrutraceError, SinkError, TraceFileError
from grutrace.storage.hdf5 import locks
from grutrace.storage.open import open_trace
from grutrace.storage.shards.run_parts import RunPart, check_writable, part_path
from grutrace.storage.write import writer_thread
from grutrace.storage.write.file_sink import FileSink
from tests import forks
from tests.storage import coded
from tests.storage.streams import make_header, make_module
from tests.storage.write.test_file_sink import until

#: What says that a file is being written.
HERE, ELSEWHERE = "by another tracer or grutrace.Statistics of this process", "by another process"


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / "run.h5"


def begin(path, mode="w", call=0):
    """A sink that has one call in its file."""
    sink = FileSink(path, coded.HEADER, mode)
    sink.append(coded.weights())
    sink.append(coded.block(call, "big"))
    sink.flush()
    return sink


def other_hdf5(path):
    with h5py.File(path, "w") as file:
        file["results"] = np.arange(5)
        file.attrs["format"] = "another"


def hdf5_with_a_number(path):
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["format"] = 3


def older_hdf5(path):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["results"] = np.arange(5)


def damaged_trace(path):
    coded.write(path, "big", calls=1)
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(2000) + content[2008:])


FOREIGN = {
    "a source file": lambda path: path.write_text("import torch\n"),
    "a checkpoint": lambda path: torch.save({"weight": torch.ones(3)}, path),
    "a NumPy array": lambda path: path.write_bytes(b"\x93NUMPY\1\0"),
    "another HDF5 file": other_hdf5,
    "an HDF5 file whose format is a number": hdf5_with_a_number,
    "an HDF5 file with a user block": older_hdf5,
    "a trace whose beginning is damaged": damaged_trace,
    "an empty file": lambda path: path.touch(),
    "a file cut short within its signature": lambda path: path.write_bytes(b"\x89HDF"),
}

WRITERS = {
    "a tracer": lambda path: FileSink(path, coded.HEADER, "overwrite"),
    "statistics": lambda path: grutrace.Statistics(path, mode="overwrite"),
    "saved statistics": lambda path: counted().save(path, mode="overwrite"),
    "a run": lambda path: check_writable(path, "overwrite"),
}


def counted(*arguments, **options):
    statistics = grutrace.Statistics(*arguments, **options)
    layer = nn.GRU(3, 4)
    with grutrace.trace(layer, sink=statistics):
        layer(torch.randn(5, 2, 3))
    return statistics


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("writer", WRITERS)
def test_foreign_files_are_never_overwritten(path, foreign, writer):
    FOREIGN[foreign](path)
    before = path.read_bytes()
    with pytest.raises(
        TraceFileError, match=r"run\.h5 cannot be overwritten: expected a file that"
    ):
        WRITERS[writer](path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["run.h5"]


def killed(path):
    """A trace whose writer was killed."""
    path.write_bytes(killed_trace())


@cache
def killed_trace():
    """The bytes of a trace whose writer was killed."""
    code = (
        "import os, sys; from tests.storage.write.test_claims import begin; "
        "begin(sys.argv[1]); os._exit(0)"
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        forks.run("-c", code, path, check=True)
        return path.read_bytes()


def cut_short(path):
    coded.write(path, "big", calls=20)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def of_a_newer_version(path):
    coded.write(path, "big", calls=1)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.array([9, 0])


OURS = {
    "a trace": lambda path: coded.write(path, "big", calls=1),
    "a compressed trace": lambda path: coded.write(path, "big", calls=1, compression="zstd"),
    "statistics": counted,
    "a trace whose writer was killed": killed,
    "a trace that was cut short": cut_short,
    "a trace of a newer version": of_a_newer_version,
}


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_grutrace_are_overwritten(path, ours, writer):
    OURS[ours](path)
    made = WRITERS[writer](path)
    if isinstance(made, FileSink):
        made.close()
        with open_trace(path) as trace:
            assert len(trace.calls) == 0
    assert os.listdir(path.parent) == ["run.h5"]


def test_links_are_followed(path):
    """The file behind a symbolic link is overwritten and the link stays, also a hard link."""
    target, link, second = (path.with_name(name) for name in ("a.h5", "b.h5", "c.h5"))
    coded.write(target, "big", calls=2)
    link.symlink_to(target)
    os.link(target, second)
    begin(link, "overwrite").close()
    assert link.is_symlink()
    for opened, calls in ((target, 1), (link, 1), (second, 2)):
        with open_trace(opened) as trace:
            assert coded.check_trace(trace) == calls
    target.write_text("precious")
    with pytest.raises(TraceFileError, match="found a text file"):
        begin(link, "overwrite")
    assert target.read_text() == "precious"
    target.unlink()
    begin(link, "overwrite").close()
    assert link.is_symlink()
    assert target.is_file()


def test_a_file_created_meanwhile_is_not_replaced(path, monkeypatch):
    coded.write(path, "big", calls=1)

    def create(*arguments):
        path.unlink()
        path.write_text("precious")
        return created(*arguments)

    from grutrace.storage.write import writer

    created = writer.create_file
    monkeypatch.setattr(writer, "create_file", create)
    with pytest.raises(TraceFileError, match="cannot be overwritten"):
        begin(path, "overwrite")
    assert path.read_text() == "precious"
    assert os.listdir(path.parent) == ["run.h5"]


def test_a_run_does_not_remove_a_part_that_is_written(path):
    module = make_module()
    for number in (1, 2):
        header = make_header(module, options=RunPart("a" * 32, number).options)
        sink = FileSink(part_path(path, number), header)
        if number == 1:
            sink.close()
    with pytest.raises(TraceFileError, match=rf"part0002\.h5 is being written {HERE}"):
        check_writable(path, "overwrite")
    sink.close()
    check_writable(path, "overwrite")


SPELLINGS = {
    "the same": lambda path: path,
    "relative": lambda path: os.path.relpath(path),
    "with dots": lambda path: path.parent / ".." / path.parent.name / path.name,
    "a symbolic link": lambda path: linked(path, os.symlink),
    "a hard link": lambda path: linked(path, os.link),
    "through a linked folder": lambda path: linked(path.parent, os.symlink) / path.name,
}


def linked(path, link):
    other = path.with_name("other.h5")
    link(path, other)
    return other


@pytest.mark.parametrize("mode", ["w", "a", "overwrite"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_path_has_one_writer_of_this_process(path, spelling, mode):
    first = begin(path)
    other = SPELLINGS[spelling](path)
    with pytest.raises(TraceFileError, match=HERE):
        FileSink(other, coded.HEADER, mode)
    with pytest.raises(TraceFileError, match=HERE):
        grutrace.Statistics(other, mode=mode)
    first.append(coded.block(1, "big"))
    first.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 2
    if mode == "overwrite":
        # Control: now it may.
        begin(other, mode).close()


def test_statistics_have_one_writer_of_this_process(path):
    layer, statistics = nn.GRU(3, 4), grutrace.Statistics(path)
    with (
        grutrace.trace(layer, sink=statistics),
        # Two tracers of the same statistics are one writer.
        grutrace.trace(layer, sink=statistics),
    ):
        layer(torch.randn(5, 2, 3))
        for mode in ("overwrite", "a"):
            with pytest.raises(TraceFileError, match=HERE):
                grutrace.Statistics(path, mode=mode)
        with pytest.raises(TraceFileError, match=HERE):
            counted().save(path, mode="overwrite")
        with pytest.raises(TraceFileError, match=HERE):
            begin(path, "overwrite")
    assert grutrace.Statistics.load(path).calls == 2
    # Those that nobody counts into any more write nothing.
    assert counted(path, mode="a").calls == 3


def test_later_statistics_are_not_replaced(path):
    layer, earlier = nn.GRU(3, 4), counted(path)
    later = counted(path, mode="overwrite")
    before = path.read_bytes()
    with pytest.raises(TraceFileError, match="was replaced by another file"):
        grutrace.Tracer(layer, sink=earlier)
    assert path.read_bytes() == before
    assert later.calls == 1


def test_a_new_writer_waits_for_one_that_is_closing(path):
    """As in a notebook cell that runs twice."""
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    for call in range(30):
        sink.append(coded.block(call, "big"))
    del sink
    begin(path, "overwrite").close()
    assert until(lambda: not writer_thread._running)
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 1


WRITES = """
import sys
from tests.storage.write.test_claims import begin, counted
import grutrace, torch
path, what = sys.argv[1:]
if what == "trace":
    sink = begin(path)
else:
    layer = torch.nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, sink=grutrace.Statistics(path))
    tracer.start()
    layer(torch.randn(5, 2, 3))
    tracer.flush()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["trace", "statistics"])
def test_a_path_has_one_writer_of_all_processes(path, what):
    with forks.start("-c", WRITES, path, what) as other:
        assert other.stdout.readline() == "written\n"
        before = path.read_bytes()
        for writer in WRITERS:
            with pytest.raises(TraceFileError, match=ELSEWHERE):
                WRITERS[writer](path)
        if what == "trace":
            with pytest.raises(TraceFileError, match="another process is writing it"):
                FileSink(path, coded.HEADER, "a")
        assert path.read_bytes() == before
        other.kill()
    # Control: a writer that was killed holds nothing back.
    WRITERS["statistics"](path)
    if what == "trace":
        with pytest.raises(TraceFileError, match="grutrace recover"):
            FileSink(path, coded.HEADER, "a")
    begin(path, "overwrite").close()


def test_a_reader_of_another_process_does_not_keep_a_writer_out(path):
    coded.write(path, "big", calls=1)
    code = "import h5py, sys; file = h5py.File(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with forks.start("-c", code, path) as reader:
        assert reader.stdout.readline() == "1\n"
        assert locks.is_locked(path)
        begin(path, "overwrite").close()


def test_a_forked_child_neither_writes_nor_unlocks(path):
    sink = begin(path)
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert locks.is_locked(path)
    sink.close()
    assert locks.is_locked(path) is False


@pytest.mark.parametrize("locked", [None, True, False])
def test_without_file_locks_overwriting_warns(path, monkeypatch, locked):
    killed(path)
    monkeypatch.setattr("grutrace.storage.write.overwrite.is_locked", lambda _: locked)
    if locked is None:
        with pytest.warns(grutrace.GrutraceWarning, match="no file locks") as caught:
            begin(path, "overwrite").close()
        assert len(caught) == 1
    elif locked:
        with pytest.raises(TraceFileError, match=ELSEWHERE):
            begin(path, "overwrite")
    else:
        begin(path, "overwrite").close()
    if not locked:
        # Of a trace that was closed it is known.
        begin(path, "overwrite").close()


LOSSES = {
    "deleted": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("moved.h5")),
    "replaced by a trace": lambda path: replace(path),
    "replaced by text": lambda path: replace_by_text(path),
    "written over": lambda path: path.write_text("precious"),
}


def replace(path):
    other = path.with_name("other.h5")
    coded.write(other, "big", calls=1)
    other.replace(path)


def replace_by_text(path):
    path.unlink()
    path.write_text("precious")


def left(path):
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("news", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_file_is_an_error_at_the_next_flush(path, loss, news):
    sink = begin(path)
    LOSSES[loss](path)
    there = left(path)
    if news:
        sink.append(coded.block(1, "big"))
    with pytest.raises(SinkError, match=r"run\.h5 was (deleted or moved|replaced|overwritten)"):
        sink.flush()
    try:
        sink.close()
    except SinkError as error:
        assert "run.h5 was" in str(error)  # noqa: PT017
    assert left(path) == there
    if loss == "moved":
        with open_trace(path.with_name("moved.h5")) as trace:
            assert coded.check_trace(trace) == 1 + news
            assert trace.closed


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_file_is_an_error_when_it_is_closed(path, loss):
    sink = begin(path)
    sink.append(coded.block(1, "big"))
    LOSSES[loss](path)
    there = left(path)
    with pytest.raises(SinkError, match=r"run\.h5 was"):
        sink.close()
    assert left(path) == there
    if loss == "moved":
        with open_trace(path.with_name("moved.h5")) as trace:
            assert coded.check_trace(trace) == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_statistics_file_is_an_error(path, loss):
    layer = nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, sink=grutrace.Statistics(path))
    tracer.start()
    layer(torch.randn(5, 2, 3))
    tracer.flush()
    LOSSES[loss](path)
    there = left(path)
    with pytest.raises(SinkError, match=r"run\.h5 was (deleted or moved|replaced)"):
        tracer.flush()
    layer(torch.randn(5, 2, 3))
    with pytest.raises(SinkError, match=r"run\.h5 was (deleted or moved|replaced)"):
        tracer.close()
    assert left(path) == there


def test_with_on_error_warn_the_model_continues_without_its_file(path):
    layer = nn.GRU(3, 4)
    tracer = grutrace.Tracer(layer, path, on_error="warn")
    tracer.start()
    layer(torch.randn(5, 2, 3))
    path.unlink()
    with pytest.warns(grutrace.GrutraceWarning, match="was deleted or moved"):
        tracer.flush()
    layer(torch.randn(5, 2, 3))
    with pytest.warns(grutrace.GrutraceWarning, match="are lost"):
        tracer.close()
    assert os.listdir(path.parent) == []


def test_a_path_whose_file_was_deleted_is_free(path):
    first = begin(path)
    path.unlink()
    second = begin(path)
    with pytest.raises(SinkError, match="was replaced"):
        first.close()
    second.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 1


@pytest.mark.parametrize("name", ["[x]", "run [1]", "[!a]*?"])
def test_folders_and_files_with_brackets(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    layer = nn.GRU(3, 4)
    for file in ("run.h5", "run[1].h5"):
        path = folder / file
        for rank in range(2):
            with grutrace.trace(layer, path, shard=(rank, 2)):
                layer(torch.randn(5, 2, 3))
        pattern = path.with_name(f"{path.stem}.rank*.h5")
        with grutrace.open(pattern) as trace:
            assert len(trace.calls) == 2
        with grutrace.trace(layer, path, mode="overwrite"):
            layer(torch.randn(5, 2, 3))
        with grutrace.trace(layer, path, mode="a"):
            layer(torch.randn(5, 2, 3))
        with grutrace.open(path) as trace:
            assert len(trace.calls) == 2
            assert trace.to_dask("l0", "update").compute(scheduler="synchronous").shape == (20, 4)


def test_a_glob_of_folders_with_brackets(tmp_path):
    """Brackets in names match themselves, and the rest of the glob still works."""
    from grutrace.storage.shards.open_files import matching_files

    for folder in ("a1", "a[1]", "b1"):
        (tmp_path / folder).mkdir()
        for file in ("x1.h5", "x[1].h5"):
            (tmp_path / folder / file).touch()

    def found(pattern):
        return [
            os.path.relpath(matching_file, tmp_path)
            for matching_file in matching_files(f"{tmp_path}/{pattern}")
        ]

    assert found("a[1]/x*.h5") == ["a[1]/x1.h5", "a[1]/x[1].h5"]
    assert found("[ab]1/x[1].h5") == ["a1/x[1].h5", "b1/x[1].h5"]
    assert found("b[1]/x?.h5") == ["b1/x1.h5"]
    assert found("b[1]/x[1]*.h5") == ["b1/x1.h5"]
    assert found("a*/x[1]?h5") == ["a1/x1.h5", "a[1]/x1.h5"]
    assert found("c[1]/*") == []


#: A file system whose flock() fails.
NO_LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("LOCK_ERROR")); return -1; }
"""

#: A program that writes, reads, overwrites and merges files. Its arguments are the path of a file
#: in a folder of its own, and errors of flock(), one after another.
USES = """
import os, sys
import torch, grutrace
from grutrace.storage.shards.merge import merge_shards

def use(path):
    layer = torch.nn.GRU(3, 4)
    for mode in ("w", "overwrite", "a"):
        with grutrace.trace(layer, path, mode=mode) as tracer:
            layer(torch.randn(5, 2, 3))
            tracer.flush()
            assert tracer["l0"].hidden.shape == (20 if mode == "a" else 10, 4)
            with grutrace.open(path) as trace:
                assert len(trace.calls) == 1 + (mode == "a")
            try:
                grutrace.Tracer(layer, path, mode="overwrite")
            except grutrace.TraceFileError as error:
                assert "of this process" in str(error)
            else:
                raise AssertionError
        statistics = grutrace.Statistics(path + ".stats", mode=mode)
        with grutrace.trace(layer, sink=statistics):
            layer(torch.randn(5, 2, 3))
    for rank in range(2):
        with grutrace.trace(layer, path, shard=(rank, 2), mode="overwrite"):
            layer(torch.randn(5, 2, 3))
    merge_shards(path.replace(".h5", ".rank*.h5"), path + ".merged")
    with grutrace.open(path + ".merged") as trace:
        assert len(trace.calls) == 2

for error in sys.argv[2:]:
    os.environ["LOCK_ERROR"] = error
    folder = os.path.join(os.path.dirname(sys.argv[1]), error)
    os.mkdir(folder)
    use(os.path.join(folder, os.path.basename(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a C compiler on Linux puts flock() aside")
    folder = tmp_path_factory.mktemp("locks")
    (folder / "lock.c").write_text(NO_LOCKS)
    library = folder / "lock.so"
    command = [compiler, "-shared", "-fPIC", "-o", library, folder / "lock.c"]
    subprocess.run(command, check=True)
    return library


def run_without_locks(library, errors, path, **environment):
    preload = {"LD_PRELOAD": str(library), "LOCK_ERROR": str(errors[0])}
    return subprocess.run(
        [sys.executable, "-c", USES, path, *map(str, errors)],
        env=os.environ | preload | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_file_system_without_locks(tmp_path, no_locks):
    errors = sorted(locks.NO_LOCKS)
    done = run_without_locks(no_locks, errors, tmp_path / "run.h5")
    assert done.returncode == 0, done.stderr
    for error in errors:
        # It is known that the traces were closed, but not that the statistics were.
        assert f"{error}/run.h5: no file locks" not in done.stderr
        warning = f"{error}/run.h5.stats: no file locks are available, so another process may be"
        assert warning in done.stderr


def test_control_an_environment_that_requires_locks_is_named(tmp_path, no_locks):
    variable = {"HDF5_USE_FILE_LOCKING": "TRUE"}
    done = run_without_locks(no_locks, [37], tmp_path / "run.h5", **variable)
    assert done.returncode
    assert "set HDF5_USE_FILE_LOCKING=FALSE" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("missing", ["fcntl", "fcntl and all that Windows has not"])
def test_a_python_without_fcntl(tmp_path, missing):
    before = "import sys; sys.modules['fcntl'] = None\n"
    if "Windows" in missing:
        names = ("preadv", "pread", "register_at_fork", "fork", "memfd_create", "listxattr")
        before += "import os\n" + "".join(
            f"if hasattr(os, {name!r}): del os.{name}\n" for name in names
        )
        # What the standard library itself asks for at import.
        before = "import random, threading, logging, concurrent.futures.thread, torch\n" + before
    done = subprocess.run(
        [sys.executable, "-c", before + USES, tmp_path / "run.h5", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "another process may be writing" in done.stderr


def test_errors_are_grutrace_errors(path):
    path.write_text("precious")
    with pytest.raises(GrutraceError):
        begin(path, "overwrite")
    assert Path(path).read_text() == "precious"
