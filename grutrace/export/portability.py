"""Names and strings that some formats or file systems cannot store.

These are names that differ only in case, and strings with NUL.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from grutrace.errors import OptionError, short_repr
from grutrace.records import Array

#: The end of a string in C. Formats with C strings lose it, or the characters after it.
NUL = "\0"


def case_collisions(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of two or more names that differ only in case."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        alike[name.casefold()].append(name)
    return [group for group in alike.values() if len(group) > 1]


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each name that is unique on a case-insensitive file system.

    Args:
        names: Names of groups, with percent escapes as in the trace file.

    Returns:
        File names by name. If names differ only in case, their capital letters are percent-escaped:
        ``%41.l0`` for ``A.l0``. `urllib.parse.unquote` reverts all escapes.

    Examples:
        >>> from grutrace.export.portability import file_names
        >>> file_names(["A.l0", "a.l0", "b.l0"])
        {'A.l0': '%41.l0', 'a.l0': 'a.l0', 'b.l0': 'b.l0'}
    """
    names = list(names)
    clashing = {name for group in case_collisions(names) for name in group}
    return {name: _escape_capitals(name) if name in clashing else name for name in names}


def _escape_capitals(name: str) -> str:
    # The hexadecimal digits of an escape are not escaped again.
    return re.sub("(%..)|[A-Z]", lambda match: match[1] or f"%{ord(match[0]):02X}", name)


def ignores_case(folder: Path, file: str) -> bool:
    """Return whether the file system of a folder ignores case.

    Args:
        folder: The folder.
        file: Name of an existing file in it, with at least one letter.
    """
    return (folder / file.swapcase()).exists()


def require_representable(
    format: str, where: str, start: int, block: Array, holds: Callable[[str], bool], limit: str
) -> None:
    """Check that a format can store strings unchanged.

    Args:
        format: Name of the format.
        where: Group and name of the variable.
        start: Index of the first string in the variable.
        block: The strings.
        holds: Returns whether the format can store a string.
        limit: Description of the strings that the format cannot store.

    Raises:
        OptionError: A string cannot be stored. The message names the string and its index.
    """
    for index, text in enumerate(block.tolist(), start):
        if not holds(text):
            raise OptionError(
                f"to: {format} cannot store {limit}, found {short_repr(text)} in {where}, "
                f"item {index}: export to zarr or csv"
            )
