"""Options that are no plain words or numbers, as they are written on a command line."""

from __future__ import annotations

import re

from grutrace.errors import OptionError

#: Decimal and binary multiples of a byte.
SUFFIXES = {
    "": 1,
    **{letter: 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)},
}


def size(text: str) -> int:
    """Return the bytes of a text such as 500000, 10GB or 1.5GiB.

    Raises:
        OptionError: It is no such text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if found is None:
        raise OptionError(f"max_bytes: expected a size such as 10GB or 512MiB, found {text!r}")
    return int(float(found[1]) * SUFFIXES[found[2] or ""])
