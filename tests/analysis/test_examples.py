"""The docstring example of every public analysis and of `grutrace.Statistics` runs."""

from __future__ import annotations

import doctest
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import dask
import pytest

import grutrace
from grutrace import analysis

NAMES = {name: getattr(analysis, name) for name in analysis.__all__}
OBJECTS = {**NAMES, "Statistics": grutrace.Statistics}


def failures(function: object, name: str) -> tuple[int, int]:
    """How many lines of an example fail, and how many there are."""
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={}):
        runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", OBJECTS)
def test_the_example_of_a_public_name_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # dask's own threads would stay after the test.
    with ThreadPoolExecutor(2) as pool, dask.config.set(scheduler="threads", pool=pool):
        failed, attempted = failures(OBJECTS[name], name)
    assert not failed
    assert attempted


def test_the_example_of_the_package_runs() -> None:
    assert failures(import_module("grutrace.analysis"), "grutrace.analysis")[0] == 0


def test_control_an_example_that_is_wrong_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        """Do nothing.

        >>> 1 + 1
        3
        """

    assert failures(wrong, "wrong") == (1, 1)
    assert "Expected" in capsys.readouterr().out
