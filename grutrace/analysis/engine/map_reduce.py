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
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from grutrace.analysis.engine.segments import (
    DERIVED_INPUTS,
    PREVIOUS,
    iter_segments,
)
from grutrace.analysis.engine.site_data import SiteData, SiteLike, as_site_data, row_bytes
from grutrace.errors import OptionError, require_extra
from grutrace.records import Array
from grutrace.storage.read.lazy_rows import LazyRows, block_slices, items_per_block

if TYPE_CHECKING:
    from typing_extensions import Self

#: Largest number of threads. Each holds a block of rows, and they share the reading.
MAX_THREADS = 4

#: Largest number of pending results on dask.
MAX_PENDING = 32


def with_dask(site: SiteLike) -> SiteData:
    """Return the same site, marked so that every analysis of it runs on dask.

    It runs on dask's threads, or on the cluster of the active `dask.distributed.Client`. The
    results are bit for bit those without dask, because the same blocks are merged in the same
    order. Deferred gates agree to rounding in a process where torch has another
    number of threads.

    Args:
        site: A site of a trace, or arrays.

    Raises:
        MissingExtraError: dask is not installed.
        OptionError: As for `as_site_data`.

    Examples:
        >>> import numpy as np
        >>> from grutrace.analysis import SiteArrays, saturation, with_dask
        >>> site = SiteArrays(update=np.full((100, 2), 0.95))
        >>> saturation(with_dask(site)).right["update"]
        array([1., 1.])
    """
    with require_extra("computing on dask", "dask"):
        import dask  # noqa: F401
    data = as_site_data(site)
    data.dask = True
    return data


def run_on_dask(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield the results of the tasks in order, computing several at once on dask."""
    from dask.base import compute
    from dask.delayed import delayed

    for start in range(0, len(tasks), MAX_PENDING):
        yield from compute(
            *(delayed(task, pure=False)() for task in tasks[start : start + MAX_PENDING])
        )


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


class Reducer(Protocol):
    """Accumulates blocks of rows in storage order, or sequences in the order of computation."""

    def add(self, block: Any) -> None:
        """Add the next block: by quantity, (n, H); or the next `SequenceSegment`."""

    def merge(self, later: Self) -> None:
        """Add the result of later rows or sequences."""


@runtime_checkable
class BufferingReducer(Protocol):
    """A reducer that keeps what was added to process it together."""

    def finish(self) -> None:
        """Process what was kept, on the thread that added it."""


ReducerT = TypeVar("ReducerT", bound=Reducer)
ResultT = TypeVar("ResultT")
SummaryT = TypeVar("SummaryT")

#: Totals that are merged by an extreme instead of a sum.
EXTREMES = {"minimum": np.minimum, "maximum": np.maximum}


def summarize_rows(
    site: SiteData,
    quantities: Sequence[str],
    summarize: Callable[[Mapping[str, Array]], SummaryT],
    merge: Callable[[SummaryT, SummaryT], None] | None = None,
) -> SummaryT:
    """Summarize all rows of some quantities: each block by itself, then all blocks together.

    Args:
        site: The site.
        quantities: Names of the quantities; each block has all of them, for the same rows.
        summarize: Returns the summary of a block: by quantity, (n, H), n may be 0. Must be
            picklable for a cluster: a function of a module or a `partial` of one.
        merge: Merges the summary of later rows, its second argument, into the first. Default:
            `merge_totals`, for dictionaries.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    make_reducer = partial(_BlockSummaries, summarize, merge or merge_totals)
    summary = reduce_rows(site, quantities, make_reducer).summary
    if summary is not None:
        return summary
    return summarize({name: np.asarray(site.rows(name)[:0]) for name in quantities})


def summarize_each(
    site: SiteData,
    summarize: Mapping[str, Callable[[Mapping[str, Array]], SummaryT]],
    merge: Callable[[SummaryT, SummaryT], None] | None = None,
) -> dict[str, SummaryT]:
    """Summarize all rows of each quantity by itself, several quantities at once.

    Args:
        site: The site.
        summarize: By quantity, as for `summarize_rows`.
        merge: Likewise.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    reducers = reduce_each(
        site,
        {
            name: partial(_BlockSummaries, of_block, merge or merge_totals)
            for name, of_block in summarize.items()
        },
    )
    return {
        name: summarize[name]({name: np.asarray(site.rows(name)[:0])})
        if reducer.summary is None
        else reducer.summary
        for name, reducer in reducers.items()
    }


def merge_totals(totals: Any, later: Any) -> None:
    """Add the totals of later rows, by name: arrays, numbers or lists.

    ``minimum`` and ``maximum`` become the extremes of both.
    """
    for name, value in later.items():
        if name in EXTREMES:
            totals[name] = EXTREMES[name](totals[name], value)
        else:
            totals[name] += value


class _BlockSummaries(Generic[SummaryT]):
    """The merged summary of some blocks; None before the first."""

    def __init__(
        self,
        summarize: Callable[[Mapping[str, Array]], SummaryT],
        merge: Callable[[SummaryT, SummaryT], None],
    ) -> None:
        self._summarize, self._merge_into = summarize, merge
        self.summary: SummaryT | None = None

    def add(self, rows: Mapping[str, Array]) -> None:
        self._take(self._summarize(rows))

    def merge(self, later: _BlockSummaries[SummaryT]) -> None:
        if later.summary is not None:
            self._take(later.summary)

    def _take(self, summary: SummaryT) -> None:
        if self.summary is None:
            self.summary = summary
        else:
            self._merge_into(self.summary, summary)


def reduce_rows(
    site: SiteData, quantities: Sequence[str], make_reducer: Callable[[], ReducerT]
) -> ReducerT:
    """Reduce all rows of some quantities.

    Args:
        site: The site.
        quantities: Names of the quantities; each block has all of them, for the same rows.
        make_reducer: Makes an empty reducer. Must be picklable for a cluster: a class or a
            `partial`.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    return _reduce_parts(site, _row_parts(site, quantities), make_reducer)


def reduce_each(
    site: SiteData, make_reducers: Mapping[str, Callable[[], ReducerT]]
) -> dict[str, ReducerT]:
    """Reduce all rows of each quantity by itself, several quantities at once.

    Args:
        site: The site.
        make_reducers: By quantity, as for `reduce_rows`.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    names, tasks = list[str](), list[Callable[[], ReducerT]]()
    for name, make_reducer in make_reducers.items():
        for part in _row_parts(site, (name,)):
            names.append(name)
            tasks.append(partial(_reduce, make_reducer, part))
    merged = {name: make_reducer() for name, make_reducer in make_reducers.items()}
    for name, reducer in zip(names, run_tasks(site, tasks), strict=True):
        merged[name].merge(reducer)
    return merged


def _row_parts(
    site: SiteData, quantities: Sequence[str]
) -> list[Callable[[], Iterator[dict[str, Array]]]]:
    """Split all rows of some quantities into tasks, each of which yields its blocks."""
    site.require(*quantities)
    return [
        partial(_iter_blocks, site, quantities, part.start, part.stop)
        for part in block_slices(site.steps, PART_BYTES, row_bytes(site, quantities))
    ]


def reduce_sequences(
    site: SiteData,
    quantities: Sequence[str],
    make_reducer: Callable[[], ReducerT],
    part_bytes: int = PART_BYTES,
) -> ReducerT:
    """Reduce all sequences, each in the order of computation.

    Args:
        site: The site.
        quantities: Names of the quantities, and `PREVIOUS`, `WEIGHTS` and `RESTARTS` as for
            `iter_segments`.
        make_reducer: Makes an empty reducer. Must be picklable for a cluster: a class or a
            `partial`.
        part_bytes: Approximate size of the rows of one task; fewer where a row takes much work.

    Raises:
        NotRecordedError: A quantity was not recorded.
    """
    stored = [name for name in quantities if name not in DERIVED_INPUTS]
    stored += ["hidden"] if PREVIOUS in quantities and "hidden" not in stored else []
    site.require(*stored)
    step = items_per_block(part_bytes, row_bytes(site, stored))
    ends, first, parts = np.cumsum(site.lengths), 0, []
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + step, "right")))
        parts.append(partial(iter_segments, site, quantities, first, last))
        first = last
    return _reduce_parts(site, parts, make_reducer)


def _iter_blocks(
    site: SiteData, quantities: Sequence[str], start: int, stop: int
) -> Iterator[dict[str, Array]]:
    """Yield rows `start` to `stop` - 1 in blocks of bounded size, each valid until the next."""
    sources = {name: site.rows(name) for name in quantities}
    buffers = dict[str, Array]()
    for block in block_slices(stop - start, BLOCK_BYTES, row_bytes(site, quantities)):
        part = slice(start + block.start, start + block.stop)
        # New memory costs as much as reading: the system fills it with zeros.
        buffers = buffers or {
            name: np.empty((block.stop, *rows.shape[1:]), rows.dtype)
            for name, rows in sources.items()
            if isinstance(rows, LazyRows)
        }
        yield {
            name: rows.read_into(part, buffers[name][: block.stop - block.start])
            if isinstance(rows, LazyRows)
            else np.asarray(rows[part])
            for name, rows in sources.items()
        }


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
    results = run_on_dask(tasks) if site.dask else run_on_threads(tasks)
    for done, result in enumerate(results, 1):
        yield result
        if site.advance is not None:
            site.advance(done, len(tasks))


def _reduce_parts(
    site: SiteData,
    parts: Sequence[Callable[[], Iterator[Any]]],
    make_reducer: Callable[[], ReducerT],
) -> ReducerT:
    """Reduce the blocks of each part by itself, and merge the results in order."""
    merged = make_reducer()
    for reducer in run_tasks(site, [partial(_reduce, make_reducer, part) for part in parts]):
        merged.merge(reducer)
    return merged


def _reduce(
    make_reducer: Callable[[], ReducerT], iter_blocks: Callable[[], Iterator[Any]]
) -> ReducerT:
    reducer = make_reducer()
    for block in iter_blocks():
        reducer.add(block)
    if isinstance(reducer, BufferingReducer):
        reducer.finish()
    return reducer
