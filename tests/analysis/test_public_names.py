"""Tests of the names in `grutrace.analysis`, and of the modules that importing them loads."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from grutrace import analysis
from grutrace.analysis.registry import ANALYSES

#: Libraries that no import of the package may load by itself.
HEAVY = ("torch", "scipy", "sklearn", "pandas", "dask")

#: Analyses that compute with NumPy only.
NUMPY_ONLY = ("saturation", "moments", "state_age", "compare", "step_jacobians", "selectivity")


def loaded(code: str) -> list[str]:
    """Those of the heavy libraries that are loaded once the code has run."""
    check = f"{code}\nimport sys\nprint(*[each for each in {HEAVY} if each in sys.modules])"
    command = [sys.executable, "-c", check]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_every_public_name_exists() -> None:
    assert sorted(analysis.__all__) == analysis.__all__
    assert dir(analysis) == analysis.__all__
    for name in analysis.__all__:
        assert getattr(analysis, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'happiness'"):
        _ = analysis.happiness


@pytest.mark.parametrize("name", ANALYSES)
def test_every_registered_analysis_has_its_name_here(name: str) -> None:
    spec = ANALYSES[name]
    assert spec.name == name
    assert name in analysis.__all__
    assert getattr(analysis, name) is spec.load()


def test_no_sub_package_has_the_name_of_an_analysis() -> None:
    folder = Path(analysis.__file__).parent
    results = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert results >= {"registry", "descriptive", "memory"}
    assert not results & set(analysis.__all__)


def test_importing_the_names_of_analyses_loads_no_large_library() -> None:
    assert loaded("import grutrace.analysis; dir(grutrace.analysis)") == []
    assert loaded(f"from grutrace.analysis import {', '.join(NUMPY_ONLY)}") == []


def test_control_an_analysis_that_needs_torch_loads_it() -> None:
    assert loaded("from grutrace.analysis import verify") == ["torch"]


def test_the_type_checker_sees_the_names_that_are_loaded() -> None:
    """The imports for the type checker are the table that is used when the program runs."""
    source = Path(analysis.__file__).read_text(encoding="utf-8")
    start = source.index("if TYPE_CHECKING:")
    names: dict[str, object] = {}
    exec(source[start : source.index("__all__")].replace("TYPE_CHECKING", "True"), names)
    for name in analysis.__all__:
        module = import_module(f"grutrace.analysis.{analysis._MODULES[name]}")
        assert names[name] is getattr(module, name)
