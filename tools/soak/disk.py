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

#: The compiler command.
COMPILER = shutil.which("cc") or shutil.which("gcc")


def is_under_us() -> bool:
    """Whether this process was started with the disk that can fail."""
    return hasattr(ctypes.CDLL(None), "disk_fail")


def build(folder: Path) -> Path:
    """Compile disk.c."""
    assert COMPILER is not None, "a C compiler is needed"
    library = folder / "disk.so"
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def start_again(folder: Path) -> None:
    """Restart this Python program with the preloaded library."""
    environment = os.environ | {"LD_PRELOAD": str(build(folder))}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def folder() -> Path:
    """The folder of the compiled library, in a restarted program."""
    return Path(os.environ["LD_PRELOAD"]).parent


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    longest = ctypes.c_int64
    library.disk_fail.argtypes = [
        ctypes.c_char_p, ctypes.c_int, ctypes.c_long, longest, ctypes.c_int
    ]  # fmt: skip
    library.disk_failures.restype = ctypes.c_long
    library.disk_own_failures.restype = ctypes.c_long
    return library


def fail(
    prefix: Path, error: int, *, writes: int = 0, size: int = -1, at_fsync: bool = False
) -> None:
    """Make writes fail for files whose path begins with this text.

    Args:
        prefix: The beginning of the paths.
        error: The errno.
        writes: The number of writes, or fsyncs, that succeed first.
        size: Instead, the maximum size of a file. Writes beyond it are cut.
        at_fsync: Whether fsyncs fail instead of writes.
    """
    _library().disk_fail(os.fsencode(prefix), error, writes, size, at_fsync)


def failures() -> int:
    """The number of failures so far."""
    return int(_library().disk_failures())


def own_failures() -> int:
    """The number of failures so far, without those of copies and of files that a copy replaced."""
    return int(_library().disk_own_failures())


def log(prefix: Path, descriptor: int) -> None:
    """Log every write and fsync of files whose path begins with this text: see `power.py`."""
    _library().disk_log(os.fsencode(prefix), descriptor)
