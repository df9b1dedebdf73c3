"""After a writer is killed, every acknowledged row is present and complete."""

from __future__ import annotations

import random
import time

import h5py
import numpy as np
import pytest

from grutrace.storage.open import open_trace
from tests import forks
from tests.plain_reader import PlainTrace
from tests.storage import coded

TRIES = 10


def run_until_killed(path, shape, seconds, *compression):
    """The number of calls that the writer had acknowledged when it was killed."""
    with forks.start("-m", "tests.storage.coded", path, shape, *compression) as process:
        assert process.stdout.readline() == "0\n"
        time.sleep(seconds)
        process.kill()
        acknowledged = process.stdout.read().split("\n")
    # The last line may have been cut.
    return int(acknowledged[-2]) if len(acknowledged) > 1 else 0


@pytest.mark.parametrize("shape", coded.SHAPES)
def test_acknowledged_rows_survive_the_writer(shape, tmp_path):
    chance = random.Random(20)
    most = 0
    for attempt in range(TRIES):
        path = tmp_path / f"{attempt}.h5"
        acknowledged = run_until_killed(path, shape, chance.uniform(0, 0.4))
        with open_trace(path) as trace:
            result = coded.check_trace(trace)
        plain = PlainTrace(path)
        coded.check_plain(plain)
        assert not plain.closed
        assert result == len(plain.calls) >= acknowledged
        most = max(most, acknowledged)
        path.unlink()
    assert most > 0


def test_control_an_incomplete_row_is_detected(tmp_path):
    path = tmp_path / "run.h5"
    coded.write(path, "stepwise", calls=20)
    with open_trace(path) as trace:
        assert coded.check_trace(trace) == 20
    with h5py.File(path, "r+") as file:
        file["modules/rnn/l0/update"][13, 5] += 1
    with open_trace(path) as trace, pytest.raises(AssertionError):
        coded.check_trace(trace)
    with pytest.raises(AssertionError):
        coded.check_plain(PlainTrace(path))


def test_control_counts_beyond_the_rows_are_detected(tmp_path):
    """A commit in the wrong order would leave such a file."""
    path = tmp_path / "run.h5"
    coded.write(path, "stepwise", calls=20)
    with h5py.File(path, "r+") as file:
        file["modules/rnn/l0/hidden"].resize(19 * coded.SHAPES["stepwise"][0], 0)
    with pytest.raises(OSError, match="hidden"):
        open_trace(path)
    with pytest.raises(AssertionError):
        PlainTrace(path)


def test_coded_rows_are_unique():
    first, second = coded.rows(7, 4), coded.rows(8, 4)
    assert len(np.unique(np.concatenate([first, second]))) == 8 * coded.HIDDEN
