"""Which sequences a page shows, as one line of text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from grutrace.errors import NotRecordedError, OptionError, short_repr
from grutrace.storage.read.selection.criteria import Criteria
from grutrace.storage.read.sequence_index import Integers
from grutrace.storage.read.site import SiteTrace

#: Conditions that take numbers: 3, or 10: for 10 or more, or 1,5,7.
NUMBERS = ("length", "calls", "sequences")


def parse_conditions(text: str) -> dict[str, Any]:
    """Parse conditions, such as ``tag=valid; length=10:; pos=noun; tokens=the a*``.

    Returns:
        The arguments of `Trace.select`. Any other name is that of a label.

    Raises:
        OptionError: The text is something else.

    Examples:
        >>> parse_conditions("tag=valid; length=10:; pos=noun")
        {'tag': 'valid', 'length': slice(10, None, None), 'label': {'pos': 'noun'}}
    """
    conditions: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = (item.strip() for item in part.partition("="))
        if not (name and equals and value):
            raise OptionError(
                "select: expected conditions such as tag=valid; length=10:; pos=noun; "
                f"found {short_repr(part)}"
            )
        if name in NUMBERS:
            conditions[name] = _parse_numbers(name, value)
        elif name in ("tag", "tokens"):
            conditions[name] = value
        else:
            labels[name.removeprefix("label ")] = value
    return conditions | ({"label": labels} if labels else {})


def parse_selection(text: str) -> Criteria:
    """Parse the same conditions into criteria.

    Raises:
        OptionError: The text is something else.

    Examples:
        >>> str(parse_selection("tag=valid; length=10:; pos=noun"))
        'tag=valid, label pos=noun, length=10:'
    """
    return Criteria.parse(**parse_conditions(text))


def selected_sequences(site: SiteTrace, text: str) -> Integers | None:
    """Return the numbers of the selected sequences of a site; None for all.

    Raises:
        OptionError: The text is not a selection.
        NotRecordedError: No sequence is selected, or there is no such label.
    """
    if not text.strip():
        return None
    criteria = parse_selection(text)
    criteria.require_recorded(site.snapshot)
    sequences = np.flatnonzero(criteria.mask(site.snapshot, site.module_index))
    if not len(sequences):
        raise NotRecordedError(f"no sequence has {criteria}")
    return sequences


def _parse_numbers(name: str, text: str) -> slice | list[int]:
    if match := re.fullmatch(r"(-?\d{1,15})?:(-?\d{1,15})?", text, re.ASCII):
        return slice(*(None if bound is None else int(bound) for bound in match.groups()))
    if re.fullmatch(r"-?\d{1,15}( *, *-?\d{1,15})*", text, re.ASCII):
        return [int(number) for number in text.split(",")]
    raise OptionError(
        f"{name}: expected 3, or 10: for 10 or more, or 1,5,7; found {short_repr(text)}"
    )
