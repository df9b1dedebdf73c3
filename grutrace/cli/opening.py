"""What commands read: a trace in a file, or in the shards of several processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from grutrace.cli.output import say
from grutrace.storage.sinks import open_trace
from grutrace.storage.trace import Trace


@contextmanager
def opened(files: Sequence[Path]) -> Iterator[Trace]:
    """Open a trace. What is doubtful about it becomes a line on standard error.

    Args:
        files: One file or glob, or several shards.

    Raises:
        TraceFileError: As for `grutrace.open`.
    """
    with said_in_lines():
        trace = open_trace(files[0] if len(files) == 1 else files)
    with trace:
        yield trace


@contextmanager
def said_in_lines() -> Iterator[None]:
    """Turn warnings into lines on standard error."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    for each in given:
        say(f"grutrace: {each.message}", stderr=True)


def name_of(files: Sequence[Path]) -> str:
    """What output calls them."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
