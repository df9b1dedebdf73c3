"""A first look at a file from outside: in a process of its own, which HDF5 may take down with it.

HDF5 checks most of what it reads, and not all: there are files on which it crashes. A process that
reads one ends there, and can say nothing of it. So where a file is judged, another process goes
first, and looks at all that HDF5 itself interprets: every header, every table, and where every
chunk lies. It takes a third of a second for a small trace.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys

import h5py

from grutrace.errors import GrutraceError, TraceFileError
from grutrace.storage.faults import reading
from grutrace.storage.members import is_dataset, member
from grutrace.storage.opening import no_plugins, open_for_reading
from grutrace.storage.parts import open_run, parts_of

#: How long the look may take. The largest trace that was tried, of a million calls, takes two.
#: Seconds.
LIMIT = 60.0

#: Groups within one another: modules, a module, a site.
DEPTH = 3

_LOOK = (
    "import sys; sys.path[:] = {path!r}; from grutrace.storage.probe import look; look({file!r})"
)


def look_from_outside(path: str | os.PathLike[str], limit: float = LIMIT) -> None:
    """Let another process look at a trace first. Errors that it meets are left to whoever reads.

    Args:
        path: Of the trace.
        limit: How long it may take, in seconds.

    Raises:
        TraceFileError: HDF5 crashes on the file, or does not come to an end.
    """
    found = [entry for entry in sys.path if entry]
    code = _LOOK.format(path=found, file=os.fspath(path))
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
            f"{path} is damaged: {which} had not come to an end with it after {limit:g} s"
        ) from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise TraceFileError(f"{path} is damaged: {which} crashes on it ({name})")


def look(path: str) -> None:
    """Read everything of a trace that HDF5 itself interprets, as the other process does."""
    _no_core_dump()
    with no_plugins(), contextlib.suppress(GrutraceError):
        open_run(path).close()
        for part in parts_of(path):
            with reading(part), open_for_reading(part) as file:
                _look_into(file, DEPTH)


def _look_into(group: h5py.Group, depth: int) -> None:
    for name in group:
        if is_dataset(group, name):
            _look_at(member(group, name, h5py.Dataset))
        elif depth:
            _look_into(member(group, name, h5py.Group), depth - 1)


def _look_at(dataset: h5py.Dataset) -> None:
    if dataset.chunks:
        dataset.id.get_num_chunks()
    item = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    if dataset.shape and len(dataset) and item <= dataset.file.id.get_filesize():
        dataset[:1], dataset[-1:]


def _no_core_dump() -> None:
    try:
        import resource
    except ImportError:  # There is none on Windows.
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
