"""Every Python block of the documentation runs, page by page."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import grutrace
from grutrace import analysis, integrations
from grutrace.analysis.registry import ANALYSES
from grutrace.cli.app import COMMANDS
from grutrace.options import OPTIONS
from tests import forks
from tests.test_architecture import ALLOWED
from tests.test_docstrings import NOT_IMPORTED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def text_of(page: Path) -> str:
    """The text of a page; of a notebook, its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return forks.run("-W", "error", "-c", code, cwd=folder)


def run_afresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a Python that has imported nothing, so that warnings of imports are errors, too."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    start = run_afresh if page.stem == "README" else run
    done = start("\n".join(blocks(page)), tmp_path)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    if page.stem == "README":
        assert done.stdout == "".join(shown)


def test_control_a_failing_block_is_detected(tmp_path: Path) -> None:
    assert run("import grutrace\nassert not grutrace", tmp_path).returncode == 1


def test_there_are_blocks_to_run() -> None:
    assert {page.stem for page in PAGES if blocks(page)} >= {"README", "index", "equations"}


def test_links_between_pages_exist() -> None:
    for page in [*PAGES, *NOTEBOOKS]:
        text = text_of(page)
        pictures = re.findall(r'src="([^":]+)"', text)
        for target in [*pictures, *re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def files_of_a_tree(page: str) -> set[str]:
    """The files that an indented tree lists, by their paths."""
    folders: list[tuple[int, str]] = []
    result = set()
    for indent, name in re.findall(r"^    ( *)([a-z0-9_]+/|[a-z0-9_]+\.py)(?: |$)", page, re.M):
        folders = [(depth, folder) for depth, folder in folders if depth < len(indent)]
        if name.endswith("/"):
            folders.append((len(indent), name))
        else:
            result.add("".join(folder for _, folder in folders) + name)
    return result


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


def test_control_a_tree_is_parsed_by_folder() -> None:
    tree = "    a/\n      b.py   x\n      c/    y\n        d.py   z\n      e.py\n"
    assert files_of_a_tree(tree) == {"a/b.py", "a/c/d.py", "a/e.py"}


def literal(value: object) -> str:
    """A value as Python writes it, with double quotes."""
    return f"`{value!r}`".replace("'", '"')


def options_table() -> str:
    """The options of a tracer, as docs/options.md lists them."""
    rows = [
        (
            f"`{name}`",
            option.summary,
            ", ".join(map(literal, option.values)),
            literal(option.default),
        )
        for name, option in OPTIONS.items()
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
    assert set(re.findall(r"^\| `grutrace (\w+)", page, re.M)) == set(COMMANDS)


def test_the_readme_is_short_and_its_costs_are_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 150
    measured = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    peers = measured.partition("### Peers")[2].partition("### ")[0]
    rows = re.findall(r"^\| .* \| ([\d.]+|not measured) \| ([\d.]+) \|$", readme, re.M)
    assert len(rows) == 10
    for figure in {figure for row in rows for figure in row} - {"not measured"}:
        assert re.search(rf"\| \**{figure}\** \(", peers), figure


def documented(page: str) -> list[tuple[str, list[str]]]:
    """The objects that a page of the reference is made of, each with the members it lists."""
    return [
        (name, re.findall(r"\w+", members))
        for name, members in re.findall(
            r"^::: (\S+)\n(?:    options:\n(?:      (?!members).*\n)*)?(?:      members: (.*)\n)?",
            page,
            re.M,
        )
    ]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda p: p.stem)
def test_the_reference_names_existing_objects(page: Path) -> None:
    result = documented(page.read_text(encoding="utf-8"))
    assert result
    for name, members in result:
        module, _, attribute = name.rpartition(".")
        if module.startswith(NOT_IMPORTED):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert re.search(rf"^class {attribute}\b", source, re.M)
            continue
        target = getattr(import_module(module), attribute)
        assert target.__doc__, name
        for member in members:
            assert hasattr(target, member), f"{name}.{member}"


def test_the_reference_has_every_public_name() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/api").glob("*.md"))
    objects = [
        getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, _ in documented(text)
        if not name.startswith(NOT_IMPORTED)
    ]
    for module in (grutrace, analysis, integrations):
        for name in set(module.__all__) - {"__version__"}:
            assert getattr(module, name) in objects, name


def test_the_reference_has_every_analysis() -> None:
    text = (ROOT / "docs" / "api" / "analysis.md").read_text(encoding="utf-8")
    for name, registered in ANALYSES.items():
        assert f"::: {registered.load().__module__}.{name}\n" in text, name


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = re.findall(r"[\w/-]+\.(?:md|ipynb)", str(menu))
    files = [*(page for page in PAGES if page.name != "README.md"), *NOTEBOOKS]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in files}
    assert set(entries) == pages
    assert len(entries) == len(pages)


def test_every_file_that_a_page_names_exists() -> None:
    named = r"`((?:tests|examples|grutrace|docs)/[\w./-]*\w(?:/|\.py|\.md)?)`"
    for page in [*PAGES, *NOTEBOOKS, ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(named, text_of(page)):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_table_of_changes_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| change | file | also |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert table.count("\n") + 1 == 12
    for _, files, also in re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", table, re.M):
        folder = ROOT / "grutrace"
        for path in re.findall(r"`([\w/]+\.py|[\w/]+/)`", files + also):
            folder = (ROOT / "grutrace" / path).parent if "/" in path else folder
            roots = (ROOT, ROOT / "grutrace", folder)
            assert any((root / path).exists() for root in roots), path
