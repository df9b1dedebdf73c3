"""Check that an analysis gives one result for every kind of site and every block size."""

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

import grutrace
from grutrace.analysis.engine import map_reduce, segments
from grutrace.analysis.engine.map_reduce import with_dask
from grutrace.analysis.engine.result import Result
from grutrace.analysis.engine.site_data import SiteArrays
from tests.analysis import sites
from tests.checks import EVERYTHING

#: The difference of float64 sums of a thousand terms in another order.
ORDER = 1e-11

#: What gates in float32 differ by if they are derived from states: a few roundings of sums of terms
#: of at most 5 or so; and figures that grow out of them at most a thousand times.
DERIVED = 16 * 5 * 6e-8 * 1e3


def check_everywhere(
    analyse: Callable[[Any], Result],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    derived: Callable[[Result, Result], None] | None = None,
) -> None:
    """Compare with the answer in memory.

    Args:
        analyse: The analysis, of a site.
        folder: For files.
        monkeypatch: The test's.
        derived: How answers are compared where gates are derived, if not within `DERIVED`.
    """
    memory = sites.run(lambda model: grutrace.trace(model, record=EVERYTHING, gates="inline"))
    expected = {name: analyse(memory[name]) for name in memory.sites}
    with on_threads():
        for name, of_site in expected.items():
            assert_same(analyse(with_dask(memory[name])), of_site, 0)
    with sites.in_a_file(folder / "inline.h5") as trace:
        for name, of_site in expected.items():
            assert_same(analyse(trace[name]), of_site, 0)
    with sites.in_a_file(folder / "deferred.h5", "deferred") as trace:
        for name, of_site in expected.items():
            result = analyse(trace[name])
            if derived is None:
                assert_same(result, of_site, DERIVED)
            else:
                derived(result, of_site)
    # Parts of one sequence or a few, blocks of one row or a few.
    for part, block in ((1, 1), (700, 200)):
        with monkeypatch.context() as patch:
            patch.setattr(map_reduce, "PART_BYTES", part)
            patch.setattr(map_reduce, "BLOCK_BYTES", block)
            patch.setattr(segments, "BLOCK_BYTES", block)
            for name, of_site in expected.items():
                here = analyse(memory[name])
                assert_same(here, of_site, ORDER)
                with on_threads():
                    assert_same(analyse(with_dask(memory[name])), here, 0)


@contextmanager
def on_threads() -> Iterator[None]:
    """A pool of threads for dask, which ends with the block."""
    with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler="threads", pool=pool):
        yield


def as_arrays(site: Any, version: int = -1) -> SiteArrays:
    """The same site as arrays, read sequence by sequence."""
    rows = site.rows_between(0, len(site))
    return SiteArrays(
        lengths=[len(sequence) for sequence in site],
        **{
            name: np.concatenate([sequence.rows(name) for sequence in site])
            for name in site.site.available_quantities
        },
        initial=np.array([sequence.initial for sequence in site]),
        labels={name: site.row_labels(name).to_array()[rows] for name in site.label_names},
        weights=site.weights(version),
        reverse=site.site.reverse,
        name=site.name,
    )


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    """Compare every field of two results."""
    assert type(actual) is type(expected)
    _assert_same(dataclasses.asdict(actual), dataclasses.asdict(expected), tolerance)


def _assert_same(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            _assert_same(actual[key], value, tolerance, f"{name} {key}")
    elif np.asarray(expected).dtype.kind in "fc":
        np.testing.assert_allclose(actual, expected, tolerance, tolerance, err_msg=name)
    else:
        np.testing.assert_array_equal(actual, expected, err_msg=name)
