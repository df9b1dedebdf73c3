"""Tokens and labels as users have them: texts, numbers and token ids, of Python, NumPy and torch.

They become lists of Python's own texts or numbers, one a sequence. B sequences in a batch, T steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from grutrace.errors import OptionError, short_repr

#: Texts, numbers, or arrays and tensors of them: one a step, or one for all steps, of each sequence
#: of a batch.
Values: TypeAlias = Iterable[Any]

#: Whole numbers up to this size are kept exactly: values are stored as float64.
MAX_EXACT_INTEGER = 2**53


class ParsedValues(NamedTuple):
    """Values of a batch.

    Attributes:
        lists: (B,) for each sequence a list with one value a step, or one value for all its steps.
            All are texts, or all are numbers.
        padded: Whether they are the rows of an array, where all are as long as the longest sequence
            and what lies beyond a sequence's own steps is padding.
    """

    lists: list[Any]
    padded: bool = False

    @property
    def longest(self) -> int | None:
        """Values of the longest list; None if there is no list."""
        return max((len(each) for each in self.lists if isinstance(each, list)), default=None)


def parse(name: str, given: Values) -> ParsedValues:
    """Take values in any form that users have.

    Args:
        name: ``tokens``, whose value for a sequence is a list, or a text of one letter a step; or a
            label's name, which may have one value for all steps of a sequence.
        given: Lists, tuples, arrays or tensors, in each other; (B, T) if it is one array. Values
            are texts, or numbers: Python's, NumPy's, or arrays and tensors with one element.

    Raises:
        OptionError: It is something else.
    """
    expected = (
        "one list of texts, or of token ids, a sequence"
        if name == "tokens"
        else "one list of numbers, or one of texts, a sequence, or one value a sequence"
    )
    plain = _plain(given)
    if not isinstance(plain, list):
        raise OptionError(f"{name}: expected {expected}; found {short_repr(given)}")
    lists = [_sequence(name, each) for each in plain]
    flat = [value for each in lists for value in (each if isinstance(each, list) else [each])]
    is_text = all(isinstance(value, str) for value in flat)
    if not is_text and not all(isinstance(value, (int, float)) for value in flat):
        raise OptionError(f"{name}: expected {expected}; found {short_repr(given)}")
    for value in () if is_text else flat:
        if isinstance(value, int) and abs(value) > MAX_EXACT_INTEGER:
            raise OptionError(
                f"{name}: expected whole numbers up to 2**53, which are kept exactly; found "
                f"{value}: give it as a text, str({value})"
            )
    return ParsedValues(lists, padded=len(getattr(given, "shape", ())) == 2)


def _sequence(name: str, value: Any) -> Any:
    """The values of one sequence: a list, or one for all its steps."""
    if isinstance(value, list) or name != "tokens":
        return value
    # A word is its letters. A single id belongs to a single step.
    return list(value) if isinstance(value, str) else [value]


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python's own, and what can be iterated over as a list.

    Texts, and what has no order, stay what they are.
    """
    if getattr(value, "is_nested", False):
        value = value.unbind()
    elif hasattr(value, "tolist"):
        # Of an array without axes it gives the element itself.
        value = value.tolist()
    elif hasattr(value, "to_numpy"):
        # A pandas DataFrame, whose iteration would give the names of its columns.
        value = value.to_numpy().tolist()
    if isinstance(value, np.floating):
        # Extended precision, which NumPy has no number of Python's for.
        return float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        return value
    return [_plain(each) for each in value]
