"""One answer, wherever a site is and however it is gone through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from grutrace.analysis import fold, stretches
from grutrace.analysis.elsewhere import on_dask
from grutrace.analysis.material import SiteArrays
from grutrace.analysis.result import Result

from . import sites


def check_everywhere(
    analyse: Callable[[Any], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The analysis says of each site in memory what it says of it everywhere else."""
    trace = sites.in_memory()
    expected = {name: analyse(trace[name]) for name in trace.sites}
    for name, known in expected.items():
        check_same(analyse(as_arrays(trace[name])), known, rtol=1e-9)
        with on_threads():
            check_same(analyse(on_dask(trace[name])), known, rtol=0)
    for gates in ("inline", "deferred"):
        with sites.in_a_file(tmp_path / f"{gates}.h5", gates) as other:
            for name, known in expected.items():
                # Gates are rounded otherwise where they are computed in other company.
                check_same(analyse(other[name]), known, rtol=1e-3, atol=1e-5)
    with monkeypatch.context() as patched:
        for module, sizes in ((fold, {"PART": 400, "BLOCK": 130}), (stretches, {"BLOCK": 130})):
            for constant, size in sizes.items():
                patched.setattr(module, constant, size)
        for name, known in expected.items():
            small = analyse(trace[name])
            check_same(small, known, rtol=1e-9)
            with on_threads():
                check_same(analyse(on_dask(trace[name])), small, rtol=0)


@contextmanager
def on_threads() -> Iterator[None]:
    """dask's threads, which end with the block."""
    with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler="threads", pool=pool):
        yield


def as_arrays(site: Any) -> SiteArrays:
    """The same site as arrays, the sequences end to end."""
    rows = site.rows_between(0, len(site))
    return SiteArrays(
        **{name: np.asarray(site.rows(name))[rows] for name in site.site.readable},
        lengths=site.lengths,
        initial=np.asarray(site.initial),
        labels={name: site.row_labels(name).to_array()[rows] for name in site.label_names},
        weights=site.weights(),
        reverse=site.site.reverse,
        name=site.name,
    )


def check_same(found: Result, expected: Result, rtol: float, atol: float = 0.0) -> None:
    """Every field of both."""
    assert type(found) is type(expected)
    _check(dataclasses.asdict(found), dataclasses.asdict(expected), rtol, atol or rtol)


def _check(found: Any, expected: Any, rtol: float, atol: float) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            _check(found[key], value, rtol, atol)
    elif np.asarray(expected).dtype.kind in "fc":
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
    else:
        np.testing.assert_array_equal(found, expected)
