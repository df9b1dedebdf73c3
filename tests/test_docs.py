"""Every Python block of the documentation runs: each page top to bottom, in one namespace."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grutrace
from grutrace.cli.app import app
from grutrace.options import OPTIONS
from tests.test_architecture import ALLOWED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    done = run("\n".join(blocks(page)), tmp_path)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if page.stem == "README":
        assert done.stdout == "".join(shown)


SESSIONS = [page for page in PAGES if "```pycon" in page.read_text(encoding="utf-8")]


def run_session(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what a page has as an interactive session, and compare what it prints."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "doctest", str(page)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "examples"), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("page", SESSIONS, ids=lambda p: p.stem)
def test_a_session_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    done = run_session(page, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.findall(r"\]\(pictures/([^)]+)\)", page.read_text(encoding="utf-8"))
    assert shown
    assert all((tmp_path / picture).exists() for picture in shown), "not drawn by the page"


def test_control_a_session_that_prints_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 + 1\n3\n\n```\n", encoding="utf-8")
    assert run_session(page, tmp_path).returncode == 1


def test_control_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    assert run("import grutrace\nassert not grutrace", tmp_path).returncode == 1


def test_there_are_blocks_to_run() -> None:
    assert {page.stem for page in PAGES if blocks(page)} >= {"README", "index", "equations"}


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        pictures = re.findall(r'src="([^":]+)"', text)
        for target in [*pictures, *re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def files_of_a_tree(page: str) -> set[str]:
    """The files that an indented tree lists, by their paths."""
    folders: list[tuple[int, str]] = []
    found = set()
    for indent, name in re.findall(r"^    ( *)([a-z0-9_]+/|[a-z0-9_]+\.py)(?: |$)", page, re.M):
        folders = [(depth, folder) for depth, folder in folders if depth < len(indent)]
        if name.endswith("/"):
            folders.append((len(indent), name))
        else:
            found.add("".join(folder for _, folder in folders) + name)
    return found


def test_the_architecture_page_lists_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grutrace").rglob("*.py")}
    package_files = {path for path in files if path.count("/") > 1 and path.endswith("__init__.py")}
    assert files_of_a_tree(page) == files - package_files


def test_the_architecture_page_has_the_import_rules() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", page, re.M))
    assert list(rows) == list(ALLOWED)
    for part, cell in rows.items():
        assert set(re.findall(r"`([^`]+)`", cell)) == ALLOWED[part], part


def test_control_a_tree_is_read_folder_by_folder() -> None:
    tree = "    a/\n      b.py   x\n      c/    y\n        d.py   z\n      e.py\n"
    assert files_of_a_tree(tree) == {"a/b.py", "a/c/d.py", "a/e.py"}


def literal(value: object) -> str:
    """A value as Python writes it, with double quotes."""
    return f"`{value!r}`".replace("'", '"')


def options_table() -> str:
    """The options of a tracer, as docs/options.md lists them."""
    rows = [
        (f"`{name}`", each.summary, ", ".join(map(literal, each.values)), literal(each.default))
        for name, each in OPTIONS.items()
    ]
    head = ["| option | what it does | values | default |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |".replace("  ", " ") for row in rows)])


def test_the_options_page_has_the_options_of_a_tracer() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert options_table() in page
    explained = re.findall(r"^- \*\*([a-z_, ]+)\.\*\*", page, re.M)
    assert [name for names in explained for name in names.split(", ")] == list(OPTIONS)
    parameters = inspect.signature(grutrace.Tracer).parameters
    assert list(OPTIONS) == [name for name in parameters if name not in {"model", "path"}]


def test_the_commands_page_names_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `grutrace (\w+)", page, re.M)) == commands


def test_the_readme_is_short_and_its_costs_are_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 150
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    peers = measured.partition("### Peers")[2].partition("### ")[0]
    rows = re.findall(r"^\| .* \| ([\d.]+|not measured) \| ([\d.]+) \|$", readme, re.M)
    assert len(rows) == 10
    for figure in {figure for row in rows for figure in row} - {"not measured"}:
        assert re.search(rf"\| \**{figure}\** \(", peers), figure
