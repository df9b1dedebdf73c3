"""Find what a test leaves behind: hooks, modes, threads and open files."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path

import torch
from torch.overrides import _get_current_function_mode_stack

from grutrace.capture.kernel_calls import registration, subscription

#: Linux lists the open files of a process here.
OPEN_FILES = Path("/proc/self/fd")

#: Files below this folder are kept open by other libraries: fonts, compiled code.
KEPT_BY_LIBRARIES = f"{Path(torch.__file__).parents[1]}{os.sep}"

#: Modules whose threads count. Other libraries may keep threads (tqdm does).
THREADS = ("threading", "grutrace.", "tests.")

#: The time that an unreferenced thread may take to end. Seconds.
PATIENCE = 5.0


class Watch:
    """Compare open files, threads and modes with those at the start of a test."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = open_files()
        self._modes = len(_get_current_function_mode_stack())
        self._gradients = torch.is_grad_enabled()

    def leaks(self) -> list[str]:
        """Describe what was left behind."""
        result = self._look()
        if result:
            # A reference cycle may still hold a model, a tracer or a file.
            gc.collect()
            result = self._look()
        return result

    def _look(self) -> list[str]:
        modes = len(_get_current_function_mode_stack()) - self._modes
        return [
            *(["GRU kernels that are still overridden"] if kernels_are_overridden() else []),
            *([f"{modes} TorchFunctionModes"] if modes else []),
            *([] if torch.is_grad_enabled() == self._gradients else ["the mode of gradients"]),
            *(
                f"{thread}"
                for thread in set(threading.enumerate()) - self._threads
                if _lives(thread)
            ),
            *(f"open file {name}" for _, name in open_files() - self._files),
        ]


def kernels_are_overridden() -> bool:
    """Whether anything overrides the GRU kernels.

    Before PyTorch 2.9, kernels that nobody uses stay while another thread runs Python, as those of
    pytest-xdist do. Then it counts whether they have users.
    """
    if registration.has_kernel_handles():
        return subscription.is_observing()
    return bool(subscription._registration._users)


def open_files() -> set[tuple[str, str]]:
    """Descriptors and paths of the open files of this process; empty if unknown."""
    result = set()
    for number in os.listdir(OPEN_FILES) if OPEN_FILES.exists() else ():
        with contextlib.suppress(OSError):
            result.add((number, os.readlink(OPEN_FILES / number)))
    return {
        opened
        for opened in result
        if opened[1].startswith("/")
        and "/proc/" not in opened[1]
        and not opened[1].startswith(KEPT_BY_LIBRARIES)
    }


def _lives(thread: threading.Thread) -> bool:
    # Before PyTorch 2.6, one of its compiler's has this name.
    if not type(thread).__module__.startswith(THREADS) or "(_read_thread)" in thread.name:
        return False
    thread.join(PATIENCE)
    return thread.is_alive()
