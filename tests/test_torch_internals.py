"""PyTorch's private interfaces: each in one file, and what happens where one is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from grutrace import torch_internals

ROOT = Path(__file__).parents[1]

#: Traces a model after some of PyTorch's private interfaces were deleted.
TRACE = """
import sys
import torch, torch._functorch.pyfunctorch, torch.autograd.forward_ad
import torch.utils.checkpoint, torch.utils._python_dispatch, torch._dynamo
from torch import nn
from pkgutil import resolve_name

model, x = nn.ModuleList([nn.GRU(3, 64, 2), nn.GRUCell(64, 4)]), torch.randn(5, 2, 3)
run = lambda: model[1](model[0](x)[0][-1])
expected = run()
kept = []  # PyTorch's own references to what is deleted stay valid
for path in {names!r}:
    where, _, name = path.rpartition(".")
    kept.append(getattr(resolve_name(where), name))
    delattr(resolve_name(where), name)

import grutrace
try:
    with grutrace.trace(model, check="raise") as trace:
        assert torch.equal(run(), expected)
except grutrace.GrutraceError as error:
    print(type(error).__name__, error)
    assert torch.equal(run(), expected)
else:
    assert trace.calls["module"].tolist() == ["0", "1"], trace.calls
    assert trace["0.l1"].update[:].shape == (10, 64)
    print("traced")
"""

#: For each of these, something else does the same.
REPLACEABLE = [
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_dispatch_mode",
    "torch._C._TorchDispatchModeKey",
    "torch._C._AutoDispatchBelowADInplaceOrView",
    "torch._C._dispatch_get_computed_kernel_for_dispatch_key",
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "torch._C._dynamo.eval_frame.skip_code",
    "torch._C._IncludeDispatchKeyGuard",
]

#: Without one of these, nothing can be traced.
REQUIRED = [
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.get_unwrapped",
    "torch.library.Library._destroy",
    "torch.utils._python_dispatch._disable_current_modes",
]


def trace_without(names: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TRACE.format(names=names)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_can_be_replaced_is_not_needed() -> None:
    has = [name for name in REPLACEABLE if torch_internals.find(name, None) is not None]
    assert len(has) >= len(REPLACEABLE) - 2
    assert trace_without(has) == "traced\n"


def test_a_missing_interface_is_refused_by_name_and_the_model_runs() -> None:
    said = trace_without(REQUIRED)
    assert said.startswith("UnsupportedError grutrace needs ")
    for name in REQUIRED:
        assert name in said
    assert "docs/support.md" in said


def test_one_that_is_missing_raises_when_it_is_used(monkeypatch) -> None:
    monkeypatch.setattr(torch_internals, "_missing", [])
    torch_internals.require_all()
    missing = torch_internals.find("torch._C._no_such_function")
    assert torch_internals.find("torch._C._no_such_function", 3) == 3
    with pytest.raises(torch_internals.UnsupportedError, match="_no_such_function"):
        missing(1, key=2)
    with pytest.raises(torch_internals.UnsupportedError, match="_no_such_function"):
        torch_internals.require_all()


def private_names(tree: ast.AST) -> set[str]:
    """Private names of PyTorch that a module uses: imports, attributes, and texts for `find`."""
    paths, imported = [], {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch"):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            paths.append(f"{imported.get(first, first)}.{rest}")
        elif isinstance(node, ast.Constant):
            paths.append(str(node.value))
    return {
        path
        for path in [*paths, *imported.values()]
        if re.fullmatch(r"torch(\.\w+)+", path) and re.search(r"\._[a-zA-Z]", path)
    }


def used_in() -> dict[str, set[str]]:
    result = defaultdict(set)
    for file in sorted((ROOT / "grutrace").rglob("*.py")):
        for name in private_names(ast.parse(file.read_text(encoding="utf-8"))):
            result[name].add(file.relative_to(ROOT / "grutrace").as_posix())
    # Parts of longer names, which are counted themselves.
    return {
        name: files
        for name, files in result.items()
        if not any(other.startswith(f"{name}.") for other in result)
    }


def test_each_private_interface_is_used_in_one_file_which_the_design_names() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = design.partition("## Private interfaces of PyTorch")[2].partition("\n## ")[0]
    found = used_in()
    assert len(found) > 15
    for name, files in found.items():
        assert len(files) == 1, f"{name} is used in {files}"
        row = [line for line in section.splitlines() if f"{name.rpartition('.')[2]}`" in line]
        assert len(row) == 1, f"{name}, of {files}, is not in one row of docs/design.md"
        assert f"`{next(iter(files))}`" in row[0], f"{name} is used in {files}"


def test_control_private_names_are_found() -> None:
    source = """
from torch._C import _a
from torch.b import c
torch._C._d(c._e, torch.f.g)
find("torch.h._i")
"""
    names = {"torch._C._a", "torch._C._d", "torch.b.c._e", "torch.h._i"}
    assert private_names(ast.parse(source)) - {"torch._C"} == names
