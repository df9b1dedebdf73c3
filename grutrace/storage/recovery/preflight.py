"""Check an untrusted file in a subprocess first, because HDF5 may crash on it.

HDF5 does not check everything it reads, and crashes on some damaged files. So before such a file
is verified or recovered, a subprocess reads all the structures that HDF5 interprets: every header,
every table, and the addresses of items of every dataset. This takes a third of a second for a
small trace.
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
from grutrace.storage.hdf5.remote import RemoteReadHandle, is_url
from grutrace.storage.hdf5.safe_access import get_member, is_dataset, require_local_data
from grutrace.storage.hdf5.safe_open import disable_plugins, open_for_reading
from grutrace.storage.recovery.plan import best_plan
from grutrace.storage.shards.open_files import matching_files, open_files
from grutrace.storage.shards.run_parts import part_files

#: A file or its URL, or a glob or paths of shards.
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Default time limit of the check in seconds. A trace of a million calls takes two seconds.
TIMEOUT = 60.0

#: CPU seconds of the subprocess, in case the parent dies and cannot stop it.
CPU_SECONDS = 300

#: Depth of the groups: modules, a module, a site.
GROUP_DEPTH = 3

#: Items of each dataset that are read, which makes HDF5 look up their addresses. Listing all chunks
#: could take forever with a damaged index.
SAMPLES = 64

#: Memory limit of the subprocess: a number of bytes, and bytes for each byte of the file. HDF5 and
#: NumPy reserve one or two GiB of address space that they do not use.
MEMORY_BYTES, MEMORY_PER_FILE_BYTE = 4 * 1024**3, 8

#: Exit code of the subprocess if that is not enough.
_EXIT_OUT_OF_MEMORY = 3

#: The script of the subprocess. It imports only from the given paths, because the folder of the
#: file may contain a malicious h5py.py.
_SCRIPT = """
import sys
sys.path[:] = {path!r}
from {module} import {function}
{function}({files!r})
"""


def check_in_subprocess(
    path: Paths, limit: float = TIMEOUT, function: str = "read_everything"
) -> None:
    """Read a trace in a subprocess, to find out whether HDF5 crashes on it.

    Ordinary errors are ignored here; the caller meets them when it reads the file.

    Args:
        path: Path or URL of the trace, or a glob or paths of shards.
        limit: Time limit in seconds.
        function: Name of the function of this module that the subprocess calls with the paths.

    Raises:
        TraceFileError: HDF5 crashes on the file, needs too much memory, or exceeds the limit.
    """
    package_folder = str(Path(__file__).resolve().parents[2])
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    files = [os.fspath(file) for file in paths]
    code = _SCRIPT.format(
        path=[package_folder, *filter(None, sys.path)],
        module=__name__,
        function=function,
        files=files,
    )
    name = ", ".join(files)
    hdf5 = f"HDF5 {h5py.version.hdf5_version}"
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = "is damaged, or its server is slow" if is_url(name) else "is damaged"
        raise TraceFileError(
            f"{name} {reason}: {hdf5} did not finish reading it within {limit:g} s"
        ) from None
    if process.returncode == _EXIT_OUT_OF_MEMORY:
        raise TraceFileError(
            f"{name} is damaged: {hdf5} requests more memory than a file of this size needs"
        )
    if process.returncode < 0:
        signal_name = signal.Signals(-process.returncode).name
        raise TraceFileError(f"{name} is damaged: {hdf5} crashes on it ({signal_name})")
    if process.returncode:
        raise TraceFileError(
            f"{name} could not be checked in a subprocess (exit code {process.returncode})"
        )


def read_everything(paths: Sequence[str]) -> None:
    """Read all structures of a trace that HDF5 interprets. Runs in the subprocess."""
    _limit_resources(paths, CPU_SECONDS)
    # The caller gets warnings about shards when it reads them.
    warnings.simplefilter("ignore")
    try:
        with disable_plugins():
            source = open_files(paths[0] if len(paths) == 1 else paths)
            files = source.files
            source.close()
            for url in filter(is_url, paths):
                _read_remote(url)
            for path in files:
                with translate_read_errors(path), open_for_reading(path) as file:
                    _read_group(file, GROUP_DEPTH)
    except GrutraceError as error:
        if "memory allocation failed" in str(error) or isinstance(error.__cause__, MemoryError):
            sys.exit(_EXIT_OUT_OF_MEMORY)


def _read_remote(url: str) -> None:
    handle = RemoteReadHandle(url, {})
    try:
        with translate_read_errors(url), handle.acquire() as file:
            _read_group(file, GROUP_DEPTH)
    finally:
        handle.close()


def scan_for_recovery(paths: Sequence[str]) -> None:
    """Scan files for their intact prefixes. Runs in the subprocess."""
    _limit_resources(paths)
    with contextlib.suppress(GrutraceError), disable_plugins():
        for path in paths:
            best_plan(Path(path))


def _read_group(group: h5py.Group, depth: int) -> None:
    for name in group:
        if is_dataset(group, name):
            _read_samples(get_member(group, name, h5py.Dataset))
        elif depth:
            _read_group(get_member(group, name, h5py.Group), depth - 1)


def _read_samples(dataset: h5py.Dataset) -> None:
    if dataset.is_virtual:
        # The data are in the shards, which are checked separately.
        return
    require_local_data(dataset, dataset.name)
    item_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if dataset.shape and item_bytes <= dataset.file.id.get_filesize():
        for row in range(0, len(dataset), max(1, len(dataset) // SAMPLES)):
            dataset[row : row + 1]


def _limit_resources(paths: Sequence[str], seconds: int | None = None) -> None:
    """Limit the memory of this process by the size of the files, and disable core dumps."""
    try:
        import resource
    except ImportError:  # Not available on Windows.
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # If the parent is killed, no other process would stop an endless read.
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):
        files = {file for path in paths for file in (path, *matching_files(path))}
        all_files = [part for file in files for part in (Path(file), *part_files(file).values())]
        size = sum(file.stat().st_size for file in all_files if file.exists())
        limit = MEMORY_BYTES + MEMORY_PER_FILE_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
