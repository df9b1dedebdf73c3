"""Imports go one way, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grutrace"

#: What each part may import of grutrace, beside itself.
ALLOWED = {
    "errors": set(),
    "record": set(),
    "shard": {"errors"},
    "reprs": set(),
    "gru": {"errors", "record"},
    "storage": {"errors", "record", "reprs", "shard"},
    "arrays": {"errors", "record", "storage"},
    "capture": {
        *("errors", "record", "shard", "gru"),
        *("storage.sinks", "storage.trace", "storage.moment"),
    },
    "analysis": {
        *("errors", "record", "reprs", "gru", "storage", "statistics"),
        "arrays.reopened",
    },
    "statistics": {"errors", "record", "reprs", "shard", "storage"},
    "export": {"errors", "record", "storage"},
    "run": {"errors", "record", "shard", "capture", "storage"},
    "cli": {"errors", "record", "storage", "analysis", "statistics", "export", "run"},
    "__main__": {"cli", "errors"},
    "__init__": {"errors", "capture", "storage", "statistics"},
}

#: Files that may import more: reading derives gates, by the equations that stand in `gru`, and a
#: trace gives arrays of other libraries.
EXCEPTIONS = {
    "storage/derived.py": {"gru.derive"},
    "storage/proofs.py": {"gru.batch"},
    "storage/trace.py": {"arrays.chunked", "arrays.labelled", "dask", "xarray"},
}

#: Libraries that only these parts may import.
ONLY = {
    "torch": {"gru", "capture", "analysis", "run"},
    "h5py": {"storage", "statistics", "export"},
    "h5netcdf": {"export"},
    "zarr": {"export"},
    "typer": {"cli"},
    "dask": {"arrays", "analysis"},
    "sklearn": {"analysis"},
    "scipy": {"analysis"},
    "xarray": {"arrays"},
}

#: Within storage, writing and reading never meet, but in `sinks`, the door to both.
WRITING = {"writer", "stream", "pump", "appender", "continuing", "admission", "entries"}
READING = {
    *("reader", "rows", "trace", "site", "sequence", "index", "moment"),
    *("combined", "parts", "ingredients", "derived", "proofs", "labels"),
    *("joined", "shards", "stacked", "merged", "virtual", "merging", "probe"),
}


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def faults(part: str, source: str, file: str = "") -> set[str]:
    """The imports of a source in this part that go the wrong way."""
    wrong = set()
    allowed_here = ALLOWED[part] | EXCEPTIONS.get(file, set())
    for name in imports(source):
        top, _, inner = name.partition(".")
        if top in ONLY and part not in ONLY[top] and top not in allowed_here:
            wrong.add(name)
        if top != "grutrace" or not inner or inner.split(".")[0] == part:
            continue
        if not any(f"{inner}.".startswith(f"{allowed}.") for allowed in allowed_here) and not (
            any(allowed.startswith(f"{inner}.") for allowed in allowed_here)
        ):
            wrong.add(name)
    return wrong


SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    file = path.relative_to(PACKAGE).as_posix()
    assert faults(part_of(path), path.read_text(encoding="utf-8"), file) == set()


def test_storage_loads_what_is_beyond_it_only_when_it_is_asked_for() -> None:
    for path in (PACKAGE / "storage").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        loaded = " ".join(map(ast.unparse, at_once))
        assert "grutrace.gru" not in loaded
        assert "grutrace.arrays" not in loaded
        assert not {"xarray", "dask", "dask.array"} & set(loaded.split())


def test_writing_and_reading_never_meet() -> None:
    for own, other in ((WRITING, READING), (READING, WRITING)):
        for name in own:
            path = PACKAGE / "storage" / f"{name}.py"
            reached = {each.rpartition(".")[2] for each in imports(path.read_text())}
            assert not reached & other, f"{name} imports {reached & other}"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("gru", "from grutrace.capture import tracer"),
        ("storage", "import torch"),
        ("capture", "import h5py"),
        ("capture", "from grutrace.storage.write.writer import Writer"),
        ("storage", "from grutrace.gru import cell"),
        ("storage", "from grutrace.statistics import feed"),
        ("storage", "from grutrace.arrays import chunked"),
        ("analysis", "import xarray"),
        ("arrays", "from grutrace.capture.tracer import Tracer"),
        ("capture", "from grutrace.statistics.running import Statistics"),
        ("analysis", "from grutrace import cli"),
        ("export", "from grutrace.analysis import summary"),
        ("cli", "import zarr"),
        ("shard", "import torch.distributed"),
        ("shard", "from grutrace.records import Header"),
        ("errors", "def f():\n    import grutrace.records"),
    ],
)
def test_control_a_wrong_import_is_noticed(part: str, source: str) -> None:
    assert faults(part, source)


def test_there_is_no_cycle_between_files() -> None:
    names = {
        ".".join(("grutrace", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in SOURCES
        if path.stem != "__init__"
    }
    graph = {
        name: {each for each in imports(path.read_text(encoding="utf-8")) if each in names}
        for name, path in names.items()
    }
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert graph == {}
