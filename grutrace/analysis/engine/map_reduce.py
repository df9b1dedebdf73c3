"""Map an analysis over blocks of a site and reduce the results, on threads or on dask.

An analysis defines what it keeps of some steps and how to merge two such results in order. Blocks
and the order of merging are the same on threads of this process, on dask's threads and on a
cluster, so the results are the same too.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from grutrace.analysis.engine.segments import (
    DERIVED_INPUTS,
    PREVIOUS,
    SequenceSegment,
    iter_segments,
)
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data
from grutrace.errors import OptionError, require_extra
from grutrace.records import Array

#: Largest number of threads. Each holds a block of rows, and they share the reading.
MAX_THREADS = 4

#: Largest number of pending results on dask.
MAX_PENDING = 32


def with_dask(site: SiteLike) -> SiteData:
    """Return the same site, marked so that every analysis of it runs on dask.

    It runs on dask's threads, or on the cluster of the active `dask.distributed.Client`. The
    results are bit for bit those without dask, because the same blocks are merged in the same
    order. Gates that are derived when read agree to rounding in a process where torch has another
    number of threads.

    Args:
        site: A site of a trace, or arrays.

    Raises:
        MissingExtraError: dask is not installed.
        OptionError: As for `as_site_data`.

    Example:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, saturation, with_dask
        >>> site = SiteArrays(update=np.full((100, 2), 0.95))
        >>> saturation(with_dask(site)).right["update"]
        array([1., 1.])
    """
    with require_extra("computing on dask", "dask"):
        import dask  # noqa: F401
    found = as_site_data(site)
    found.dask = True
    return found


def run_on_dask(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield the results of the tasks in order, computing several at once on dask."""
    from dask.base import compute
    from dask.delayed import delayed

    for start in range(0, len(tasks), MAX_PENDING):
        some = [delayed(task, pure=False)() for task in tasks[start : start + MAX_PENDING]]
        yield from compute(*some)


def uses_other_processes() -> bool:
    """Return whether dask's current scheduler runs tasks in other processes."""
    from dask import local, threaded
    from dask.base import get_scheduler

    return get_scheduler() not in (None, threaded.get, local.get_sync)


def run_on_threads(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield the results of the tasks in order, computing several at once on several cores.

    NumPy, BLAS and LAPACK release the interpreter lock.
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
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


#: Approximate size of the rows of one task, in bytes. Large compared with the cost of scheduling.
PART_BYTES = 64 * 1024 * 1024

#: Size of a block in memory, in bytes. Large, because threads with little work wait for each other.
BLOCK_BYTES = 8 * 1024 * 1024


class _Mergeable(Protocol):
    def merge(self, later: Any) -> None: ...


class RowReducer(Protocol):
    """Accumulates rows, in the order in which they are stored."""

    def add(self, rows: Mapping[str, Array]) -> None:
        """Add a block: by quantity, (n, H)."""

    def merge(self, later: Self) -> None:
        """Add the result of later rows."""


class SequenceReducer(Protocol):
    """Accumulates sequences, each in the order of computation."""

    def add(self, segment: SequenceSegment) -> None:
        """Add the next segment."""

    def merge(self, later: Self) -> None:
        """Add the result of later sequences."""


RowReducerT = TypeVar("RowReducerT", bound=RowReducer)
SequenceReducerT = TypeVar("SequenceReducerT", bound=SequenceReducer)
MergeableT = TypeVar("MergeableT", bound="_Mergeable")
ResultT = TypeVar("ResultT")


def reduce_rows(
    site: SiteData, quantities: Sequence[str], make_reducer: Callable[[], RowReducerT]
) -> RowReducerT:
    """Reduce all rows of some quantities.

    Args:
        site: The site.
        quantities: Names of the quantities; each block has all of them, for the same rows.
        make_reducer: Makes an empty reducer. Must be picklable for a cluster: a class or a
            `partial`.

    Raises:
        NotRecordedError: A quantity was not recorded.
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
    """Reduce all sequences, each in the order of computation.

    Args:
        site: The site.
        quantities: Names of the quantities, and `PREVIOUS`, `WEIGHTS` and `RESTARTS` as for
            `iter_segments`.
        make_reducer: Makes an empty reducer. Must be picklable for a cluster: a class or a
            `partial`.

    Raises:
        NotRecordedError: A quantity was not recorded.
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
    for segment in iter_segments(site, quantities, first, last):
        reducer.add(segment)
    return reducer


def run_tasks(site: SiteData, tasks: Sequence[Callable[[], ResultT]]) -> Iterator[ResultT]:
    """Yield the results of the tasks in order, on threads or on dask, and report progress.

    Raises:
        OptionError: dask would run in processes that cannot read the site.
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
