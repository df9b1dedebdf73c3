"""A reader that follows a growing file sees a consistent prefix at every moment."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager

import pytest

from grutrace.storage.open import open_source, open_trace
from grutrace.storage.read.trace import Trace
from grutrace.storage.write.file_sink import FileSink
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage import coded

#: Seconds that a file is followed, and the extra seconds that a busy machine gets.
SECONDS, PATIENCE = 1.5, 60


def follow(path, seconds):
    """Refresh and check a file for some seconds, and until it grew twice.

    Returns:
        The number of calls after each refresh.
    """
    counts = []
    until = time.monotonic() + seconds
    with open_trace(path) as trace:
        while (now := time.monotonic()) < until or (
            len(set(counts)) < 3 and now < until + PATIENCE
        ):
            counts.append(coded.check_trace(trace))
            trace.refresh()
    assert counts == sorted(counts)
    return counts


@contextmanager
def writing(path, shape):
    """Another process appends calls to the file until the block ends."""
    with forks.start("-m", "tests.storage.coded", path, shape) as process:
        drain = threading.Thread(target=process.stdout.read)
        try:
            process.stdout.readline()
            drain.start()
            yield
        finally:
            process.kill()
            drain.join()


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_following_another_process(shape, tmp_path):
    path = tmp_path / "run.h5"
    with writing(path, shape):
        counts = follow(path, SECONDS)
        coded.check_plain(PlainTrace(path))
    assert len(set(counts)) > 2


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_two_readers_of_a_growing_file_are_independent(shape, tmp_path):
    """HDF5 shares one open file between them, and reads wrong values when one refreshes it."""
    path = tmp_path / "run.h5"
    with writing(path, shape), open_trace(path) as first, open_trace(path) as second:
        until = time.monotonic() + SECONDS
        calls = 0
        while (now := time.monotonic()) < until or (calls < 3 and now < until + PATIENCE):
            for trace, other in ((first, second), (second, first)):
                trace.refresh()
                calls = coded.check_trace(trace)
                coded.check_trace(other)
    assert calls > 2


def test_a_file_opened_twice_is_read_correctly(tmp_path):
    path = tmp_path / "run.h5"
    coded.write(path, "big", calls=5)
    with open_trace(path) as first, open_trace(path) as second:
        assert len(second["rnn.l0"].update) > 2 * 1024  # some chunks
        assert coded.check_trace(second) == coded.check_trace(first) == 5


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_following_in_the_same_process(shape, tmp_path):
    path = tmp_path / "run.h5"
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    stopped = threading.Event()

    def write():
        for call in itertools.count():
            if stopped.is_set():
                return
            sink.append(coded.block(call, shape))
            time.sleep(coded.PAUSES[shape])
            if call % 10 == 0:
                sink.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        counts = follow(path, SECONDS)
    finally:
        stopped.set()
        writer.join()
        sink.close()
    assert len(set(counts)) > 2


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_a_sink_shows_what_was_appended_at_once(shape, tmp_path):
    sink = FileSink(tmp_path / "run.h5", coded.HEADER)
    with Trace(open_source(sink)) as trace:
        sink.append(coded.weights())
        for call in range(10):
            sink.append(coded.block(call, shape))
            assert coded.check_trace(trace) == call + 1
        sink.close()
        assert coded.check_trace(trace) == 10


def test_other_programs_can_open_the_file_after_closing(tmp_path):
    """A reader of this process still has it open. HDF5 would leave it marked as being written."""
    path = tmp_path / "run.h5"
    sink = FileSink(path, coded.HEADER)
    code = "import h5py, sys; print(len(h5py.File(sys.argv[1], 'r')['calls']))"
    with Trace(open_source(sink)) as trace:
        sink.append(coded.weights())
        sink.append(coded.block(0, "big"))
        assert coded.check_trace(trace) == 1
        being_written = forks.run("-c", code, path)
        assert being_written.returncode != 0
        sink.close()
        assert forks.run("-c", code, path).stdout == "1\n"
        assert coded.check_trace(trace) == 1


def test_a_snapshot_does_not_change_until_refresh(tmp_path):
    path = tmp_path / "run.h5"
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "stepwise"))
    sink.flush()
    with open_trace(path) as trace:
        site = trace["rnn.l0"]
        sequence, rows = site.sequence(0), site.update
        sink.append(coded.block(1, "stepwise"))
        sink.flush()
        assert (len(site), len(sequence), len(rows), len(trace.calls)) == (8, 1, 8, 1)
        trace.refresh()
        assert (len(site), len(sequence), len(rows), len(trace.calls)) == (8, 1, 8, 2)
        assert len(site.sequence(0)) == 2
        assert len(site.update) == 16
    sink.close()


def test_a_trace_commits_without_a_flush(tmp_path, monkeypatch):
    """Records are committed after half a second without a new one."""
    path = tmp_path / "run.h5"
    sink = FileSink(path, coded.HEADER)
    sink.append(coded.weights())
    sink.append(coded.block(0, "stepwise"))
    with open_trace(path) as trace:
        until = time.monotonic() + 5
        while not len(trace.calls) and time.monotonic() < until:
            time.sleep(0.05)
            trace.refresh()
        assert len(trace.calls) == 1
    sink.close()
