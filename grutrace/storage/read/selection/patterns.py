"""Patterns for tags, labels and tokens.

Every value has a text: a string is its own text, an integer has no decimal point, and other numbers
are written as in Python. A pattern is a glob for this text, as in `fnmatch`, and case matters:
``*`` for any text, ``?`` for one character, ``[ab]`` for one of these characters, ``[!ab]`` for one
of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from grutrace.errors import OptionError, short_repr
from grutrace.storage.read.annotations import LabelColumn
from grutrace.storage.read.sequence_index import Integers, SequenceIndex

#: Patterns of `TokenPattern` for the two ends of a sequence.
START, END = "^", "$"

Mask = npt.NDArray[np.bool_]


def value_text(value: str | float) -> str:
    """Return the text of a label, tag or token.

    Examples:
        >>> value_text("noun"), value_text(3.0), value_text(0.5)
        ('noun', '3', '0.5')
    """
    if isinstance(value, str):
        return value
    number = float(value)
    return str(int(number)) if number.is_integer() else repr(number)


def matches_any(value: str | float, globs: Iterable[str]) -> bool:
    """Return whether the text of a value matches one of these globs."""
    text = value_text(value)
    return any(fnmatchcase(text, glob) for glob in globs)


def parse_globs(option: str, value: Any) -> tuple[str, ...]:
    """Return one value or several as globs for their texts.

    Raises:
        OptionError: A value is neither a text nor a number, or there is none.
    """
    is_single = isinstance(value, (str, Real)) or not isinstance(value, Iterable)
    values = [value] if is_single else list(value)
    if not values or not all(isinstance(item, (str, Real)) for item in values):
        raise OptionError(
            f"{option}: expected a glob or a number, or several; found {short_repr(value)}"
        )
    return tuple(value_text(item if isinstance(item, str) else float(item)) for item in values)


def matching_codes(column: LabelColumn, globs: Sequence[str]) -> Mask:
    """Return which rows have a value that matches one of these globs, (N,)."""
    is_match = [matches_any(value, globs) for value in column.values]
    # Code -1, for a row without a value, selects the last item.
    return np.array([*is_match, False])[column.codes]


@dataclass(frozen=True)
class TokenPattern:
    """A pattern for consecutive tokens: one glob for each.

    The globs ``^`` and ``$`` take no token: the first one matches before the first step of a
    sequence, the last one after its last step. A step without a token matches no glob.

    Attributes:
        globs: A glob for each of the consecutive tokens, at least one.
        at_start: Whether the first of them is the first step of the sequence.
        at_end: Whether the last of them is the last step of the sequence.
    """

    globs: tuple[str, ...]
    at_start: bool = False
    at_end: bool = False

    @classmethod
    def parse(cls, value: Any) -> TokenPattern:
        """Parse a text with globs that are separated by spaces, or a list of globs.

        Raises:
            OptionError: The value has another type, or no glob for a token.

        Examples:
            >>> TokenPattern.parse("^ the a*")
            TokenPattern(globs=('the', 'a*'), at_start=True, at_end=False)
        """
        parts = value.split() if isinstance(value, str) else value
        is_list = isinstance(parts, Sequence) and not isinstance(parts, (bytes, bytearray))
        globs = parse_globs("tokens", parts) if is_list and len(parts) else ()
        at_start, at_end = globs[:1] == (START,), globs[-1:] == (END,)
        globs = globs[at_start : len(globs) - at_end]
        if not globs:
            raise OptionError(
                "tokens: expected globs for consecutive tokens, such as 'a*' or '^ the *', or a "
                f"list of globs; found {short_repr(value)}"
            )
        return cls(globs, at_start, at_end)

    def find(self, column: LabelColumn, index: SequenceIndex) -> tuple[Integers, Integers]:
        """Find all places where the pattern matches.

        Args:
            column: The token of each row of a module.
            index: The sequences of the module.

        Returns:
            The sequence of each match, (n,), and the step of its first token, (n,). They are in the
            order of the sequences and steps.
        """
        rows = index.rows_between(0, len(index))
        codes, width = column.codes[rows], len(self.globs)
        starts = np.arange(max(0, len(codes) - width + 1))
        for offset, glob in enumerate(self.globs):
            is_match = np.array([*(matches_any(value, (glob,)) for value in column.values), False])
            starts = starts[is_match[codes[starts + offset]]]
        ends = index.first_positions + index.lengths
        sequences = np.searchsorted(ends, starts, side="right")
        steps = starts - index.first_positions[sequences] if len(starts) else starts
        fits = steps + width <= index.lengths[sequences]
        if self.at_start:
            fits &= steps == 0
        if self.at_end:
            fits &= steps + width == index.lengths[sequences]
        return sequences[fits], steps[fits]
