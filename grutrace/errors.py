"""The exceptions and warnings of grutrace, one tree, so that a caller can catch all; and how their
messages show what was found.

A message is one line: what was expected, what was found, where, and what to do.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from importlib.metadata import PackageNotFoundError, requires
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Characters of a value that a message shows.
MAX_VALUE_CHARS = 80

#: Names of a list that a message shows.
MAX_LISTED_NAMES = 12

#: What is expected of an option that chooses sites.
GLOBS = "a glob such as 'encoder.*', or several"

#: How messages call what holds many numbers.
_NAMES = {"Tensor": "a tensor", "Parameter": "a parameter", "ndarray": "an array"}


class GrutraceError(Exception):
    """Base of every error that grutrace raises on purpose."""


class OptionError(GrutraceError, ValueError):
    """An option or argument has a value that cannot be used."""


class StateError(GrutraceError, RuntimeError):
    """A call that the object's present state does not allow, such as entering a closed tracer."""


class UnsupportedError(GrutraceError, TypeError):
    """A module or call that cannot be traced; the message names it and says what to do instead."""


class NotRecordedError(GrutraceError, LookupError):
    """A site, sequence or quantity that the trace does not hold."""


class ResidualError(GrutraceError, ArithmeticError):
    """The replayed states differ from the kernel's own by more than rounding explains."""


class SinkError(GrutraceError, OSError):
    """Recorded rows could not be stored."""


class TraceFileError(GrutraceError, OSError):
    """A file cannot be opened, read or written as a trace."""


class MissingExtraError(GrutraceError, ImportError):
    """A command or function needs an extra that is not installed; the message says which."""


@contextmanager
def require_extra(what: str, extra: str) -> Iterator[None]:
    """Turn the absence of a library that is imported inside into a `MissingExtraError`.

    Args:
        what: What of grutrace needs it.
        extra: What to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library == "grutrace":
            raise
        raise MissingExtraError(missing_library_message(what, library, extra)) from None


def missing_library_message(what: str, library: str, extra: str) -> str:
    """Say that something needs a library, and how to install all that the extra asks for.

    pip finds the libraries themselves, whether grutrace was installed from a checkout or not.

    Args:
        what: What of grutrace needs it.
        library: Name under which it is imported.
        extra: The extra that has it.
    """
    asked = " ".join(f'"{each}"' for each in extra_requirements(extra)) or library
    return f"{what} needs {library}, which is not installed: pip install {asked}"


def extra_requirements(extra: str) -> list[str]:
    """What an extra asks for, as pip takes it; nothing if grutrace itself is not installed."""
    try:
        found = requires("grutrace") or []
    except PackageNotFoundError:
        return []
    marked = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    split = (each.partition(";") for each in found)
    return [requirement.strip() for requirement, _, marker in split if marked.search(marker)]


class _ShortRepr(reprlib.Repr):
    """Shows tensors and arrays by their shape and type, and classes as such."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = MAX_VALUE_CHARS

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, type):
            return f"the class {value.__qualname__}"
        kind = type(value).__name__
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        # Scalars of NumPy have both, too, and a short text.
        is_scalar = isinstance(value, str) or not hasattr(value, "__len__")
        if shape is None or dtype is None or is_scalar:
            return super().repr_instance(value, level)
        name = _NAMES.get(kind, f"a {kind}")
        return f"{name} of shape {tuple(shape)} and type {dtype}"


_SHORT_REPR = _ShortRepr()


def short_repr(value: object) -> str:
    """A value as a message shows it: on one line, and never the elements of a tensor or array."""
    text = " ".join(_SHORT_REPR.repr(value).split())
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 3]}..."


def join_names(names: Iterable[str]) -> str:
    """Names with commas between: the first of them, and how many more there are."""
    given = list(names)
    more = f" and {len(given) - MAX_LISTED_NAMES} more" if len(given) > MAX_LISTED_NAMES else ""
    return (", ".join(given[:MAX_LISTED_NAMES]) + more) or "none"


def suggest_name(name: str, allowed: Iterable[str]) -> str:
    """A question for the allowed name that is most like this one; empty if none is like it."""
    close = get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of the texts that are allowed.

    Raises:
        OptionError: It is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        near = suggest_name(value, allowed) if isinstance(value, str) else ""
        raise OptionError(
            f"{option}: expected one of {', '.join(allowed)}; found {short_repr(value)}{near}"
        )


def string_list(option: str, value: object, expected: str) -> list[str]:
    """A text, or several, as a list of at least one.

    Args:
        option: Name of the option.
        value: As it was given.
        expected: What it should be, in words.

    Raises:
        OptionError: It is none, or there is something else among them.
    """
    texts: list[Any] = []
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        texts = list(value)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise OptionError(f"{option}: expected {expected}; found {short_repr(value)}")
    return texts


def as_path(value: object, option: str = "path") -> Path:
    """A path of any kind as a `pathlib.Path`.

    Raises:
        OptionError: It is none.
    """
    try:
        # Bytes are no path here: what a file is called has to go into messages and other names.
        return Path(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(
            f"{option}: expected the path of a file, as a str or pathlib.Path; "
            f"found {short_repr(value)}"
        ) from None


def reject_unknown_options(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function refuse keywords that it does not know, and suggest the nearest that it does.

    Raises:
        OptionError: There is no option of that name.
    """
    parameters = signature(function).parameters.values()
    known = {each.name for each in parameters if each.kind is not Parameter.POSITIONAL_ONLY}
    known.discard("self")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                ordered = [each.name for each in parameters if each.name in known]
                near = suggest_name(name, ordered) or f"; there are {', '.join(ordered)}"
                raise OptionError(f"{name}: there is no such option{near}")
        return function(*args, **kwargs)

    return checked


class GrutraceWarning(UserWarning):
    """Base of every warning that grutrace gives."""


class ResidualWarning(GrutraceWarning):
    """The replayed states differ from the kernel's own by more than rounding explains."""
