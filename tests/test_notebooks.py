"""The notebooks of the documentation: their cells run, and compute the figures in their text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import NOTEBOOKS, ROOT, text_of

#: xdist starts groups first; these tests take long, and alone they would come last.
pytestmark = pytest.mark.xdist_group("notebooks")

#: Runs the cells of a notebook, and prints the last expression of each, as Jupyter does.
RUNNER = """
import ast, json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    notebook = json.load(file)
for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
        source = "".join(cell["source"])
        body = ast.parse(source).body
        shown = isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")
        last = ast.Interactive([body.pop()] if shown else [])
        exec(compile(ast.Module(body, []), "cell", "exec"))
        exec(compile(last, "cell", "single"))
"""

#: What letters-to-phonemes.ipynb prints.
LETTERS = """\
absent ['AE1', 'B', 'S', 'AH0', 'N', 'T', '</s>']
<site encoder.l0: 371 sequences, 3,304 steps of reset, update, candidate,
    hidden, input
    labels: tokens, kind>
<site decoder.cell: 371 sequences, 3,008 steps of reset, update, candidate,
    hidden, input
    labels: tokens>
encoder: 0.30 nearly closed, 0.36 nearly open, 0 units stuck
decoder: 0.44 nearly closed, 0.28 nearly open, 0 units stuck
['30 %', '17 %', '12 %', '9 %', '9 %', '8 %']
4 %
['84 %', '10 %', '3 %']
['70 %', '54 %', '41 %', '29 %', '19 %', '12 %', '7 %', '4 %']
unit 82: 37 steps, median 1.1
array([-0.89, -0.89, -0.89, -0.89, -0.89, -0.89, -0.89], dtype=float32)
unit 69: 0.98, the next 0.88
a 0.98, e 0.99, i 0.97, o 0.99, u 0.97
b 0.89, c -0.98, d -0.51, g -0.69, s -0.87
t -0.95, n -0.84, y -0.97
score 1.00, control 0.99
most frequent kind 0.57
25 of 371 words change
closer K L OW1 Z ER0 -> K L OW1 S ER0
commune K AH0 M Y UW1 N -> K AA1 M Y UW0 N
compounds K AH0 M P AW1 N D Z -> K AA1 M P AW2 N D Z
7 %, the median of the others 6 %
16 of 32 change as many words
"""


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return cells


def run(notebook: Path, folder: Path = ROOT / "docs") -> subprocess.CompletedProcess[str]:
    """Run a notebook in its folder, without Jupyter. A warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, str(notebook)],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_leaves_no_file(notebook: Path) -> None:
    before = set((ROOT / "docs").rglob("*"))
    done = run(notebook)
    assert done.returncode == 0, done.stderr
    assert set((ROOT / "docs").rglob("*")) == before
    if notebook.stem == "letters-to-phonemes":
        assert done.stdout == LETTERS
    if notebook.stem == "chrono-initialization":
        check_half_lives(done.stdout)
    if notebook.stem == "fixed-points-of-a-memory":
        check_memory(done.stdout)
    if notebook.stem == "nested-arithmetic":
        assert "residual below 1e-5: True" in done.stdout
        rows = re.findall(r"^(L\w+) +(\S+) +(\S+) +(\S+) +(\S+)$", done.stdout, re.M)
        figures = {name: [float(value) for value in values] for name, *values in rows}
        for name in ("L5", "L6", "L7", "L8", "L9", "L9R"):
            cumulative, recursive, _, _ = figures[name]
            assert cumulative > recursive + 0.1, name


def check_half_lives(printed: str) -> None:
    """What the text says: predictions near the half-lives, and which of the networks learns."""
    number = r"(\d+\.\d+)"
    rows = re.findall(rf"^(default|chrono) +{number} +{number} +{number}$", printed, re.M)
    figures = {name: [float(value) for value in values] for name, *values in rows}
    for half_life, predicted, _ in figures.values():
        assert 0.9 < half_life / predicted < 1.4
    (short, _, chance), (long, _, accuracy) = figures["default"], figures["chrono"]
    assert long > 10 * short
    assert chance < 0.25
    assert accuracy > 0.6


def check_memory(printed: str) -> None:
    """What the text says: the points, which inputs move which bit, and where pulses lead."""
    number = r" *(-?\d+\.\d+)"
    points = re.findall(rf"^{number}{number} +(\d) +(\d+)$", printed, re.M)
    assert [int(unstable) for *_, unstable, _ in points] == [0] * 4 + [1] * 4 + [2]
    memories = {(round(float(first)), round(float(second))) for first, second, *_ in points[:4]}
    assert memories == {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    assert sum(int(reached) == 0 for *_, reached in points) >= 3
    rows = re.findall(rf"^{number * 6}$", printed, re.M)
    modes = [[abs(float(cell)) for cell in row] for row in rows]
    assert len(modes) == 3
    bits = [0 if mode[1] > mode[2] else 1 for mode in modes[:2]]
    assert sorted(bits) == [0, 1]
    for bit, (_, _, _, *pulses) in zip(bits, modes[:2], strict=True):
        assert max(pulses) == pulses[bit]
    assert max(mode[5] for mode in modes) < 0.1
    ends = re.findall(r"^pulse on channel \d: the memory (-?1) (-?1)$", printed, re.M)
    assert ends == [("-1", "1"), ("1", "-1"), ("1", "1")]


def test_the_text_has_the_figures_that_the_spelling_model_gives() -> None:
    text = " ".join(text_of(ROOT / "docs" / "letters-to-phonemes.ipynb").split())
    for sentence in (
        "30 % of the values of the update gate are below 0.1 (nearly closed) and 36 % above 0.9",
        "In the decoder it is 44 % and 28 %",
        "30 % of it was written at the end mark, 17 % at the last letter, 12 % at the letter "
        "before",
        "Of the first letter of a word 4 % is left",
        "84 % of its state was written at the last step",
        "70 % of the state of the decoder after the first phoneme comes from it, 54 % after the "
        "second, 29 % after the fourth",
        "It is unit 82: its timescale is 37 steps, and the median of all units is 1.1",
        "With a probability of 0.98, unit 69 is larger at a vowel",
    ):
        assert sentence in text
        figures = re.findall(r"\d+(?:\.\d+)?", sentence)
        for figure in set(figures) - {"0.1", "0.9"}:
            assert figure in LETTERS or f"0.{figure}" in LETTERS, figure


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_describes_its_pictures(notebook: Path) -> None:
    for cell in cells_of(notebook):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            draws = re.search(r"plt\.subplots\(|\.plot\.\w+\(", "".join(cell["source"]))
            assert ("alt" in cell["metadata"]) == bool(draws)


def write_notebook(path: Path, *cells: tuple[str, str]) -> Path:
    """A notebook of cells, each given by its type and source."""
    code = {"outputs": [], "execution_count": None}
    path.write_text(
        json.dumps(
            {
                "nbformat": 4,
                "nbformat_minor": 5,
                "metadata": {},
                "cells": [
                    {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": source}
                    | (code if kind == "code" else {})
                    for number, (kind, source) in enumerate(cells)
                ],
            }
        ),
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("source", ["1 / 0", "import warnings\nwarnings.warn('old')"])
def test_control_a_cell_that_fails_is_noticed(tmp_path: Path, source: str) -> None:
    notebook = write_notebook(tmp_path / "page.ipynb", ("code", "x = 1"), ("code", source))
    assert run(notebook, tmp_path).returncode == 1


def test_control_what_cells_show_is_read(tmp_path: Path) -> None:
    notebook = write_notebook(
        tmp_path / "page.ipynb", ("code", "print(1)\n'a'"), ("markdown", "b"), ("code", "'c';")
    )
    assert run(notebook, tmp_path).stdout == "1\n'a'\n"


def build(folder: Path, *cells: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Build a site of one notebook and one other page, with the hook of the documentation."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text("# Start\n[page](page.ipynb#part)", encoding="utf-8")
    write_notebook(folder / "docs" / "page.ipynb", *cells)
    (folder / "mkdocs.yml").write_text(
        f"site_name: site\nhooks: ['{(ROOT / 'docs/hooks/notebooks.py').as_posix()}']\n"
        "nav: [index.md, page.ipynb]\nvalidation: {anchors: warn}\nplugins: []\n",
        encoding="utf-8",
    )
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def site_tools() -> None:
    """The tests of the build are skipped where the extra docs is not installed."""
    for name in ("mkdocs", "nbclient", "ipykernel"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("site_tools")
def test_the_site_shows_what_the_cells_show(tmp_path: Path) -> None:
    done = build(
        tmp_path,
        ("markdown", "# Page\n\n## Part\n\n[start](index.md)"),
        ("code", "print('printed', 6 * 7, flush=True)\nprint('more')\n{1: 2}"),
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "page" / "index.html").read_text(encoding="utf-8")
    for part in (
        "printed 42\nmore",
        "{1: 2}",
        '<h2 id="part">Part</h2>',
        '<a href="../">start</a>',
    ):
        assert part in page


@pytest.mark.usefixtures("site_tools")
@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("code", "1 / 0", "ZeroDivisionError"),
        ("code", "import warnings\nwarnings.warn('old')", "wrote to stderr"),
        ("markdown", "[nowhere](nowhere.md)", "nowhere.md"),
    ],
)
def test_control_a_notebook_that_fails_fails_the_build(
    tmp_path: Path, kind: str, source: str, message: str
) -> None:
    done = build(tmp_path, ("markdown", "# Page\n\n## Part"), (kind, source))
    assert done.returncode != 0
    assert "page.ipynb" in done.stderr
    assert message in done.stderr
