"""Write a complete trace to a new file, with the content that a tracer would have written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from grutrace.errors import OptionError
from grutrace.records import Array, TraceHeader
from grutrace.storage.format.dimension_scales import extend_scales
from grutrace.storage.format.schema import COMMITTED, TABLES
from grutrace.storage.hdf5.atomic_write import (
    fsync_directory,
    fsync_file,
    publish,
    temporary_path,
    unlink_on_error,
)
from grutrace.storage.hdf5.errors import translate_write_errors
from grutrace.storage.hdf5.quarantine import close_or_quarantine, discard_writes, file_identity
from grutrace.storage.interfaces import Rows
from grutrace.storage.write.appender import DatasetAppender
from grutrace.storage.write.claims import Claim
from grutrace.storage.write.create import create_file
from grutrace.storage.write.overwrite import require_replaceable

#: Bytes that are written at once.
BLOCK = 8 * 1024 * 1024

#: Modes for an existing file.
MODES = ("w", "overwrite")


def save_trace(
    path: str | os.PathLike[str],
    header: TraceHeader,
    counts: Mapping[str, int],
    items: Iterable[tuple[str, Array]],
    mode: str,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write a complete, closed trace file under a temporary name, then rename it.

    Args:
        path: Path of the file.
        header: Header of the trace.
        counts: Number of items of each dataset, by path.
        items: The next items of a dataset, by path; see `array_items`.
        mode: "w" raises an error if the file exists, "overwrite" replaces a trace.
        advance: Called with the number of bytes written so far.

    Raises:
        OptionError: `path` is not a path, or `mode` is unknown.
        TraceFileError: The file exists or cannot be written. No partial file remains.
    """
    if mode not in MODES:
        raise OptionError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path: expected the path of a file, found {path!r}")
    target = Path(os.path.realpath(path))
    committed = np.zeros((), COMMITTED)
    for name in TABLES:
        committed[name] = counts[name]
    committed["closed"] = True
    claim = Claim(target)
    try:
        if mode == "overwrite":
            require_replaceable(target)
        temporary = temporary_path(target, mode)
        with unlink_on_error(temporary):
            write_datasets(target, temporary, header, counts, committed, items, advance)
            publish(temporary, target, mode)
        with translate_write_errors(target, "created"):
            fsync_directory(target)
    finally:
        claim.release()


def array_items(dataset_path: str, array: Array | Rows) -> Iterator[tuple[str, Array]]:
    """Yield the items of a dataset in blocks of bounded size, each with the path."""
    step = items_per_block(array)
    for start in range(0, len(array), step):
        yield dataset_path, np.asarray(array[start : start + step])


def items_per_block(array: Array | Rows) -> int:
    """Return how many items of an array make a block of `BLOCK` bytes, at least one."""
    return max(1, BLOCK // max(1, math.prod(array.shape[1:]) * array.dtype.itemsize))


def write_datasets(
    path: Path,
    temporary: Path,
    header: TraceHeader,
    counts: Mapping[str, int],
    committed: Array,
    items: Iterable[tuple[str, Array]],
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write a complete file and fsync it.

    Args:
        path: Final path, for error messages.
        temporary: Path that is written.
        header: Header of the trace.
        counts: Number of items of each dataset, by path.
        committed: The committed counts, see `schema.COMMITTED`.
        items: The next items of a dataset, by path.
        advance: Called with the number of bytes written so far.

    Raises:
        TraceFileError: The file cannot be written.
    """
    file = create_file(path, temporary, header, counts)
    descriptor, identity = file.id.get_vfd_handle(), file_identity(file)
    try:
        written_bytes = 0
        appenders: dict[str, DatasetAppender] = {}
        for dataset_path, block in items:
            if dataset_path not in appenders:
                appenders[dataset_path] = DatasetAppender(file[dataset_path], 0)
            with translate_write_errors(path, "written"):
                appenders[dataset_path].append(block)
                appenders[dataset_path].write()
            written_bytes += block.nbytes
            if advance is not None:
                advance(written_bytes)
        with translate_write_errors(path, "written"):
            extend_scales(file, header.modules, counts)
            file["committed"][()] = committed
            file.flush()
            fsync_file(descriptor)
            file.close()
    except BaseException:
        discard_writes(descriptor, identity)
        close_or_quarantine(file, identity)
        raise
