"""Find what a test leaves behind: hooks, modes, threads and open files."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path

import torch
from torch.overrides import _get_current_function_mode_stack

from grutrace.capture.kernel_calls import subscription

#: Linux lists the open files of a process here.
OPEN_FILES = Path("/proc/self/fd")

#: What other libraries load once and keep: fonts, compiled code.
KEPT_BY_LIBRARIES = Path(torch.__file__).parents[1]

#: Whose threads count: a library may keep one of a class of its own for good (tqdm does).
THREADS = ("threading", "grutrace.", "tests.")

#: How long a thread may take to end once nobody needs it any more. Seconds.
PATIENCE = 5.0


class Watch:
    """Knows what was there when it began, and finds what has come since and was left behind."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = open_files()
        self._modes = len(_get_current_function_mode_stack())
        self._gradients = torch.is_grad_enabled()

    def leaks(self) -> list[str]:
        """What was left behind, in words."""
        result = self._look()
        if result:
            # A model, a tracer or a file in a cycle is gone once it is collected.
            gc.collect()
            result = self._look()
        return result

    def _look(self) -> list[str]:
        modes = len(_get_current_function_mode_stack()) - self._modes
        return [
            *(["GRU kernels that are still heard"] if subscription.is_observing() else []),
            *([f"{modes} TorchFunctionModes"] if modes else []),
            *([] if torch.is_grad_enabled() == self._gradients else ["the mode of gradients"]),
            *(f"{each}" for each in set(threading.enumerate()) - self._threads if _lives(each)),
            *(f"open file {name}" for _, name in open_files() - self._files),
        ]


def open_files() -> set[tuple[str, str]]:
    """Descriptors and paths of the files that this process has open; none where it cannot know."""
    result = set()
    for number in os.listdir(OPEN_FILES) if OPEN_FILES.exists() else ():
        with contextlib.suppress(OSError):
            result.add((number, os.readlink(OPEN_FILES / number)))
    return {
        each
        for each in result
        if each[1].startswith("/")
        and "/proc/" not in each[1]
        and not Path(each[1]).is_relative_to(KEPT_BY_LIBRARIES)
    }


def _lives(thread: threading.Thread) -> bool:
    if not type(thread).__module__.startswith(THREADS):
        return False
    thread.join(PATIENCE)
    return thread.is_alive()
