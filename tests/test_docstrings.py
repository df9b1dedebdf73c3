"""Examples in docstrings run, and the arguments and attributes in docstrings exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import types
from pathlib import Path

import dask
import pytest

import grutrace

#: `grutrace.run.boot` changes the interpreter when it is imported. The callbacks need a library.
NOT_IMPORTED = (
    *("grutrace.__main__", "grutrace.run.boot"),
    *("grutrace.integrations.lightning", "grutrace.integrations.huggingface"),
)

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(grutrace.__path__, "grutrace.")
    if not module.name.startswith(NOT_IMPORTED)
)

#: Public classes and functions, by module. Each has an example, in its docstring or in those of
#: its methods.
PUBLIC = {
    "grutrace.capture.differentiable.site": ["DifferentiableSite"],
    "grutrace.capture.differentiable.trace": ["DifferentiableTrace"],
    "grutrace.capture.tracer": ["trace"],
    "grutrace.export.formats": ["export_trace"],
    "grutrace.storage.open": ["open_trace"],
    "grutrace.storage.read.lazy_rows": ["LazyRows"],
    "grutrace.storage.read.sequence": ["Sequence"],
    "grutrace.storage.read.site": ["SiteTrace"],
    "grutrace.view.report.report": ["report"],
    "grutrace.view.site_plots": ["SitePlots"],
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


#: Modules whose examples need an extra that may be missing, and the library of the extra.
EXTRAS = {"grutrace.view.live.serve": "bokeh"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    assert failed_examples(module, tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    ("name", "member"), [(name, member) for name, members in PUBLIC.items() for member in members]
)
def test_a_public_name_has_an_example(name: str, member: str) -> None:
    result = importlib.import_module(name)
    for part in member.split("."):
        result = getattr(result, part)
    assert re.search(r"^ *Examples:$", result.__doc__ or "", re.M)


@pytest.mark.parametrize("package", ["grutrace", "grutrace.analysis"])
def test_every_public_function_and_class_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    members = {name: getattr(module, name) for name in module.__all__}
    documented = {
        name: ">>> " in (value.__doc__ or "") for name, value in members.items() if callable(value)
    }
    assert len(documented) > 10
    assert all(documented.values()), documented


def test_control_a_wrong_example_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("wrong", "Examples:\n    >>> 1 + 1\n    3\n")
    assert failed_examples(module, tmp_path, monkeypatch) == ["wrong"]


def listed(docstring: str, section: str) -> list[str]:
    """Return the names that a section of a docstring lists."""
    result = re.search(rf"^{section}:\n((?: .*\n|\n)+)", docstring + "\n", re.M)
    entries = re.findall(r"^ {4}(\*{0,2}\w[\w, ]*):", result[1], re.M) if result else []
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def parameters(function: ast.FunctionDef) -> set[str]:
    """Return the names of all parameters."""
    every = function.args
    rest = [argument for argument in (every.vararg, every.kwarg) if argument is not None]
    return {
        argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs, *rest)
    }


def stale(source: str) -> list[str]:
    """Return what docstrings of a source list as arguments or attributes that do not exist."""
    results = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node) or ""
        if isinstance(node, ast.FunctionDef):
            known = attributes = parameters(node)
        else:
            own = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            attributes = {ast.unparse(field.target) for field in own}
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            starts = [method for method in methods if method.name == "__init__"]
            known = parameters(starts[0]) if starts else attributes
            attributes = attributes | {method.name for method in methods}
            for child in ast.walk(node):
                if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                    attributes.add(child.attr)
                elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    attributes.add(child.id)
        results += [
            f"{node.name}: {name}" for name in listed(docstring, "Args") if name not in known
        ]
        results += [
            f"{node.name}: {name}"
            for name in listed(docstring, "Attributes")
            if name not in attributes
        ]
    return results


SOURCES = sorted(Path(grutrace.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_arguments_and_attributes_in_docstrings_exist(path: Path) -> None:
    assert stale(path.read_text(encoding="utf-8")) == []


def test_control_a_renamed_argument_or_attribute_is_detected() -> None:
    text = '''
def f(a, *b):
    """Do.

    Args:
        a: One.
        *b: Others.
        c: Gone.
    """

class C:
    """Hold.

    Args:
        x: One.
        y: Gone.

    Attributes:
        z: There.
        w: Gone.
    """

    def __init__(self, x):
        self.z = x
'''
    assert stale(text) == ["f: c", "C: y", "C: w"]
