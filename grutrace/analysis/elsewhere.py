"""Work handed out: to threads of this process, to dask's threads, or to a cluster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grutrace.analysis.material import Analysed, Material, material
from grutrace.errors import needing

#: Parts that are computed at once at most. Each holds a block of rows, and they share the reading.
THREADS = 4

#: Results that wait to be joined at most, where several are computed at once.
WAITING = 32


def on_dask(site: Analysed) -> Material:
    """The same site, of which every analysis is computed by dask.

    By dask's threads, or by the cluster of the `dask.distributed.Client` that is in force. The
    results are those of the analysis without dask, bit for bit: the same parts are joined in the
    same order. Gates that are derived when they are read are the same to rounding in a process
    where torch has another number of threads.

    Raises:
        OptionError: As for `material`.
        MissingExtraError: There is no dask.
    """
    with needing("computing on dask", "dask"):
        import dask  # noqa: F401
    found = material(site)
    found.dask = True
    return found


def computed(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield what each task returns, in order; some are computed at once."""
    from dask.base import compute
    from dask.delayed import delayed

    for start in range(0, len(tasks), WAITING):
        some = [delayed(task, pure=False)() for task in tasks[start : start + WAITING]]
        yield from compute(*some)


def other_processes() -> bool:
    """Whether dask would now compute in other processes."""
    from dask import local, threaded
    from dask.base import get_scheduler

    return get_scheduler() not in (None, threaded.get, local.get_sync)


def computed_here(tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield what each task returns, in order; on several cores, some are computed at once.

    NumPy, BLAS and LAPACK leave other threads to run meanwhile.
    """
    threads = min(THREADS, _cores(), len(tasks))
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


def _cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
