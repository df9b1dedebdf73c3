"""The same answer of an analysis wherever its site is, and in whatever blocks it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grutrace
from grutrace.analysis import fold, stretches
from grutrace.analysis.elsewhere import on_dask
from grutrace.analysis.material import SiteArrays
from grutrace.analysis.result import Result
from grutrace.record import GATES
from tests.checks import EVERYTHING

from . import sites

#: What float64 sums of some thousand terms differ by in another order.
ORDER = 1e-11

#: What gates in float32 differ by if they are derived from states: a few roundings of sums of terms
#: of at most 5 or so; and figures that grow out of them at most a thousand times.
DERIVED = 16 * 5 * 6e-8 * 1e3


def numbers(result: Result) -> Iterator[tuple[str, Any]]:
    """All fields that are numbers, by name."""
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        each = value.items() if isinstance(value, dict) else [("", value)]
        for key, array in each:
            if np.asarray(array).dtype.kind in "biuf":
                yield f"{field.name} {key}", np.asarray(array)


def assert_same(found: Result, expected: Result, tolerance: float) -> None:
    ours, theirs = dict(numbers(found)), dict(numbers(expected))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], tolerance, tolerance, err_msg=name)


def check_everywhere(
    analyse: Callable[[Any], Result],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    derived: Callable[[Result, Result], None] | None = None,
) -> None:
    """Compare with the answer in memory; `derived` compares where gates are derived."""
    memory = sites.run(lambda model: grutrace.trace(model, record=EVERYTHING, gates="inline"))
    expected = {name: analyse(memory[name]) for name in memory.sites}
    with sites.in_a_file(folder / "inline.h5") as trace:
        for name, of_site in expected.items():
            assert_same(analyse(trace[name]), of_site, 0)
    with sites.in_a_file(folder / "deferred.h5", "deferred") as trace:
        for name, of_site in expected.items():
            found = analyse(trace[name])
            if derived is None:
                assert_same(found, of_site, DERIVED)
            else:
                derived(found, of_site)
    # Parts of one sequence or a few, blocks of one row or a few.
    for part, block in ((1, 1), (700, 200)):
        with monkeypatch.context() as patch:
            patch.setattr(fold, "PART", part)
            patch.setattr(fold, "BLOCK", block)
            patch.setattr(stretches, "BLOCK", block)
            here = {name: analyse(memory[name]) for name in memory.sites}
            for name, of_site in expected.items():
                assert_same(here[name], of_site, ORDER)
            dask = pytest.importorskip("dask")
            with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler="threads", pool=pool):
                for name in memory.sites:
                    assert_same(analyse(on_dask(memory[name])), here[name], 0)


def as_arrays(site: Any, version: int = 0) -> SiteArrays:
    """The same site as arrays: each sequence read on its own, one after another."""
    quantities = (*GATES, "hidden", "input")
    return SiteArrays(
        lengths=[len(sequence) for sequence in site],
        **{name: np.concatenate([sequence.rows(name) for sequence in site]) for name in quantities},
        initial=np.array([sequence.initial for sequence in site]),
        weights=site.weights(version),
        reverse=site.site.reverse,
        name=site.name,
    )
