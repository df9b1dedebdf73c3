"""A first look at a file from outside: in a process of its own, which HDF5 may take down with it.

HDF5 checks most of what it reads, and not all: there are files on which it crashes. A process that
reads one ends there, and can say nothing of it. So where a file is judged, another process goes
first, and looks at what HDF5 itself interprets: every header, every table, and where items of every
dataset lie. It takes a third of a second for a small trace.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import h5py

from grutrace.errors import GrutraceError, TraceFileError
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.safe_access import get_member, is_dataset, require_local_data
from grutrace.storage.hdf5.safe_open import disable_plugins, open_for_reading
from grutrace.storage.recovery.plan import best_plan
from grutrace.storage.shards.globs import matching_files
from grutrace.storage.shards.open_files import open_files
from grutrace.storage.shards.run_parts import part_files

#: What is looked at: a file, or a glob or paths of shards.
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: How long the look may take. The largest trace that was tried, of a million calls, takes two.
#: Seconds.
TIMEOUT = 60.0

#: How long the other process may compute, if nobody is left to end it. Seconds.
CPU_SECONDS = 300

#: Groups within one another: modules, a module, a site.
GROUP_DEPTH = 3

#: Items of each dataset that are read: HDF5 looks up where each lies. To have it list all chunks
#: would be to wait for ever where a damaged index tells of very many.
SAMPLES = 64

#: Memory that the other process may take: so much, and so much for each byte of the file. HDF5 and
#: NumPy reserve a gibibyte or two of addresses that they do not use. Bytes.
MEMORY_BYTES, MEMORY_PER_FILE_BYTE = 4 * 1024**3, 8

#: How the other process ends where that is not enough.
_EXIT_OUT_OF_MEMORY = 3

#: What the other process runs. It is told where to find things, and looks nowhere else: the folder
#: of the file may hold an h5py.py.
_SCRIPT = """
import sys
sys.path[:] = {path!r}
from {module} import {function}
{function}({files!r})
"""


def check_in_subprocess(
    path: Paths, limit: float = TIMEOUT, function: str = "read_everything"
) -> None:
    """Let another process look at a trace first. Errors that it meets are left to whoever reads.

    Args:
        path: Of the trace; or a glob or paths of shards.
        limit: How long it may take, in seconds.
        function: How it looks: one of this module, that is given the paths.

    Raises:
        TraceFileError: HDF5 crashes on the file, or does not come to an end.
    """
    ours = str(Path(__file__).resolve().parents[2])
    files = [os.fspath(each) for each in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    code = _SCRIPT.format(
        path=[ours, *filter(None, sys.path)], module=__name__, function=function, files=files
    )
    name = ", ".join(files)
    which = f"HDF5 {h5py.version.hdf5_version}"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TraceFileError(
            f"{name} is damaged: {which} had not come to an end with it after {limit:g} s"
        ) from None
    if done.returncode == _EXIT_OUT_OF_MEMORY:
        raise TraceFileError(
            f"{name} is damaged: {which} asks for more memory than such a file can hold"
        )
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        raise TraceFileError(f"{name} is damaged: {which} crashes on it ({ended})")
    if done.returncode:
        raise TraceFileError(f"{name} could not be looked at by a process of its own")


def read_everything(paths: Sequence[str]) -> None:
    """Read everything of a trace that HDF5 itself interprets, as the other process does."""
    _limit_resources(paths, CPU_SECONDS)
    # What is doubtful about shards is said by whoever reads them.
    warnings.simplefilter("ignore")
    try:
        with disable_plugins():
            source = open_files(paths[0] if len(paths) == 1 else paths)
            files = source.files
            source.close()
            for part in files:
                with translate_read_errors(part), open_for_reading(part) as file:
                    _read_group(file, GROUP_DEPTH)
    except GrutraceError as error:
        if "memory allocation failed" in str(error) or isinstance(error.__cause__, MemoryError):
            sys.exit(_EXIT_OUT_OF_MEMORY)


def scan_for_recovery(paths: Sequence[str]) -> None:
    """Find out what can be kept of files, as the other process does."""
    _limit_resources(paths)
    with contextlib.suppress(GrutraceError), disable_plugins():
        for each in paths:
            best_plan(Path(each))


def _read_group(group: h5py.Group, depth: int) -> None:
    for name in group:
        if is_dataset(group, name):
            _read_samples(get_member(group, name, h5py.Dataset))
        elif depth:
            _read_group(get_member(group, name, h5py.Group), depth - 1)


def _read_samples(dataset: h5py.Dataset) -> None:
    if dataset.is_virtual:
        # Its data are in the shards, which are looked at by themselves.
        return
    require_local_data(dataset, dataset.name)
    item = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if dataset.shape and item <= dataset.file.id.get_filesize():
        for row in range(0, len(dataset), max(1, len(dataset) // SAMPLES)):
            dataset[row : row + 1]


def _limit_resources(paths: Sequence[str], seconds: int | None = None) -> None:
    """Leave no core behind, and take no more memory than a trace of this size can ask for."""
    try:
        import resource
    except ImportError:  # There is none on Windows.
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should whoever waits for it be killed, nobody would end what has no end.
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):
        files = {file for path in paths for file in (path, *matching_files(path))}
        parts = [part for file in files for part in (Path(file), *part_files(file).values())]
        size = sum(part.stat().st_size for part in parts if part.exists())
        most = MEMORY_BYTES + MEMORY_PER_FILE_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
