"""`Link`: what a page shows, as the query string of its address."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode

from grutrace.errors import OptionError, require_one_of, short_repr
from grutrace.view.live.engine.window import STATISTICS

#: Orders of the units.
ORDERS = ("number", "mean", "similarity")

#: Longest text of one part of a link. Characters.
MAX_TEXT = 500


class Steps(NamedTuple):
    """Steps from a step of one sequence to before a step of the same or a later sequence."""

    first_sequence: int
    start: int
    last_sequence: int
    stop: int


@dataclass(frozen=True)
class Link:
    """What a page shows. Parts that are None are left to the page.

    Steps are given by sequence and step, so that a link means the same after more is recorded.

    Attributes:
        run: Name of the run.
        beside: Name of the run that is shown beside it.
        site: Name of the site.
        quantity: Name of the quantity.
        statistic: What a pixel shows of several values: mean, min or max.
        order: Order of the units.
        select: Which sequences are shown.
        steps: The visible steps.
        units: First visible place in the order of the units, and last + 1.
        mark: The marked steps.
        on: Threshold above which a unit is on: ``>0.5``; or below which: ``<-0.5``.
        around: Numbers of steps before and after the mark at which a unit is off.
        chosen: The chosen units, if they are others than those that are on in the mark.
        least: Number of units that are on at every step of a match.
        follow: Whether the page follows a growing file.
        search: Whether matches are searched.

    Examples:
        >>> link = Link(site="l0", mark=Steps(3, 5, 3, 9), on=(0.5, True))
        >>> link.query()
        'site=l0&mark=3.5-3.9&on=%3E0.5'
        >>> parse_link({"site": "l0", "mark": "3.5-3.9", "on": ">0.5"}) == (link, [])
        True
    """

    run: str | None = None
    beside: str | None = None
    site: str | None = None
    quantity: str | None = None
    statistic: str | None = None
    order: str | None = None
    select: str | None = None
    steps: Steps | None = None
    units: tuple[int, int] | None = None
    mark: Steps | None = None
    on: tuple[float, bool] | None = None
    around: tuple[int, int] | None = None
    chosen: tuple[int, ...] | None = None
    least: int | None = None
    follow: bool | None = None
    search: bool | None = None

    def query(self) -> str:
        """Return the query string, without the question mark."""
        values = {name: getattr(self, name) for name in _PARTS}
        return urlencode(
            {name: _PARTS[name].text(value) for name, value in values.items() if value is not None}
        )


def parse_link(arguments: Mapping[str, str]) -> tuple[Link, list[str]]:
    """Parse the parts of a query string.

    Returns:
        The link, without the parts that are wrong; and a message for each of these.
    """
    values: dict[str, Any] = {}
    problems = []
    for name, text in arguments.items():
        if name not in _PARTS:
            continue
        try:
            if len(text) > MAX_TEXT:
                raise OptionError(f"link: {name}: expected at most {MAX_TEXT} characters")
            values[name] = _PARTS[name].parse(f"link: {name}", text)
        except OptionError as error:
            problems.append(str(error))
    return dataclasses.replace(Link(), **values), problems


class _Part(NamedTuple):
    """How a part of a link is written and read."""

    text: Callable[[Any], str]
    parse: Callable[[str, str], Any]


def _parse_text(name: str, text: str) -> str:  # noqa: ARG001
    return text


def _one_of(allowed: Sequence[str]) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        require_one_of(name, text, allowed)
        return text

    return parse


def _parse_numbers(name: str, text: str, pattern: str, example: str) -> list[int]:
    match = re.fullmatch(pattern, text, re.ASCII)
    if match is None:
        raise OptionError(f"{name}: expected numbers such as {example}; found {short_repr(text)}")
    return [int(group) for group in match.groups()]


def _parse_steps(name: str, text: str) -> Steps:
    number = r"(\d{1,15})"
    pattern = rf"{number}\.{number}-{number}\.{number}"
    steps = Steps(*_parse_numbers(name, text, pattern, "3.5-3.9"))
    if steps[:2] > steps[2:]:
        raise OptionError(f"{name}: expected steps in time order; found {short_repr(text)}")
    return steps


def _parse_pair(name: str, text: str) -> tuple[int, int]:
    first, last = _parse_numbers(name, text, r"(\d{1,9})-(\d{1,9})", "0-64")
    return first, last


def _parse_number(name: str, text: str) -> int:
    return _parse_numbers(name, text, r"(\d{1,9})", "3")[0]


def _parse_on(name: str, text: str) -> tuple[float, bool]:
    try:
        threshold = float(text[1:])
    except ValueError:
        threshold = math.nan
    if text[:1] not in ("<", ">") or not math.isfinite(threshold):
        raise OptionError(f"{name}: expected >0.5 or <0.5; found {short_repr(text)}")
    return threshold, text[0] == ">"


def _parse_flag(name: str, text: str) -> bool:
    require_one_of(name, text, ("0", "1"))
    return text == "1"


def _parse_list(name: str, text: str) -> tuple[int, ...]:
    return tuple(_parse_number(name, number) for number in text.split(",")) if text else ()


def _list_text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _flag_text(value: bool) -> str:
    return str(int(value))


def _pair_text(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def _steps_text(steps: Steps) -> str:
    return f"{steps.first_sequence}.{steps.start}-{steps.last_sequence}.{steps.stop}"


def _on_text(on: tuple[float, bool]) -> str:
    return f"{'>' if on[1] else '<'}{on[0]:g}"


_TEXT = _Part(str, _parse_text)
_STEPS = _Part(_steps_text, _parse_steps)
_PAIR = _Part(_pair_text, _parse_pair)
_FLAG = _Part(_flag_text, _parse_flag)

_PARTS = {
    "run": _TEXT,
    "beside": _TEXT,
    "site": _TEXT,
    "quantity": _TEXT,
    "statistic": _Part(str, _one_of(STATISTICS)),
    "order": _Part(str, _one_of(ORDERS)),
    "select": _TEXT,
    "steps": _STEPS,
    "units": _PAIR,
    "mark": _STEPS,
    "on": _Part(_on_text, _parse_on),
    "around": _PAIR,
    "chosen": _Part(_list_text, _parse_list),
    "least": _Part(str, _parse_number),
    "follow": _FLAG,
    "search": _FLAG,
}
