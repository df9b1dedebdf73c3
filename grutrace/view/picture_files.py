"""Pictures as files: PNG, SVG or PDF, by the ending of the path."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grutrace.errors import OptionError, TraceFileError, require_extra
from grutrace.storage.hdf5.atomic_write import publish, temporary_path, unlink_on_error
from grutrace.storage.read.site import SiteTrace
from grutrace.view.site_plots import SitePlots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Formats of pictures.
FORMATS = ("png", "svg", "pdf")

#: Width and height of a picture, in inches.
FIGURE_SIZE = 9.0, 5.5

#: Dots per inch of a PNG file.
DPI = 150


def require_format(path: Path, formats: tuple[str, ...] = FORMATS) -> str:
    """Return the format that the ending of a path names.

    Raises:
        OptionError: It names none of them.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in formats:
        expected = ", ".join(f".{name}" for name in formats)
        raise OptionError(f"output: expected a path that ends in {expected}; found {str(path)!r}")
    return ending


def picture_bytes(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """Return a figure as the content of a file.

    Args:
        figure: The figure.
        kind: One of `FORMATS`.
        dpi: Dots per inch of PNG.
    """
    buffer = io.BytesIO()
    # Creation dates would make two pictures of one trace differ.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with warnings.catch_warnings():
        # A token can have characters that no font has. They are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated.get(kind))
    return buffer.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, completely or not at all. An existing file is replaced.

    Raises:
        TraceFileError: It cannot be written.
    """
    temporary = temporary_path(path, "overwrite")
    with unlink_on_error(temporary):
        try:
            temporary.write_bytes(content)
        except OSError as error:
            raise TraceFileError(f"{path} cannot be written: {error.strerror}") from error
        publish(temporary, path, "overwrite")


def save_plot(
    site: SiteTrace,
    kind: str,
    path: Path,
    others: Sequence[SiteTrace],
    options: Mapping[str, Any],
) -> None:
    """Draw a picture of a site to a PNG, SVG or PDF file. An existing file is replaced.

    Args:
        site: The site.
        kind: Name of a method of `SitePlots`.
        path: Path of the file.
        others: The site in other traces, the first arguments of the method.
        options: Arguments of the method, by name.

    Raises:
        OptionError: The path has another ending, or an argument is wrong.
        TraceFileError: The file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    ending = require_format(path)
    with require_extra("grutrace plot", "plot"):
        from matplotlib.figure import Figure
    # Not a figure of pyplot, which may look for a screen.
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    getattr(SitePlots(site), kind)(*others, ax=figure.subplots(), **options)
    write_file(path, picture_bytes(figure, ending))
