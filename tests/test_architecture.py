"""The imports follow the rules of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grutrace"

#: Folders whose sub-folders, and whose own files, are parts of their own.
DIVIDED = {"storage", "capture", "analysis", "view"}

#: The shared vocabulary: what each of these files may import; every part may import all of them.
BASE = {
    "version": set[str](),
    "errors": set[str](),
    "reprs": set[str](),
    "records": set[str](),
    "options": {"records"},
    "distributed": {"errors"},
    "annotation_values": {"errors"},
    "accessors": set[str](),
}

#: The folders of analyses.
ANALYSES = {
    *("analysis/engine", "analysis/descriptive", "analysis/memory", "analysis/dynamics"),
    *("analysis/labels", "analysis/comparison"),
}

#: What each part may import beside the base, from the lowest to the highest.
ALLOWED = {
    "native": set[str](),
    "torch_internals": set[str](),
    "gru": {"native", "torch_internals"},
    "conversion": set[str](),
    "gradients": {"gru"},
    "storage/hdf5": set[str](),
    "storage/format": {"storage/hdf5"},
    "storage/interfaces": {"storage/format"},
    "storage/write": {"storage/hdf5", "storage/format"},
    "storage/save": {
        *("storage/hdf5", "storage/format", "storage/interfaces", "storage/write"),
    },
    "storage/annotate": {"storage/hdf5", "storage/format", "storage/write"},
    "storage/memory": {"storage/format", "storage/write"},
    "storage/read": {
        *("storage/hdf5", "storage/format", "storage/interfaces"),
        *("storage/memory", "storage/save", "storage/annotate"),
    },
    "storage/shards": {
        *("storage/hdf5", "storage/format", "storage/interfaces"),
        *("storage/write", "storage/read"),
    },
    "storage/recovery": {"storage/hdf5", "storage/format", "storage/save", "storage/shards"},
    "storage/open": {
        *("storage/format", "storage/interfaces", "storage/write"),
        *("storage/memory", "storage/read", "storage/shards"),
    },
    "arrays": {"storage/hdf5", "storage/format", "storage/interfaces", "storage/read"},
    "statistics": {
        *("native", "storage/hdf5", "storage/format", "storage/interfaces"),
        *("storage/write", "storage/read"),
    },
    "capture/logged_values": set[str](),
    "capture/options": {"native", "capture/logged_values"},
    "capture/kernel_calls": {"gru", "torch_internals"},
    "capture/unsupported_grus": set[str](),
    "capture/selection": {"gru", "capture/options", "capture/unsupported_grus"},
    "capture/sequences": set[str](),
    "capture/recording": {
        *("native", "gru", "capture/options", "capture/logged_values"),
        *("capture/kernel_calls", "capture/selection", "capture/sequences"),
    },
    "capture/tracer_warnings": {
        *("gru", "capture/kernel_calls", "capture/selection", "capture/recording"),
    },
    "capture/attachment": {
        *("gru", "capture/kernel_calls", "capture/selection", "capture/tracer_warnings"),
    },
    "capture/differentiable": {
        *("gru", "gradients", "storage/read", "capture/options", "capture/kernel_calls"),
        *("capture/selection", "capture/sequences", "capture/tracer_warnings"),
        "capture/attachment",
    },
    "capture/trace_output": {
        *("storage/interfaces", "storage/open", "capture/options"),
        *("capture/selection", "capture/recording"),
    },
    "capture/model_recorder": {
        *(
            "capture/logged_values",
            "capture/options",
            "capture/kernel_calls",
            "capture/selection",
            "capture/recording",
        ),
        *("capture/tracer_warnings", "capture/attachment", "capture/trace_output"),
    },
    "capture/tracer": {
        *(
            "capture/logged_values",
            "storage/read",
            "storage/open",
            "capture/options",
            "capture/selection",
        ),
        *("capture/recording", "capture/differentiable"),
        *("capture/trace_output", "capture/model_recorder"),
    },
    "intervention": {
        *("native", "torch_internals", "storage/read", "gru", "capture/options"),
        *("capture/kernel_calls", "capture/selection"),
    },
    "analysis/engine": {"storage/interfaces", "storage/read", "arrays"},
    "analysis/registry": {"analysis/engine"},
    "analysis/verification": {
        *("gru", "storage/format", "storage/interfaces", "storage/save", "storage/read"),
    },
    "analysis/descriptive": {"native", "storage/read", "statistics", "analysis/engine"},
    "analysis/memory": {"storage/read", "analysis/engine"},
    "analysis/dynamics": {"native", "storage/read", "statistics", "analysis/engine"},
    "analysis/labels": {"storage/read", "statistics", "analysis/engine"},
    "analysis/comparison": {
        *("storage/interfaces", "storage/read", "analysis/engine", "analysis/verification"),
    },
    "export": {"storage/hdf5", "storage/format", "storage/interfaces", "storage/read"},
    "view/plots": {"storage/read", *ANALYSES},
    "view/site_plots": {"storage/read", *ANALYSES},
    "view/plot_specs": set[str](),
    "view/picture_files": {"storage/hdf5", "storage/read", "view/site_plots"},
    "view/report": {
        *("storage/read", "storage/open", "view/plots", "view/picture_files", *ANALYSES),
    },
    "view/live": {
        *("storage/hdf5", "storage/interfaces", "storage/read"),
        *("storage/shards", "storage/open", "view/report"),
    },
    "integrations": {
        *("statistics", "capture/options", "capture/selection", "capture/tracer"),
    },
    "run": {
        *("storage/hdf5", "storage/shards", "capture/options", "capture/kernel_calls"),
        *("capture/selection", "capture/recording", "capture/tracer_warnings"),
        *("capture/trace_output", "capture/model_recorder"),
    },
    "cli": {
        *(
            "native",
            "storage/hdf5",
            "storage/read",
            "storage/shards",
            "storage/recovery",
            "storage/open",
        ),
        *("statistics", "analysis/engine", "analysis/registry", "analysis/verification"),
        *("analysis/descriptive", "analysis/comparison", "export", "run"),
        *("view/plot_specs", "view/picture_files", "view/report", "view/live"),
    },
    "__main__": {"cli", "native"},
    "__init__": {
        *("storage/read", "storage/open", "statistics"),
        *("capture/differentiable", "capture/tracer", "intervention", "conversion"),
        *("view/live", "view/report"),
    },
}

#: Imports inside functions, which keep torch or an extra out of a path that does not need it: gates
#: are recomputed when they are read, and a trace gives arrays of other libraries.
LATE = {
    # For the type checker; when the program runs, a name is imported when it is first used.
    "analysis/__init__.py": {
        *("analysis/engine", "analysis/verification", "analysis/descriptive", "analysis/memory"),
        *("analysis/dynamics", "analysis/labels", "analysis/comparison"),
    },
    "storage/read/recomputed.py": {"gru"},
    "storage/read/proofs.py": {"gru"},
    "storage/read/gradients.py": {"gradients"},
    "storage/read/trace.py": {"arrays"},
    "view/site_plots.py": {"view/plots"},
}

#: Libraries that only these parts may import.
ONLY = {
    "torch": {
        *("gru", "conversion", "gradients", "capture", "intervention", "analysis", "run"),
        *("integrations", "torch_internals"),
    },
    "h5py": {"storage", "statistics", "export"},
    "h5netcdf": {"export"},
    "zarr": {"export"},
    "typer": {"cli"},
    "dask": {"arrays", "analysis"},
    "sklearn": {"analysis"},
    "scipy": {"analysis"},
    "xarray": {"arrays"},
    "matplotlib": {"view"},
    "bokeh": {"view"},
    "tornado": {"view"},
    "tensorboard": {"integrations"},
    "wandb": {"integrations"},
    "mlflow": {"integrations"},
    "lightning": {"integrations"},
    "transformers": {"integrations"},
}

#: For the type checker only.
NAMED_ONLY = {"storage/read/trace.py": {"dask", "xarray"}}

#: Modules in a folder, beside its __init__.
MOST_MODULES = 13

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part that a file of the package belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[0] in DIVIDED:
        return "/".join(parts[:2])
    return parts[0]


#: By dotted name, the part of every module.
PARTS = {
    ".".join(("grutrace", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): part_of(path)
    for path in SOURCES
}


def imports(source: str, *, late: bool = True) -> set[str]:
    """Names that a source imports; only those at its top level unless `late`."""
    tree = ast.parse(source)
    result = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            result |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return result


def faults(part: str, source: str, file: str = "") -> set[str]:
    """The imports of a source in this part that go the wrong way."""
    allowed = {part, *BASE.get(part, BASE), *ALLOWED.get(part, set())}
    wrong = set()
    for late in (False, True):
        allowed_now = allowed | (LATE.get(file, set()) if late else set())
        for name in imports(source, late=late):
            top = name.partition(".")[0]
            if top in ONLY and part.partition("/")[0] not in ONLY[top]:
                if not (late and top in NAMED_ONLY.get(file, set())):
                    wrong.add(name)
            elif name in PARTS and PARTS[name] not in {*allowed_now, "__init__", *DIVIDED}:
                wrong.add(name)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path: Path) -> None:
    file = path.relative_to(PACKAGE).as_posix()
    assert faults(part_of(path), path.read_text(encoding="utf-8"), file) == set()


def test_every_part_is_listed_and_imports_only_parts_before_it() -> None:
    assert {part_of(path) for path in SOURCES} - {f"{folder}/__init__" for folder in DIVIDED} == {
        *BASE,
        *ALLOWED,
    }
    before: set[str] = set()
    for part, allowed in ALLOWED.items():
        assert allowed <= before, f"{part} may import {allowed - before}, which come after it"
        before.add(part)


def test_writing_and_reading_share_only_the_format_and_hdf5() -> None:
    shared = {"storage/format", "storage/hdf5"}
    assert ALLOWED["storage/write"] == shared
    assert "storage/write" not in ALLOWED["storage/read"]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("gru", "from grutrace.capture import tracer"),
        ("storage/read", "import torch"),
        ("capture/tracer", "import h5py"),
        ("capture/tracer", "from grutrace.storage.write.writer import Writer"),
        ("storage/read", "from grutrace.storage.write import writer"),
        ("storage/write", "from grutrace.storage.read.trace import Trace"),
        ("storage/write", "from grutrace.storage.shards import merge"),
        ("storage/hdf5", "from grutrace.storage.format import schema"),
        ("storage/read", "from grutrace.gru import cell"),
        ("storage/write", "from grutrace.statistics import sink"),
        ("storage/read", "from grutrace.arrays import dask_arrays"),
        ("analysis/labels", "import xarray"),
        ("analysis/labels", "from grutrace.analysis.memory import timescales"),
        ("analysis/engine", "from grutrace.analysis import registry"),
        ("arrays", "from grutrace.capture.tracer import Tracer"),
        ("capture/kernel_calls", "from grutrace.capture.recording import journal"),
        ("capture/options", "from grutrace.capture.selection import find_grus"),
        ("capture/model_recorder", "from grutrace.capture.tracer import Tracer"),
        ("capture/tracer", "from grutrace.statistics.running import Statistics"),
        ("analysis/verification", "from grutrace.cli import app"),
        ("export", "from grutrace.analysis.descriptive import saturation"),
        ("cli", "import zarr"),
        ("storage/read", "from grutrace.view import site_plots"),
        ("analysis/labels", "import matplotlib"),
        ("storage/read", "from grutrace.view.live.engine import window"),
        ("cli", "import bokeh"),
        ("statistics", "import tensorboard"),
        ("integrations", "from grutrace.storage.read.trace import Trace"),
        ("distributed", "import torch.distributed"),
        ("distributed", "from grutrace.records import Header"),
        ("errors", "def f():\n    import grutrace.records"),
    ],
)
def test_control_a_wrong_import_is_detected(part: str, source: str) -> None:
    assert faults(part, source)


def test_control_late_imports_are_allowed_only_inside_functions() -> None:
    file, source = "storage/read/trace.py", "from grutrace.arrays import dask_arrays"
    assert not faults("storage/read", f"def f():\n    {source}", file)
    assert faults("storage/read", source, file)


def test_no_folder_has_too_many_modules() -> None:
    for folder in {path.parent for path in SOURCES}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, f"{folder} has {len(modules)} modules"


def cycles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import one another in a circle, or are imported from one."""
    while leaves := {name for name, imported in graph.items() if not imported}:
        graph = {name: imported - leaves for name, imported in graph.items() if name not in leaves}
    return set(graph)


def test_there_is_no_cycle_between_files() -> None:
    names = {
        ".".join(("grutrace", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in SOURCES
        if path.stem != "__init__"
    }
    graph = {
        name: {
            imported for imported in imports(path.read_text(encoding="utf-8")) if imported in names
        }
        for name, path in names.items()
    }
    assert cycles(graph) == set()


def test_control_a_cycle_is_detected() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}
