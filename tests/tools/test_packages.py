"""What goes into the source distribution and on the page of a package index.

`tools/packages.sh` builds and installs the packages themselves.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path

import pytest

import grutrace

pytest.importorskip("setuptools", minversion="77", reason="setuptools is older than 77")

ROOT = Path(__file__).parents[2]

ADDRESS = "https://example.org/grutrace"
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"")


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout of git")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that git knows."""
    for name in tracked_files():
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "checkout"


def build(checkout: Path, hook: str) -> Path:
    """Call a hook of the build backend, and return what it made."""
    (checkout / "made").mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}('made'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return checkout / "made" / done.stdout.splitlines()[-1]


def links(markdown: str) -> list[str]:
    return [address or image for address, image in LINK.findall(markdown)]


@pytest.mark.parametrize("has_address", [True, False])
def test_the_page_of_an_index_has_no_relative_link(checkout: Path, has_address: bool) -> None:
    if has_address:
        project = checkout / "pyproject.toml"
        text = project.read_text(encoding="utf-8")
        text = re.sub(r"\[project.urls\]\n(.+\n)+", "", text)
        addition = f'[project.urls]\nSource = "{ADDRESS}/"\n\n[project.scripts]'
        text = text.replace("[project.scripts]", addition)
        project.write_text(text, encoding="utf-8")
    made = build(checkout, "prepare_metadata_for_build_wheel")
    metadata = Parser().parsestr((made / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == grutrace.__version__
    page = metadata.get_payload()
    assert isinstance(page, str)
    relative = {
        link for link in links((ROOT / "README.md").read_text("utf-8")) if "://" not in link
    }
    assert len(relative) > 15
    assert all("://" in link for link in links(page))
    assert "[the equations]" in page if has_address else "the equations," in page
    if has_address:
        tag = f"v{grutrace.__version__}"
        for link in relative:
            kind = "raw" if link.endswith(".png") else "blob"
            assert f"{ADDRESS}/{kind}/{tag}/{link}" in page


def test_the_source_distribution_has_every_file_of_the_repository(checkout: Path) -> None:
    (checkout / "tests" / "__pycache__").mkdir(exist_ok=True)
    (checkout / "tests" / "__pycache__" / "left.cpython-311.pyc").write_bytes(b"")
    with tarfile.open(build(checkout, "build_sdist")) as archive:
        packed = {entry.name.partition("/")[2] for entry in archive if entry.isfile()}
    assert set(tracked_files()) <= packed
    others = {Path(name).parts[0] for name in packed - set(tracked_files())}
    assert others <= {"grutrace.egg-info", "PKG-INFO", "setup.cfg"}


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {grutrace.__version__}\n" in citation


def test_the_conda_recipe_has_the_version_and_the_requirements() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install PyYAML")
    tomllib = pytest.importorskip("tomllib", reason="Python is older than 3.11")
    recipe = yaml.safe_load((ROOT / "tools" / "conda_recipe.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert recipe["context"]["version"] == grutrace.__version__
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    names = {"torch": "pytorch"}
    expected = {
        f"{names.get(name, name)} {versions}"
        for name, versions in (re.fullmatch(r"([a-z0-9]+)(.+)", line).groups() for line in wanted)
    }
    expected.add(f"python {project['requires-python']}")
    assert set(recipe["requirements"]["run"]) == expected
