"""Every example in a docstring runs and prints what the docstring shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import types
from pathlib import Path

import dask
import pytest

import grutrace

#: `grutrace.run.boot` changes the interpreter when it is imported.
NOT_IMPORTED = ("grutrace.__main__", "grutrace.run.boot")

MODULES = sorted(
    each.name
    for each in pkgutil.walk_packages(grutrace.__path__, "grutrace.")
    if not each.name.startswith(NOT_IMPORTED)
)

#: Public classes and functions, by module. Each has an example, in its docstring or in those of
#: its methods.
PUBLIC = {
    "grutrace.export.formats": ["export_trace"],
    "grutrace.storage.open": ["open_trace"],
    "grutrace.storage.read.lazy_rows": ["LazyRows"],
    "grutrace.storage.read.sequence": ["Sequence"],
    "grutrace.storage.read.site": ["SiteTrace"],
    "grutrace.storage.read.trace": ["Trace", "Trace.to_dask", "Trace.to_xarray"],
}


def failed_examples(
    module: types.ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Run the examples of each docstring in a folder of its own; return the failing docstrings."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed = []
    for number, examples in enumerate(doctest.DocTestFinder().find(module)):
        current = folder / str(number)
        current.mkdir()
        monkeypatch.chdir(current)
        # Threads of dask outlive a test.
        with dask.config.set(scheduler="synchronous"):
            result = runner.run(examples)
        if result.failed:
            failed.append(examples.name)
    return failed


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failed_examples(importlib.import_module(name), tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    ("name", "member"), [(name, member) for name, members in PUBLIC.items() for member in members]
)
def test_a_public_name_has_an_example(name: str, member: str) -> None:
    found = importlib.import_module(name)
    for part in member.split("."):
        found = getattr(found, part)
    assert "Example:\n" in (found.__doc__ or "")


def test_control_a_wrong_example_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("wrong", "Example:\n    >>> 1 + 1\n    3\n")
    assert failed_examples(module, tmp_path, monkeypatch) == ["wrong"]
