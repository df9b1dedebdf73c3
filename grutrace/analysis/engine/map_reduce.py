"""Going through a site in parts, and joining what was found: here, or on dask, with one result.

An analysis says what it keeps of some steps and how two of these are joined, in order. The parts
are the same wherever they are computed, and so is the order in which they are joined.

Work handed out: to threads of this process, to dask's threads, or to a cluster.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from grutrace.analysis.engine.segments import DERIVED_INPUTS, PREVIOUS, SequenceSegment, stretches
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import OptionError, require_extra
from grutrace.records import Array

#: Parts that are computed at once at most. Each holds a block of rows, and they share the reading.
MAX_THREADS = 4

#: Results that wait to be joined at most, where several are computed at once.
MAX_PENDING = 32


def with_dask(site: SiteLike) -> SiteData:
    """The same site, of which every analysis is computed by dask.

    By dask's threads, or by the cluster of the `dask.distributed.Client` that is in force. The
    results are those of the analysis without dask, bit for bit: the same parts are joined in the
    same order. Gates that are derived when they are read are the same to rounding in a process
    where torch has another number of threads.

    Raises:
        OptionError: As for `as_site_data`.
        MissingExtraError: There is no dask.
    """
    with require_extra("computing on dask", "dask"):
        import dask  # noqa: F401
    found = as_site_data(site)
    found.dask = True
    return found


def run_on_dask(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield what each task returns, in order; some are computed at once."""
    from dask.base import compute
    from dask.delayed import delayed

    for start in range(0, len(tasks), MAX_PENDING):
        some = [delayed(task, pure=False)() for task in tasks[start : start + MAX_PENDING]]
        yield from compute(*some)


def uses_other_processes() -> bool:
    """Whether dask would now compute in other processes."""
    from dask import local, threaded
    from dask.base import get_scheduler

    return get_scheduler() not in (None, threaded.get, local.get_sync)


def run_on_threads(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield what each task returns, in order; on several cores, some are computed at once.

    NumPy, BLAS and LAPACK leave other threads to run meanwhile.
    """
    threads = min(MAX_THREADS, _available_cores(), len(tasks))
    if threads < 2:
        yield from (task() for task in tasks)
        return
    with ThreadPoolExecutor(threads, "grutrace-analysis") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _available_cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


#: What one part reads, about. Large beside the work of handing it out. Bytes.
PART_BYTES = 64 * 1024 * 1024

#: What a part brings into memory at once: much, since threads that do little at a time wait for
#: each other. Bytes.
BLOCK_BYTES = 8 * 1024 * 1024


class _Mergeable(Protocol):
    def merge(self, later: Any) -> None: ...


class RowReducer(Protocol):
    """What is kept of rows, in whatever order they are stored."""

    def add(self, rows: Mapping[str, Array]) -> None:
        """Take in a block: by quantity, (n, H)."""

    def merge(self, later: Self) -> None:
        """Take in what another has kept of the rows after these."""


class SequenceReducer(Protocol):
    """What is kept of sequences, each in the order in which it was made."""

    def add(self, segment: SequenceSegment) -> None:
        """Take in the next stretch."""

    def merge(self, later: Self) -> None:
        """Take in what another has kept of the sequences after these."""


RowReducerT = TypeVar("RowReducerT", bound=RowReducer)
SequenceReducerT = TypeVar("SequenceReducerT", bound=SequenceReducer)
MergeableT = TypeVar("MergeableT", bound="_Mergeable")
ResultT = TypeVar("ResultT")


def reduce_rows(
    site: SiteData, quantities: Sequence[str], make_reducer: Callable[[], RowReducerT]
) -> RowReducerT:
    """Go through all rows of some quantities.

    Args:
        site: Where they are.
        quantities: Which; a block has all of them, of the same rows.
        begin: Makes an empty fold. For a cluster it is sent to: a class, or a `partial` of one.

    Raises:
        NotRecordedError: A quantity is not there.
    """
    site.require(*quantities)
    step = max(1, PART_BYTES // _row_bytes(site, quantities))
    tasks = [
        partial(
            _reduce_row_range, site, quantities, make_reducer, start, min(start + step, site.steps)
        )
        for start in range(0, site.steps, step)
    ]
    return _run_and_merge(site, tasks, make_reducer)


def reduce_sequences(
    site: SiteData, quantities: Sequence[str], make_reducer: Callable[[], SequenceReducerT]
) -> SequenceReducerT:
    """Go through all sequences, each in the order in which it was made.

    Args:
        site: Where they are.
        quantities: Which, and `previous` and `weights` as for `iter_segments`.
        begin: Makes an empty fold. For a cluster it is sent to: a class, or a `partial` of one.

    Raises:
        NotRecordedError: A quantity is not there.
    """
    stored = [name for name in quantities if name not in DERIVED_INPUTS]
    stored += ["hidden"] if PREVIOUS in quantities and "hidden" not in stored else []
    site.require(*stored)
    each = max(1, PART_BYTES // _row_bytes(site, stored))
    ends, first, tasks = np.cumsum(site.lengths), 0, []
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + each, "right")))
        tasks.append(partial(_reduce_sequence_range, site, quantities, make_reducer, first, last))
        first = last
    return _run_and_merge(site, tasks, make_reducer)


def _reduce_row_range(
    site: SiteData,
    quantities: Sequence[str],
    make_reducer: Callable[[], RowReducerT],
    start: int,
    stop: int,
) -> RowReducerT:
    reducer = make_reducer()
    step = max(1, BLOCK_BYTES // _row_bytes(site, quantities))
    sources = {name: site.rows(name) for name in quantities}
    for low in range(start, stop, step):
        part = slice(low, min(low + step, stop))
        reducer.add({name: np.asarray(rows[part]) for name, rows in sources.items()})
    return reducer


def _reduce_sequence_range(
    site: SiteData,
    quantities: Sequence[str],
    make_reducer: Callable[[], SequenceReducerT],
    first: int,
    last: int,
) -> SequenceReducerT:
    reducer = make_reducer()
    for segment in stretches(site, quantities, first, last):
        reducer.add(segment)
    return reducer


def run_tasks(site: SiteData, tasks: Sequence[Callable[[], ResultT]]) -> Iterator[ResultT]:
    """Yield what each task finds, in order, wherever the work on this site is done.

    Raises:
        OptionError: It is to be done by processes that cannot read the site.
    """
    if site.dask and uses_other_processes() and not site.can_read_in_other_process:
        raise OptionError(
            f"{site.name!r} is in memory, which other processes cannot read: trace to a file to "
            "analyse it on a cluster, or use dask's threads"
        )
    found = run_on_dask(tasks) if site.dask else run_on_threads(tasks)
    for done, each in enumerate(found, 1):
        yield each
        if site.advance is not None:
            site.advance(done, len(tasks))


def _run_and_merge(
    site: SiteData,
    tasks: Sequence[Callable[[], MergeableT]],
    make_reducer: Callable[[], MergeableT],
) -> MergeableT:
    joined = make_reducer()
    for reducer in run_tasks(site, tasks):
        joined.merge(reducer)
    return joined


def _row_bytes(site: SiteData, quantities: Sequence[str]) -> int:
    rows = [site.rows(name) for name in quantities]
    return max(1, sum(each.shape[1] * each.dtype.itemsize for each in rows))
