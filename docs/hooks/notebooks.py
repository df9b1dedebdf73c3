"""Hook for MkDocs: execute each notebook of docs/ and show it as a page.

A notebook becomes Markdown with the outputs of its cells, so MkDocs checks
its links as it checks those of other pages. The build fails if a cell raises
an exception or writes to stderr (a warning does). A cell that draws has the
alternative text of its picture in its metadata, as ``alt``.
"""

from __future__ import annotations

import base64
import os
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TIMEOUT = 300  # seconds for one cell


class NotebookPage(File):
    """A notebook that MkDocs treats as a page."""

    def is_documentation_page(self) -> bool:
        """Always true. MkDocs itself accepts Markdown files only."""
        return True


def on_files(files: Files, *, config: Any) -> Files:
    """Replace each notebook by its page and its pictures."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        if file.inclusion.is_included():
            path = Path(file.abs_src_path or "")
            source = path.read_text(encoding="utf-8")
            markdown, pictures = converted(path, source)
            uri = file.src_uri
            files.append(
                NotebookPage.generated(config, uri, content=markdown)
            )
            for name, content in pictures.items():
                uri = Path(file.src_uri).with_name(name).as_posix()
                files.append(File.generated(config, uri, content=content))
    return files


@cache  # mkdocs serve executes a notebook again only if its text has changed
def converted(path: Path, text: str) -> tuple[str, dict[str, bytes]]:
    """Execute a notebook in its folder.

    Returns:
        The page as Markdown, and its pictures by file name.

    Raises:
        PluginError: A cell raised an exception or wrote to stderr.
    """
    notebook = nbformat.reads(text, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        coalesce_streams=True,  # one block for all that a cell prints
        resources={"metadata": {"path": str(path.parent)}},
        # No warning that messages within this machine are not encrypted.
        extra_arguments=["--log-level=ERROR"],
    )
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    try:
        client.execute(env=os.environ | inline)
    except CellExecutionError as error:
        raise PluginError(f"{path.name}: {error}") from error
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        is_code = cell.cell_type == "code"
        parts.append(
            fenced(cell.source, "python") if is_code else cell.source
        )
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                message = f"a cell wrote to stderr: {output.text}"
                raise PluginError(f"{path.name}: {message}")
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{cell.metadata['alt']}]({name})")
            else:
                text = output.get("text") or data["text/plain"]
                parts.append(fenced(text, "{ .text .no-copy }"))
    return "\n\n".join(parts), pictures


def fenced(text: str, language: str) -> str:
    """A fenced block of Markdown."""
    return f"````{language}\n{text.rstrip()}\n````"
