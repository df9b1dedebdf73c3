"""Work handed to dask: to its threads, or to a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grutrace.analysis.material import Analysed, Material, material
from grutrace.errors import MissingExtraError

#: Results that wait to be joined at most, where several are computed at once.
WAITING = 32


def on_dask(site: Analysed) -> Material:
    """The same site, of which every analysis is computed by dask.

    By dask's threads, or by the cluster of the `dask.distributed.Client` that is in force. The
    results are those of the analysis without dask, bit for bit: the same parts are joined in the
    same order.

    Raises:
        OptionError: As for `material`.
        MissingExtraError: There is no dask.
    """
    try:
        import dask  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError(
            'to compute on dask, install it: pip install "grutrace[dask]"'
        ) from None
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
