"""Parse tokens and labels: texts, numbers and token ids of Python, NumPy, pandas and torch.

`match_modules` finds the modules that a user gives values for.

They become lists of Python texts or numbers, one per sequence. B sequences in a batch, T steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from grutrace.errors import OptionError, join_names, short_repr

#: Texts, numbers, or arrays and tensors of them, for each sequence of a batch: one value per step,
#: or one value for all steps.
Values: TypeAlias = Iterable[Any]

#: Values are stored as float64, which is exact for whole numbers up to this size.
MAX_EXACT_INTEGER = 2**53


class ParsedValues(NamedTuple):
    """Values of a batch.

    Attributes:
        lists: (B,) for each sequence a list with one value per step, or one value for all its
            steps. All values are texts, or all are numbers.
        padded: Whether the lists are the rows of an array. All are then as long as the longest
            sequence, and values beyond the end of a shorter sequence are padding.
    """

    lists: list[Any]
    padded: bool = False

    @property
    def longest(self) -> int | None:
        """Number of values of the longest list; None if there is no list."""
        return max((len(values) for values in self.lists if isinstance(values, list)), default=None)


def parse(name: str, values: Values, *, missing: bool = False) -> ParsedValues:
    """Parse the tokens or labels of a batch.

    Args:
        name: ``tokens``, or the name of a label. The tokens of a sequence are a list, or a text
            with one letter per step. A label may have one value for all steps of a sequence.
        values: Nested lists, tuples, arrays or tensors; (B, T) if it is one array. The elements are
            texts, or numbers of Python or NumPy, or arrays and tensors with one element.
        missing: Whether a value, or the list of a sequence, may be None.

    Raises:
        OptionError: The values have another form or type, or are too large to be stored exactly.
    """
    expected = (
        "one list of texts, or of token ids, a sequence"
        if name == "tokens"
        else "one list of numbers, or one of texts, a sequence, or one value a sequence"
    )
    rows = _to_python(values)
    if not isinstance(rows, list):
        raise OptionError(f"{name}: expected {expected}; found {short_repr(values)}")
    lists = [_parse_sequence(name, row) for row in rows]
    flat = [value for row in lists for value in (row if isinstance(row, list) else [row])]
    if missing:
        flat = [value for value in flat if value is not None]
    is_text = all(isinstance(value, str) for value in flat)
    if not is_text and not all(isinstance(value, (int, float)) for value in flat):
        raise OptionError(f"{name}: expected {expected}; found {short_repr(values)}")
    for value in () if is_text else flat:
        if isinstance(value, int) and abs(value) > MAX_EXACT_INTEGER:
            raise OptionError(
                f"{name}: expected whole numbers up to 2**53, which are kept exactly; found "
                f"{value}: give it as a text, str({value})"
            )
    return ParsedValues(lists, padded=len(getattr(values, "shape", ())) == 2)


def _parse_sequence(name: str, value: Any) -> Any:
    """Return the values of one sequence as a list, or one value for all its steps."""
    if isinstance(value, list) or name != "tokens" or value is None:
        return value
    # A word stands for its letters, a single id for the token of a single step.
    return list(value) if isinstance(value, str) else [value]


def _to_python(value: Any) -> Any:
    """Return arrays, tensors and their scalars as Python values, and other iterables as lists.

    Texts, mappings and sets are returned unchanged.
    """
    if getattr(value, "is_nested", False):
        value = value.unbind()
    elif hasattr(value, "tolist"):
        # An array without axes becomes its element.
        value = value.tolist()
    elif hasattr(value, "to_numpy"):
        # Iterating over a pandas DataFrame would give the names of its columns.
        value = value.to_numpy().tolist()
    if isinstance(value, np.floating):
        # Extended precision: `tolist` has no Python type for it.
        return float(value)
    if isinstance(value, str):
        # A NumPy text becomes a Python text.
        return str(value)
    if isinstance(value, (bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        return value
    return [_to_python(item) for item in value]


def match_modules(paths: Sequence[str], module: str | None) -> list[int]:
    """Return the indices of the modules that values are for.

    Args:
        paths: Paths of the modules of the trace.
        module: Path, or glob, of the modules. None for all.

    Raises:
        OptionError: No module has such a path.
    """
    indices = [
        index
        for index, path in enumerate(paths)
        if module is None or path == module or fnmatchcase(path, module)
    ]
    if not indices:
        known = join_names(map(repr, paths))
        raise OptionError(f"module: {short_repr(module)} matches none of the modules: {known}")
    return indices
