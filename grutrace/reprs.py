"""Short reprs of results: a few lines of 80 columns, with a summary of each array."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

#: Longest line of a repr.
WIDTH = 80

#: Longest text of one value in a repr.
MAX_VALUE_CHARS = 60

_INDENT = "    "


def wrap_text(text: str) -> str:
    """Wrap a text to `WIDTH` columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent=_INDENT, break_on_hyphens=False)


def fields_repr(result: Any) -> str:
    """Return the repr of a dataclass. Arrays are summarized by type, shape and range."""
    fields = dataclasses.fields(result)
    return named_repr(
        type(result).__name__, ((field.name, getattr(result, field.name)) for field in fields)
    )


def named_repr(name: str, values: Iterable[tuple[str, Any]]) -> str:
    """Return a repr of the form ``name(key=value, ...)``, wrapped to `WIDTH` columns.

    Examples:
        >>> named_repr("Result", [("mean", 0.25), ("gates", ("reset", "update"))])
        "Result(mean=0.25, gates=('reset', 'update'))"
    """
    fields = [f"{key}={_summarize(value)}" for key, value in values]
    lines, line = [], f"{name}("
    for number, field in enumerate(fields):
        field += ")" if number == len(fields) - 1 else ", "
        if len(line) + len(field.rstrip()) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = _INDENT
        line += field
    return "\n".join([*lines, line])


def _summarize(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim:
        return _summarize_array(value)
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    if isinstance(value, (str, bool, int, np.generic)) or value is None:
        return shorten(repr(value) if not isinstance(value, np.generic) else str(value))
    if isinstance(value, Mapping):
        return shorten("{" + ", ".join(map(str, value)) + "}")
    if isinstance(value, (list, tuple)):
        text = repr(value)
        return text if len(text) <= MAX_VALUE_CHARS else f"<{type(value).__name__} of {len(value)}>"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return (
        text if len(text) <= MAX_VALUE_CHARS and "\n" not in text else f"<{type(value).__name__}>"
    )


def _summarize_array(array: np.ndarray[Any, Any]) -> str:
    text = f"{array.dtype} {array.shape}"
    if array.dtype.kind not in "iuf" or not array.size:
        return text if array.dtype.names is None else f"<table {array.shape}>"
    finite = array[np.isfinite(array)]
    if not finite.size:
        return f"{text} none finite"
    low, high = finite.min(), finite.max()
    return f"{text} {low:.4g} to {high:.4g}" if low != high else f"{text} all {low:.4g}"


def shorten(text: str, chars: int = MAX_VALUE_CHARS) -> str:
    """Return a text of at most this many characters: its beginning and its end.

    Examples:
        >>> shorten("encoder.a_long_name.rnn.l0", 16)
        'encoder....nn.l0'
    """
    if len(text) <= chars:
        return text
    return f"{text[: chars // 2]}...{text[-(chars // 2 - 3) :]}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Examples:
        >>> plural(1, "site"), plural(2000, "site")
        ('1 site', '2,000 sites')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
