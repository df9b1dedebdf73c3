"""A disk that fails on command: preloads disk.c before libc in a new process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")

#: How the compiler is called.
COMPILER = shutil.which("cc") or shutil.which("gcc")


def is_under_us() -> bool:
    """Whether this process was started with the disk that can fail."""
    return hasattr(ctypes.CDLL(None), "disk_fail")


def build(folder: Path) -> Path:
    """Compile it."""
    assert COMPILER is not None, "a C compiler is needed"
    library = folder / "disk.so"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def start_again(folder: Path) -> None:
    """Become the same Python program, with the disk that can fail under it."""
    environment = os.environ | {"LD_PRELOAD": str(build(folder))}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def folder() -> Path:
    """Where it was compiled, in a program that was started again."""
    return Path(os.environ["LD_PRELOAD"]).parent


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    longest = ctypes.c_int64
    library.disk_fail.argtypes = [
        ctypes.c_char_p, ctypes.c_int, ctypes.c_long, longest, ctypes.c_int
    ]  # fmt: skip
    library.disk_failures.restype = ctypes.c_long
    return library


def fail(
    prefix: Path, error: int, *, writes: int = 0, size: int = -1, at_fsync: bool = False
) -> None:
    """Have writes to files fail whose path begins so.

    Args:
        prefix: Of the paths.
        error: The errno.
        writes: How many writes, or fsyncs, succeed before.
        size: Instead, how long a file may become: what is longer is written up to there.
        at_fsync: Whether it is the fsyncs that fail.
    """
    _library().disk_fail(os.fsencode(prefix), error, writes, size, at_fsync)


def failures() -> int:
    """How often something has failed."""
    return int(_library().disk_failures())


def log(prefix: Path, descriptor: int) -> None:
    """Keep every write and fsync of files whose path begins so: see `power.py`."""
    _library().disk_log(os.fsencode(prefix), descriptor)
