"""The exceptions and warnings of grutrace: one tree, so that a caller can catch all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
def needing(what: str, extra: str) -> Iterator[None]:
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
        raise MissingExtraError(
            f'{what} needs {library}, which is not installed: pip install "grutrace[{extra}]"'
        ) from None


class GrutraceWarning(UserWarning):
    """Base of every warning that grutrace gives."""


class ResidualWarning(GrutraceWarning):
    """The replayed states differ from the kernel's own by more than rounding explains."""
