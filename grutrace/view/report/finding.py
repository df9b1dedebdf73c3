"""A finding: what the report says about one question, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grutrace.view.plots.axes import printable
from grutrace.view.report.pictures import Picture
from grutrace.view.report.sample import SiteSample

#: Level of all tests, after correction.
LEVEL = 0.05

#: Largest number of sites that a finding names.
MAX_NAMED = 8

#: Largest number of units that a sentence names.
MAX_UNITS = 6


@dataclass
class Finding:
    """The answer to one question.

    Attributes:
        topic: The question, as a heading.
        state: ``found``: the test says so. ``clear``: it does not. ``unknown``: the trace holds too
            little to tell.
        answers: Words for ``found`` and ``clear``.
        sentences: The answer, with its figures.
        how: What was tested, and how it was corrected.
        commands: Commands that repeat it.
        pictures: Pictures of it.
    """

    topic: str
    state: Literal["found", "clear", "unknown"] = "unknown"
    answers: tuple[str, str] = ("found", "nothing found")
    sentences: list[str] = field(default_factory=list)
    how: str = ""
    commands: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The state in words."""
        known = dict(zip(("found", "clear"), self.answers, strict=True))
        return known.get(self.state, "not known")

    def add_picture(self, picture: Picture | None) -> None:
        """Add a picture, if there is one."""
        if picture is not None:
            self.pictures.append(picture)


def command(file: str, words: str, sample: SiteSample | None = None, *more: str) -> str:
    """Return a command that repeats a result.

    Args:
        file: The trace file.
        words: The command and what follows the file, as ``stats {} saturation``.
        sample: The site and its sequences.
        more: Further arguments.
    """
    parts = ["grutrace", *(file if word == "{}" else word for word in words.split())]
    if sample is not None:
        parts += ["--site", sample.name, *sample.options]
    return shlex.join([*parts, *more])


def list_units(units: Iterable[int]) -> str:
    """Return the numbers of units in words: the first ones, and how many more there are."""
    numbers = list(units)
    named = ", ".join(map(str, numbers[:MAX_UNITS]))
    more = len(numbers) - MAX_UNITS
    return f"unit{'s' if len(numbers) > 1 else ''} {named}" + (
        f" and {more} more" if more > 0 else ""
    )


def list_sites(names: Sequence[str]) -> str:
    """Return the names of sites in words, the first ones of many."""
    named = ", ".join(printable(name, 60) for name in names[:MAX_NAMED])
    more = len(names) - MAX_NAMED
    return named + (f" and {more} more" if more > 0 else "")


def as_percent(share: float) -> str:
    """Return a share as a percentage that says 100 % only if it is."""
    text = f"{100 * share:.3g}"
    return ("99.9" if text == "100" and share < 1 else text) + " %"


def as_p(p: float) -> str:
    """Return a p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
