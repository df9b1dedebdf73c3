"""Tests of map-reduce: every row is processed once, for any parts and any scheduler."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from grutrace.analysis.engine import map_reduce, segments
from grutrace.analysis.engine.map_reduce import reduce_rows, reduce_sequences, with_dask
from grutrace.analysis.engine.site_data import SiteArrays, as_site_data
from grutrace.errors import NotRecordedError
from tests import forks
from tests.analysis import sites


class Rows:
    """Keeps every row, so that none is missed, seen twice or out of order."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def add(self, rows) -> None:
        self.seen.append(np.concatenate([rows["update"], rows["hidden"]], axis=1))

    def merge(self, later) -> None:
        self.seen += later.seen


class Sequences:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int, np.ndarray]] = []

    def add(self, segment) -> None:
        self.seen.append((segment.sequence, segment.start, segment.values["update"]))

    def merge(self, later) -> None:
        self.seen += later.seen


@pytest.fixture(params=["here", "dask"])
def where(request):
    if request.param == "here":
        yield as_site_data
        return
    dask = pytest.importorskip("dask")
    with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler="threads", pool=pool):
        yield with_dask


@pytest.fixture(params=[1, 500, 10**9])
def part(request, monkeypatch):
    monkeypatch.setattr(map_reduce, "PART_BYTES", request.param)
    monkeypatch.setattr(map_reduce, "BLOCK_BYTES", max(1, request.param // 3))
    monkeypatch.setattr(segments, "BLOCK_BYTES", max(1, request.param // 3))


@pytest.mark.usefixtures("part")
def test_all_rows(where) -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        site = trace[name]
        result = np.concatenate(reduce_rows(where(site), ("update", "hidden"), Rows).seen)
        np.testing.assert_array_equal(result, np.concatenate([site.update, site.hidden], axis=1))


@pytest.mark.usefixtures("part")
def test_all_sequences(where) -> None:
    trace = sites.in_memory()
    for name in trace.sites:
        site = trace[name]
        seen = reduce_sequences(where(site), ("update",), Sequences).seen
        assert [entry[:2] for entry in seen] == sorted(entry[:2] for entry in seen)
        for number in range(len(site)):
            own = np.concatenate([values for of, _, values in seen if of == number])
            way = slice(None, None, -1 if site.site.reverse else 1)
            np.testing.assert_array_equal(own[way], site.sequence(number).update)


def test_a_cluster_of_two_processes_finds_the_same(tmp_path) -> None:
    """See `cluster`; and what is in the memory of this process is refused by name."""
    pytest.importorskip("distributed")
    paths = tmp_path / "stored.h5", tmp_path / "deferred.h5"
    with sites.in_a_file(paths[0]), sites.in_a_file(paths[1], "deferred"):
        done = forks.run("-m", "tests.analysis.cluster", *paths, env=os.environ | forks.DASK)
    assert done.returncode == 0, done.stderr
    same, refusal = done.stdout.splitlines()
    assert same == "the same"
    assert refusal.startswith("'l0' is in memory, which other processes cannot read")


def test_progress_is_reported() -> None:
    of, told = as_site_data(sites.in_memory()["encoder.l0"]), []
    of.advance = lambda done, total: told.append((done, total))
    reduce_rows(of, ("update", "hidden"), Rows)
    assert told == [(1, 1)]


def test_empty_input() -> None:
    empty = as_site_data(SiteArrays(update=np.zeros((0, 3)), hidden=np.zeros((0, 3)), lengths=[]))
    assert reduce_rows(empty, ("update", "hidden"), Rows).seen == []
    assert reduce_sequences(empty, ("update",), Sequences).seen == []


def test_a_missing_quantity_is_an_error_before_any_read() -> None:
    of = as_site_data(SiteArrays(update=np.zeros((3, 2))))
    with pytest.raises(NotRecordedError, match="no 'hidden'"):
        reduce_rows(of, ("update", "hidden"), Rows)
    with pytest.raises(NotRecordedError, match="no 'hidden'"):
        reduce_sequences(of, ("update", "previous"), Sequences)
