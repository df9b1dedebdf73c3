"""Tests of the file sink's thread: its queue, its errors, its end."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from grutrace.errors import GrutraceWarning, OptionError, SinkError, TraceFileError
from grutrace.storage.open import open_sink, open_source, open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.write import writer_thread
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.file_sink import FileSink
from grutrace.storage.write.writer import Writer
from tests import forks
from tests.storage import coded
from tests.storage.oracle import check_trace
from tests.storage.streams import full_stream


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


class Gate:
    """Holds the writer back until it is opened; and counts what went through."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.passed = 0
        write = Writer.write

        def held(writer, record):
            assert self.open.wait(20)
            self.passed += 1
            write(writer, record)

        monkeypatch.setattr(Writer, "write", held)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def append_in_thread(sink, calls):
    done = []

    def work():
        for call in calls:
            sink.append(coded.block(call, "big"))
            done.append(call)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, done


def test_append_waits_while_the_queue_is_full(path, monkeypatch):
    gate = Gate(monkeypatch)
    size = coded.block(0, "big").nbytes
    sink = FileSink(path, coded.HEADER, queue_bytes=3 * size + size // 2)
    sink.append(coded.weights())
    thread, done = append_in_thread(sink, range(20))
    assert until(lambda: len(done) == 3)
    time.sleep(0.2)
    assert len(done) == 3
    gate.open.set()
    thread.join(20)
    sink.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 20


def test_control_a_large_queue_does_not_wait(path, monkeypatch):
    gate = Gate(monkeypatch)
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    thread, done = append_in_thread(sink, range(20))
    assert until(lambda: len(done) == 20)
    gate.open.set()
    thread.join()
    sink.close()


def test_memory_stays_bounded_while_the_writer_is_slow(path, monkeypatch):
    gate = Gate(monkeypatch)
    size = coded.block(0, "big").nbytes
    sink = FileSink(path, coded.HEADER, queue_bytes=4 * size)
    sink.append(coded.weights())
    made = []

    def alive():
        return sum(reference() is not None for reference in made)

    def work():
        for call in range(30):
            block = coded.block(call, "big")
            made.append(weakref.ref(block))
            sink.append(block)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    assert 4 <= alive() <= 6
    gate.open.set()
    thread.join()
    sink.close()
    gc.collect()
    assert (len(made), alive()) == (30, 0)


def test_a_record_larger_than_the_queue_goes_through(path):
    sink = FileSink(path, coded.HEADER, queue_bytes=1)
    sink.append(coded.weights())
    for call in range(5):
        sink.append(coded.block(call, "big"))
    sink.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 5


@pytest.mark.parametrize("at_close", [False, True])
def test_an_error_in_the_thread_reaches_the_next_call(path, monkeypatch, at_close):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    for call in range(3):
        sink.append(coded.block(call, "big"))
    sink.flush()

    def full(appender, items):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DatasetAppender, "_write_items", full)
    block = coded.block(3, "big")
    gone = weakref.ref(block)
    sink.append(block)
    del block
    if not at_close:
        with pytest.raises(SinkError, match=r"run\.h5.*No space left") as caught:
            sink.flush()
        assert isinstance(caught.value.__cause__, SinkError)
        for call in range(4, 50):
            with pytest.raises(SinkError, match="No space left"):
                sink.append(coded.block(call, "big"))
        sink.close()
    else:
        with pytest.raises(SinkError, match=r"run\.h5.*No space left"):
            sink.close()
    sink.close()
    monkeypatch.undo()
    gc.collect()
    assert gone() is None, "memory is still held"
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 3
        assert not trace._source.refresh().closed


def test_an_error_wakes_waiting_threads(path, monkeypatch):
    failing = threading.Event()

    def fail(writer, record):
        assert failing.wait(20)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "write", fail)
    sink = FileSink(path, coded.HEADER, queue_bytes=1)
    sink.append(coded.weights())
    errors = []

    def work():
        try:
            sink.append(coded.block(0, "big"))
        except SinkError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    failing.set()
    thread.join(20)
    assert len(errors) == 1
    sink.close()


def test_a_trace_of_a_failed_sink_shows_the_committed_rows(path, monkeypatch):
    sink = FileSink(path, coded.HEADER)
    with Trace(open_source(sink)) as trace:
        sink.append(coded.weights())
        sink.append(coded.block(0, "big"))
        sink.flush()
        monkeypatch.setattr(DatasetAppender, "_write_items", lambda *_: 1 / 0)
        sink.append(coded.block(1, "big"))
        with pytest.raises(SinkError):
            sink.flush()
        assert coded.check_trace(trace) == 1
    sink.close()


DISK_FULL = """
import resource, sys
from tests.storage import coded
from grutrace.storage.write.file_sink import FileSink
from grutrace.errors import SinkError
from grutrace.storage.open import open_trace
sink = FileSink(sys.argv[1], coded.HEADER)
sink.append(coded.weights())
flushed = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    for call in range(1000):
        sink.append(coded.block(call, sys.argv[3]))
        if call % 5 == 0:
            sink.flush()
            flushed = call + 1
except SinkError as error:
    print(error, file=sys.stderr)
sink.close()
print(flushed)
"""


@pytest.mark.parametrize("limit", [3_000_000, 4_567_891, 6_000_000])
@pytest.mark.parametrize("shape", coded.SHAPES)
def test_committed_rows_survive_a_full_disk(path, shape, limit):
    """The system limits the file's size, and HDF5 fails at any write."""
    limit = limit * 5 if shape == "big" else limit
    done = forks.run("-c", DISK_FULL, path, str(limit), shape)
    assert done.returncode == 0, done.stderr
    flushed = int(done.stdout)
    assert "run.h5" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < flushed < 1000
    with open_trace(path) as trace:
        assert coded.check_trace(trace) >= flushed


#: A full disk does not keep anyone from writing elsewhere, as the limit does that stands for it.
READER = """
from grutrace.storage.hdf5 import quarantine
from grutrace.storage.open import open_source
from grutrace.storage.read.trace import Trace
trace = Trace(open_source(sink))
open_null = quarantine._open_null
def unlimited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return open_null()
quarantine._open_null = unlimited
"""


def test_a_full_disk_with_a_reader_in_the_same_process(path):
    """HDF5 opens a file once per process, so closing the reader fails too."""
    code = DISK_FULL.replace("flushed = 0\n", f"flushed = 0\n{READER}", 1)
    code += "assert coded.check_trace(trace) >= flushed\n"
    done = forks.run("-c", code, path, "4567891", "stepwise")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    with open_trace(path) as trace:
        assert coded.check_trace(trace) >= int(done.stdout) > 0


def test_a_file_appears_when_it_can_be_read(path, monkeypatch):
    start, seen = Writer._start, []

    def spy(writer, *arguments):
        seen.append(sorted(file.name for file in path.parent.iterdir()))
        start(writer, *arguments)
        seen.append(path.exists())

    monkeypatch.setattr(Writer, "_start", spy)
    FileSink(path, coded.HEADER).close()
    (before,), after = seen
    assert before.startswith("run.h5.new-")
    assert not after
    assert [file.name for file in path.parent.iterdir()] == ["run.h5"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_created_by_another_program_is_not_replaced(path, links, monkeypatch):
    start = Writer._start

    def slow(writer, *arguments):
        start(writer, *arguments)
        path.write_text("theirs")

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    FileSink(path, coded.HEADER).close()
    path.unlink()
    monkeypatch.setattr(Writer, "_start", slow)
    with pytest.raises(TraceFileError, match=r"run\.h5 exists"):
        FileSink(path, coded.HEADER)
    assert path.read_text() == "theirs"
    assert [file.name for file in path.parent.iterdir()] == ["run.h5"]


def test_a_closed_sink_can_be_closed_again_but_not_appended_to(path):
    stream = full_stream()
    sink = FileSink(path, stream.header)
    for record in stream.records:
        sink.append(record)
    sink.close()
    sink.close()
    sink.flush()
    with pytest.raises(SinkError, match="closed"):
        sink.append(stream.records[0])
    with open_trace(path) as trace:
        check_trace(trace, stream.header, stream.records)


@pytest.mark.parametrize("mode", ["x", "r", None])
def test_an_unknown_mode_is_an_error_that_lists_the_modes(path, mode):
    with pytest.raises(OptionError, match="w, overwrite, a"):
        open_sink(path, coded.HEADER, mode)
    assert not path.exists()


def test_an_existing_path_is_refused_at_once(path):
    path.write_text("precious")
    with pytest.raises(TraceFileError, match=r"run\.h5 exists.*overwrite.*'a'"):
        FileSink(path, coded.HEADER)
    assert path.read_text() == "precious"


def test_a_folder_that_is_missing_or_cannot_be_written_is_refused_at_once(path):
    with pytest.raises(TraceFileError, match="no folder"):
        FileSink(path.parent / "missing" / "run.h5", coded.HEADER)
    with pytest.raises(TraceFileError, match=r"/proc/run\.h5 cannot be created"):
        FileSink("/proc/run.h5", coded.HEADER)
    with pytest.raises(TraceFileError, match="not a file"):
        FileSink(path.parent, coded.HEADER, "overwrite")


def test_overwrite_restores_the_old_file_on_failure(path, monkeypatch):
    coded.write(path, "big", calls=1)
    precious = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("grutrace.storage.write.create.create_datasets", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            FileSink(path, coded.HEADER, "overwrite")
    assert path.read_bytes() == precious
    assert os.listdir(path.parent) == ["run.h5"]
    sink = FileSink(path, coded.HEADER, "overwrite")
    sink.close()
    assert os.listdir(path.parent) == ["run.h5"]
    open_trace(path).close()


def test_an_unreferenced_sink_is_closed(path):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "big"))
    del sink
    gc.collect()
    assert until(lambda: not writer_thread._running)
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 1
        assert trace._source.refresh().closed


FORGOTTEN = """
import sys
from tests.storage import coded
from grutrace.storage.write.file_sink import FileSink
sink = FileSink(sys.argv[1], coded.HEADER)
sink.append(coded.weights())
for call in range(20):
    sink.append(coded.block(call, "big"))
"""


def test_an_open_sink_is_closed_at_exit(path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORGOTTEN, path],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 20
        assert trace._source.refresh().closed


def test_an_error_at_exit_is_reported(path, monkeypatch):
    monkeypatch.setattr(DatasetAppender, "_write_items", lambda *_: 1 / 0)
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    with pytest.warns(GrutraceWarning, match=r"run\.h5"):
        writer_thread._close_all()
    sink.close()


@pytest.mark.parametrize("waits_in", ["append", "flush", "close"])
def test_an_interrupt_while_waiting_loses_no_rows(path, monkeypatch, waits_in):
    gate = Gate(monkeypatch)
    sink = FileSink(path, coded.HEADER, queue_bytes=1)
    sink.append(coded.weights())
    wait = {
        "append": lambda: sink.append(coded.block(0, "big")),
        "flush": sink.flush,
        "close": sink.close,
    }[waits_in]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        wait()
    gate.open.set()
    if waits_in != "close":
        sink.append(coded.block(0, "big"))
    sink.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == (waits_in != "close")
        assert trace._source.refresh().closed


def test_many_threads_append_at_once(path):
    sink = FileSink(path, coded.HEADER, queue_bytes=100_000)
    sink.append(coded.weights())
    lock, numbers = threading.Lock(), iter(range(200))

    def work():
        while True:
            with lock:
                call = next(numbers, None)
                if call is None:
                    return
                sink.append(coded.block(call, "stepwise"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 200


class Child:
    """Runs something in a forked child, which ends as a Python process ends."""

    def __init__(self, work, ends_by=os._exit):
        read, write = os.pipe()
        self.process = os.fork()
        if not self.process:
            signal.alarm(20)
            try:
                work()
                message = "ok"
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
            os.write(write, message.encode())
            ends_by(0)
        os.close(write)
        with os.fdopen(read) as stream:
            self.message = stream.read()
        self.status = os.waitpid(self.process, 0)[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_append(path):
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "big"))
    appending = Child(lambda: sink.append(coded.block(1, "big")))
    assert appending.message.startswith("SinkError: ")
    assert "forked child" in appending.message
    flushing = Child(sink.flush)
    assert flushing.message.startswith("SinkError: ")
    closing = Child(sink.close)
    assert closing.message == "ok"
    assert closing.status == 0
    sink.append(coded.block(1, "big"))
    sink.close()
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 2


FORKING = """
import os, sys, time, warnings
# Python warns of any fork beside threads, from 3.12 on.
warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
from tests.storage import coded
from grutrace.storage.open import open_source
from grutrace.storage.write.file_sink import FileSink
from grutrace.storage.read.trace import Trace
sink = FileSink(sys.argv[1], coded.HEADER)
trace = Trace(open_source(sink))
sink.append(coded.weights())
for call in range(200):
    sink.append(coded.block(call, "stepwise"))
    if call % 20 == 0:
        sink.flush()
        coded.check_trace(trace)
    if call % 20 == 7:
        process = os.fork()
        if not process:
            sys.exit(0)  # through all of Python's and HDF5's clean-up
        assert os.waitpid(process, 0)[1] == 0
sink.close()
assert coded.check_trace(trace) == 200
"""


def test_children_that_end_do_not_write_into_the_parents_file(path):
    done = subprocess.run(
        [sys.executable, "-c", FORKING, path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 200
        assert trace._source.refresh().closed


def test_file_sizes_are_unlimited_by_default():
    """The tests of a full disk set a limit of their own, so there must be none before."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
