"""Exceptions and warnings of grutrace, and helpers for their messages.

All exceptions derive from `GrutraceError`, all warnings from `GrutraceWarning`. A message is one
line: it says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from importlib.metadata import PackageNotFoundError, requires
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Maximum number of characters of a value in a message.
MAX_VALUE_CHARS = 80

#: Maximum number of names of a list in a message.
MAX_LISTED_NAMES = 12

#: Expected value of an option that selects sites.
GLOBS = "a glob such as 'encoder.*', or a list of globs"

#: Names of array types in messages.
_NAMES = {"Tensor": "a tensor", "Parameter": "a parameter", "ndarray": "an array"}


class GrutraceError(Exception):
    """Base class of all exceptions that grutrace raises.

    Examples:
        >>> import grutrace
        >>> try:
        ...     trace = grutrace.open("missing.h5")
        ... except grutrace.GrutraceError as error:
        ...     print(type(error).__name__)
        TraceFileError
    """


class OptionError(GrutraceError, ValueError):
    """An option or argument has an invalid value.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> try:
        ...     tracer = grutrace.trace(torch.nn.GRU(4, 3), every=0)
        ... except grutrace.OptionError as error:
        ...     print(error)
        every: expected a whole number from 1, found 0
    """


class StateError(GrutraceError, RuntimeError):
    """The object's state does not allow the call: for example, entering a closed tracer.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> model = torch.nn.GRU(4, 3)
        >>> with grutrace.trace(model) as tracer:
        ...     output, final = model(torch.randn(5, 2, 4))
        >>> try:
        ...     tracer.start()
        ... except grutrace.StateError as error:
        ...     print(error)
        the tracer is closed: create a new one to record again
    """


class UnsupportedError(GrutraceError, TypeError):
    """A module or call cannot be traced. The message names it and says what to do instead.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> try:
        ...     tracer = grutrace.trace(torch.nn.LSTM(4, 3))
        ... except grutrace.UnsupportedError as error:
        ...     print(error)
        expected a model with an nn.GRU or nn.GRUCell inside; found none in LSTM
    """


class NotRecordedError(GrutraceError, LookupError):
    """The trace does not contain this site, sequence or quantity.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> layer = torch.nn.GRU(4, 3)
        >>> with grutrace.trace(layer, record="update") as trace:
        ...     output, final = layer(torch.randn(5, 2, 4))
        >>> try:
        ...     trace["l0"][0].reset
        ... except grutrace.NotRecordedError as error:
        ...     print(error)
        'reset' was not recorded at 'l0'; recorded: update
    """


class ResidualError(GrutraceError, ArithmeticError):
    """The replayed states differ from the kernel's states by more than the rounding tolerance.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> layer = torch.nn.GRU(4, 3)
        >>> try:
        ...     with grutrace.trace(layer, check="raise") as trace:
        ...         output, final = layer(torch.randn(5, 2, 4))
        ... except grutrace.ResidualError as error:
        ...     print(error)
        ... else:
        ...     print("proven")
        proven
    """


class SinkError(GrutraceError, OSError):
    """Recorded rows cannot be stored.

    Examples:
        >>> import torch
        >>> import grutrace
        >>> layer = torch.nn.GRU(4, 3)
        >>> try:
        ...     with grutrace.trace(layer, "run.h5", on_error="raise") as trace:
        ...         output, final = layer(torch.randn(5, 2, 4))
        ... except grutrace.SinkError as error:
        ...     print("the disk is full, or failed:", error)
        ... else:
        ...     print("stored")
        stored
    """


class TraceFileError(GrutraceError, OSError):
    """A trace file cannot be opened, read or written.

    Examples:
        >>> import grutrace
        >>> try:
        ...     trace = grutrace.open("missing.h5")
        ... except grutrace.TraceFileError as error:
        ...     print(error)
        missing.h5 does not exist
    """


class MissingExtraError(GrutraceError, ImportError):
    """A command or function needs an extra that is not installed. The message names it."""


@contextmanager
def require_extra(what: str, extra: str, *packages: str) -> Iterator[None]:
    """Raise a `MissingExtraError` if a library that the block imports is not installed.

    Args:
        what: The function or command that needs the library.
        extra: The extra of grutrace that includes the library.
        packages: Names of the packages of the extra that are needed; all by default.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library == "grutrace":
            raise
        raise MissingExtraError(missing_library_message(what, library, extra, *packages)) from None


def missing_library_message(what: str, library: str, extra: str, *packages: str) -> str:
    """Return a message that names a missing library and the pip command that installs the extra.

    The command lists the libraries, because it then also works for an installation from a checkout.

    Args:
        what: The function or command that needs the library.
        library: The import name of the library.
        extra: The extra of grutrace that includes the library.
        packages: Names of the packages of the extra that are needed; all by default.
    """
    needed = [
        requirement
        for requirement in extra_requirements(extra)
        if not packages or re.split(r"[^\w.-]", requirement)[0] in packages
    ]
    names = [*packages] or [library]
    command = " ".join([f'"{requirement}"' for requirement in needed] or names)
    return f"{what} needs {library}, which is not installed: pip install {command}"


def extra_requirements(extra: str) -> list[str]:
    """Return the requirements of an extra, for pip. Empty if grutrace itself is not installed."""
    try:
        requirements = requires("grutrace") or []
    except PackageNotFoundError:
        return []
    extra_marker = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    parts = (requirement.partition(";") for requirement in requirements)
    return [package.strip() for package, _, marker in parts if extra_marker.search(marker)]


class _ShortRepr(reprlib.Repr):
    """Shows tensors and arrays by shape and type, and classes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = MAX_VALUE_CHARS

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, type):
            return f"the class {value.__qualname__}"
        kind = type(value).__name__
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        # NumPy scalars have both attributes, but their repr is short.
        is_scalar = isinstance(value, str) or not hasattr(value, "__len__")
        if shape is None or dtype is None or is_scalar:
            return super().repr_instance(value, level)
        name = _NAMES.get(kind, f"a {kind}")
        return f"{name} of shape {tuple(shape)} and type {dtype}"


_SHORT_REPR = _ShortRepr()


def short_repr(value: object) -> str:
    """Return a one-line text for a value. Of tensors and arrays it shows shape and type only."""
    text = " ".join(_SHORT_REPR.repr(value).split())
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 3]}..."


def join_names(names: Iterable[str]) -> str:
    """Return names, separated by commas: the first ones, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - MAX_LISTED_NAMES} more" if len(listed) > MAX_LISTED_NAMES else ""
    return (", ".join(listed[:MAX_LISTED_NAMES]) + more) or "none"


def suggest_name(name: str, allowed: Iterable[str]) -> str:
    """Return a "did you mean" question with the most similar allowed name; empty without one."""
    close = get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_options(
    what: str, names: Collection[str], options: Collection[str], required: Iterable[str]
) -> None:
    """Require that the options which a user gave on the command line fit what they are given to.

    Args:
        what: What takes the options.
        names: Names of the options that the user gave.
        options: Names of the options that it takes.
        required: Those that it needs.

    Raises:
        OptionError: An option is not one of `options`, or one of `required` is missing.
    """
    for name in names:
        if name not in options:
            raise OptionError(f"{what} takes no --{name}")
    for name in required:
        if name not in names:
            raise OptionError(f"{what} needs --{name}")


def require_one_of(option: str, value: object, allowed: Sequence[str]) -> None:
    """Require a value to be one of the allowed texts.

    Raises:
        OptionError: It is not.
    """
    if not isinstance(value, str) or value not in allowed:
        near = suggest_name(value, allowed) if isinstance(value, str) else ""
        raise OptionError(
            f"{option}: expected one of {', '.join(allowed)}; found {short_repr(value)}{near}"
        )


def string_list(option: str, value: object, expected: str) -> list[str]:
    """Return one text, or several, as a list with at least one element.

    Args:
        option: Name of the option.
        value: The value that the user passed.
        expected: A description of valid values, for the error message.

    Raises:
        OptionError: The value is empty, or contains something other than texts.
    """
    texts: list[Any] = []
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        texts = list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"{option}: expected {expected}; found {short_repr(value)}")
    return texts


def as_path(value: object, option: str = "path") -> Path:
    """Return a path as a `pathlib.Path`.

    Raises:
        OptionError: The value is not a path.
    """
    try:
        # Bytes are not accepted, because messages and other file names include the path as text.
        return Path(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(
            f"{option}: expected the path of a file, as a str or pathlib.Path; "
            f"found {short_repr(value)}"
        ) from None


def user_stacklevel() -> int:
    """Return the ``stacklevel`` with which `warnings.warn` names the line that called grutrace."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("grutrace."):
        level, frame = level + 1, frame.f_back
    return level


def reject_unknown_options(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that an unknown keyword raises an error that suggests a known one.

    Raises:
        OptionError: The function has no such option.
    """
    parameters = signature(function).parameters.values()
    known = {
        parameter.name
        for parameter in parameters
        if parameter.kind is not Parameter.POSITIONAL_ONLY
    }
    known.discard("self")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                ordered = [parameter.name for parameter in parameters if parameter.name in known]
                near = suggest_name(name, ordered) or f"; the options are {', '.join(ordered)}"
                raise OptionError(f"{name}: unknown option{near}")
        return function(*args, **kwargs)

    return checked


class GrutraceWarning(UserWarning):
    """Base class of all warnings that grutrace issues.

    Examples:
        >>> import warnings
        >>> import torch
        >>> import grutrace
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", grutrace.GrutraceWarning)
        ...     with grutrace.trace(torch.nn.GRU(4, 3)) as trace:
        ...         pass
        >>> print(caught[0].message)
        nothing was recorded of the model: ...
    """


class ResidualWarning(GrutraceWarning):
    """The replayed states differ from the kernel's states by more than the rounding tolerance.

    Examples:
        >>> import warnings
        >>> import torch
        >>> import grutrace
        >>> layer = torch.nn.GRU(4, 3)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", grutrace.ResidualWarning)
        ...     with grutrace.trace(layer) as trace:
        ...         output, final = layer(torch.randn(5, 2, 4))
        >>> trace["l0"].residual < 1e-6
        True
    """
