"""What not every format or file system can hold: names that differ only in case, and NUL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from grutrace.errors import OptionError, short_repr
from grutrace.records import Array

#: Ends a text in C, so formats that keep texts as C does lose it, or what follows it.
NUL = "\0"


def case_collisions(names: Iterable[str]) -> list[list[str]]:
    """Group the names that differ from each other only in case; each list holds two or more."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        alike[name.casefold()].append(name)
    return [group for group in alike.values() if len(group) > 1]


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Give each name a file name that is unique on a file system that ignores case.

    Args:
        names: Names of groups, with percent escapes as in the trace file.

    Returns:
        By name, the name itself. Where several differ only in case, their capital letters are
        percent escapes as well: ``%41.l0`` for ``A.l0``. `urllib.parse.unquote` undoes both.
    """
    names = list(names)
    clashing = {name for group in case_collisions(names) for name in group}
    return {name: _escape_capitals(name) if name in clashing else name for name in names}


def _escape_capitals(name: str) -> str:
    escaped, rest = "", name
    while rest:
        if rest.startswith("%"):
            # An escape, whose own digits stay.
            escaped, rest = escaped + rest[:3], rest[3:]
        else:
            letter, rest = rest[0], rest[1:]
            escaped += f"%{ord(letter):02X}" if letter.isupper() else letter
    return escaped


def ignores_case(folder: Path, file: str) -> bool:
    """Whether the file system takes two names that differ only in case for one.

    Args:
        folder: Where.
        file: Name of a file that is there, with a letter in it.
    """
    return (folder / file.swapcase()).exists()


def require_representable(
    format: str, where: str, start: int, block: Array, holds: Callable[[str], bool], limit: str
) -> None:
    """Refuse texts that a format would lose or change.

    Args:
        format: Name of the format.
        where: Group and name of the variable.
        start: Index of the first text in the variable.
        block: Texts.
        holds: Whether the format keeps a text.
        limit: What the format cannot hold.

    Raises:
        OptionError: It does not keep one of them; the message says which and where it is.
    """
    for index, text in enumerate(block.tolist(), start):
        if not holds(text):
            raise OptionError(
                f"to: {format} cannot hold {limit}, found {short_repr(text)} in {where}, "
                f"item {index}: export to zarr or csv, which can"
            )
