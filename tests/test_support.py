"""Every row of docs/support.md names tests that exist."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
LINK = re.compile(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)")


def rows(text: str) -> list[str]:
    """The rows of all tables of what is traced, without their heads."""
    lines = text.splitlines()
    result, is_row = [], False
    for line, following in pairwise([*lines, ""]):
        if not line.startswith("|"):
            is_row = False
        elif following.startswith("|---"):
            # The table of versions names no tests.
            is_row = line.endswith("| tests |") and not line.startswith("| date |")
        elif is_row and not line.startswith("|---"):
            result.append(line)
    return result


def missing(text: str) -> list[str]:
    """Tests that are named and do not exist."""
    named = {(name, path) for name, path in LINK.findall(text)}
    return sorted(
        f"{path}::{name}" for name, path in named if name not in functions_in(ROOT / path)
    )


def functions_in(path: Path) -> set[str]:
    if not path.exists():
        return set()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    assert missing(PAGE.read_text(encoding="utf-8")) == []


def test_control_a_missing_test_is_detected() -> None:
    text = "[test_nothing](../tests/test_support.py), [test_lost](../tests/lost.py)"
    assert missing(text) == ["tests/lost.py::test_lost", "tests/test_support.py::test_nothing"]


def test_every_row_has_four_cells_and_ends_with_tests() -> None:
    result = rows(PAGE.read_text(encoding="utf-8"))
    assert len(result) > 40
    for row in result:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert LINK.fullmatch(cells[3].split(", ")[0]), row


def test_every_public_package_has_a_row() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python is older than 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["optional-dependencies"]["packages"]
    packages = {re.split(r"[=><]", requirement)[0] for requirement in asked} - {
        "importlib_metadata"
    }
    first = {row.split("|")[1].strip() for row in rows(PAGE.read_text(encoding="utf-8"))}
    assert packages <= first
