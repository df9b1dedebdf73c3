"""Interrupt grutrace at any line of its own code."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import grutrace

TraceFunction = Callable[..., Any]

_PACKAGE = Path(grutrace.__file__).parent

#: Where a call is observed, replayed and recorded.
CAPTURE = (str(_PACKAGE / "capture"), str(_PACKAGE / "gru"))

#: What becomes of a record in a sink has tests of its own: not between a sink's having a record and
#: our knowing of it.
GUARDED_SINK = str(_PACKAGE / "capture/recording/guarded_sink.py")


class Fault(Exception):
    pass


class Interruption(KeyboardInterrupt):
    pass


class AtLine:
    """Raises at the k-th line of grutrace's own code that this thread runs.

    Args:
        place: k.
        error: What to raise.
        files: Counts the lines of files whose paths begin with one of these.
    """

    def __init__(
        self, line: int, error: type[BaseException], files: tuple[str, ...] = CAPTURE
    ) -> None:
        self.left, self.error, self.files = line, error, files

    def __enter__(self) -> AtLine:
        self.before = sys.gettrace()
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enter(self, frame: FrameType, _event: str, _arg: object) -> TraceFunction | None:
        is_counted = _is_counted(frame.f_code.co_filename, self.files)
        return self.line if is_counted and self.left > 0 else None

    def line(self, frame: FrameType, event: str, _arg: object) -> TraceFunction:
        # Python itself lets a lock go unreleased if it is interrupted on leaving its `with`.
        if event == "line" and not _begins_with(frame.f_code.co_filename, frame.f_lineno):
            self.left -= 1
            if self.left == 0:
                raise self.error("on purpose")
        return self.line


@cache
def _is_counted(path: str, files: tuple[str, ...]) -> bool:
    return path.startswith(files) and path != GUARDED_SINK


@cache
def _begins_with(path: str, line: int) -> bool:
    """Whether a line of the source begins a `with` block."""
    return linecache.getline(path, line).strip().startswith("with ")
