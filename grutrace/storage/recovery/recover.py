"""Copy the intact prefix of a damaged or unclosed trace to a new file that any HDF5 tool opens.

All committed calls are copied, up to the first one that is damaged in any dataset. The data are
copied in blocks, so memory is bounded.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from grutrace.errors import TraceFileError
from grutrace.records import Array
from grutrace.storage.format.header import read_header
from grutrace.storage.hdf5.atomic_write import fsync_directory, publish, temporary_path
from grutrace.storage.hdf5.errors import H5PY_ERRORS
from grutrace.storage.hdf5.safe_access import get_dataset
from grutrace.storage.recovery.plan import RecoveryPlan, best_plan, make_plan, open_damaged
from grutrace.storage.recovery.preflight import TIMEOUT, check_in_subprocess
from grutrace.storage.save import write_datasets
from grutrace.storage.shards.run_parts import RunPart, part_files, part_path, run_part_of

#: Bytes that are read and written at a time.
BLOCK = 8 * 1024 * 1024

#: Bytes of a file that are scanned in a second, at least.
MIN_SCAN_RATE = 1e9

#: Called with the number of copied bytes and the number of all bytes.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecoveryReport:
    """The result of the recovery of one file.

    Attributes:
        source: The file that was read.
        path: The file that was written.
        closed: Whether the writer had closed the source in order.
        calls: Number of calls in the new file.
        lost: Number of committed entries that are not in the new file because they, or data that
            they refer to, cannot be read, by table.
        reason: Where the intact prefix ends, and why; empty if nothing is lost.
        dropped: Number of items of the source that are not in the new file, by dataset path:
            uncommitted items, and items of lost calls.
        repaired: Number of half-written structures of HDF5 that were accepted, as after a loss of
            power. If there are any, verify the new file.
    """

    source: Path
    path: Path
    closed: bool
    calls: int
    lost: dict[str, int]
    reason: str
    dropped: dict[str, int]
    repaired: int = 0


def recover_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    progress: Progress | None = None,
    timeout: float = TIMEOUT,
) -> list[RecoveryReport]:
    """Copy the committed calls of a trace file to a new file that any HDF5 tool opens.

    The file may be intact, truncated, damaged, or left behind by a killed writer. It is not
    changed, and no process may write to it. If it is the first part of a run, all parts are
    recovered, to files next to the output that are named as parts.

    Args:
        path: Path of the file.
        output: Path of the new file.
        progress: Called while bytes are copied.
        timeout: Time limit in seconds for scanning a small file. With some damage HDF5 never
            finishes.

    Returns:
        A report for each file.

    Raises:
        TraceFileError: The file is not a trace, is too damaged, or changed during the recovery;
            or the output exists or cannot be written. No new file is left behind.
    """
    _check_first(Path(path), timeout)
    sources, target = _source_files(Path(path)), Path(os.path.realpath(output))
    targets = {number: part_path(target, number) if number else target for number in sources}
    for each in targets.values():
        if each.exists():
            raise TraceFileError(f"{each} exists: choose another output path")
    total = sum(source.stat().st_size for source in sources.values())
    made: list[tuple[Path, RecoveryReport]] = []
    published: list[Path] = []
    try:
        for number, source in sources.items():
            before = sum(each.source.stat().st_size for _, each in made)

            def advance(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(min(before + done, total), total)

            made.append(_recover_one(source, targets[number], advance))
        if progress is not None:
            progress(total, total)
        # Publish the first part last, because readers find the other parts through it.
        for new, recovery in reversed(made):
            publish(new, recovery.path, "w")
            published.append(recovery.path)
        fsync_directory(target)
    except BaseException:
        for ours in (*published, *(new for new, _ in made)):
            with contextlib.suppress(OSError):
                ours.unlink(missing_ok=True)
        raise
    return [each for _, each in made]


def _check_first(path: Path, timeout: float) -> None:
    """Find out in a subprocess whether HDF5 can read a file at all."""
    if not path.is_file():
        raise TraceFileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    files = [path, *part_files(path).values()]
    size = sum(each.stat().st_size for each in files)
    check_in_subprocess(files, timeout + size / MIN_SCAN_RATE, "scan_for_recovery")


def _source_files(path: Path) -> dict[int, Path]:
    """Return the files of a run by part number, given its first part. Key 0 for a single file."""
    own = _read_stamp(path)
    if own is None or own.part != 1:
        return {0: path}
    found = {1: path}
    for number, file in part_files(path).items():
        # A file with a damaged header raises here: it may or may not belong to this run.
        if _read_stamp(file) == RunPart(own.run, number):
            found[number] = file
    missing = [number for number in range(1, max(found)) if number not in found]
    if missing:
        raise TraceFileError(
            f"{path}: part {missing[0]} of its run is missing: {part_path(path, missing[0])}. You "
            "can recover each part separately; move the first one to another folder before"
        )
    return found


def _read_stamp(path: Path) -> RunPart | None:
    try:
        with open_damaged(path, repair=False) as (_, file):
            return run_part_of(read_header(file).options)
    except TraceFileError:
        with open_damaged(path, repair=True) as (_, file):
            return run_part_of(read_header(file).options)


def _recover_one(
    source: Path, path: Path, advance: Callable[[int], None]
) -> tuple[Path, RecoveryReport]:
    """Write the new file under a temporary path."""
    before = _size_and_time(source)
    plan = best_plan(source)
    while True:
        new = temporary_path(path, "w")
        try:
            _copy(source, path, new, plan, advance)
            break
        except _UnreadableItem as found:
            # The item lies within the file, but reading it fails.
            new.unlink(missing_ok=True)
            plan = make_plan(
                source, repair=plan.repair, limits={**plan.limits, found.dataset_path: found.items}
            )
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    if _size_and_time(source) != before:
        new.unlink()
        raise TraceFileError(
            f"{source} changed while it was read: its writer is still running. Read it with "
            "grutrace.open, or recover it after the writer has ended"
        )
    kept = plan.kept
    return new, RecoveryReport(
        source, path, kept.closed, kept.calls, kept.lost, kept.reason, kept.dropped, plan.repaired
    )


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _copy(
    source: Path, path: Path, new: Path, plan: RecoveryPlan, advance: Callable[[int], None]
) -> None:
    with open_damaged(source, repair=plan.repair) as (_, file):

        def blocks(dataset_path: str, count: int) -> Iterator[Array]:
            return _blocks(get_dataset(file, dataset_path), dataset_path, count)

        header, kept = read_header(file), plan.kept
        write_datasets(path, new, header, kept.counts, kept.committed, blocks, advance)


class _UnreadableItem(Exception):
    """An item of a dataset cannot be read."""

    def __init__(self, dataset_path: str, items: int) -> None:
        super().__init__(dataset_path, items)
        self.dataset_path, self.items = dataset_path, items


def _blocks(dataset: h5py.Dataset, dataset_path: str, count: int) -> Iterator[Array]:
    """Yield the first items of a dataset in blocks."""
    item = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    step = max(1, BLOCK // max(1, item))
    for start in range(0, count, step):
        stop = min(count, start + step)
        try:
            yield np.asarray(dataset[start:stop])
        except H5PY_ERRORS:
            raise _UnreadableItem(dataset_path, _count_readable(dataset, start, stop)) from None


def _count_readable(dataset: h5py.Dataset, start: int, stop: int) -> int:
    """Return the number of readable items, given that reading this range fails."""
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            dataset[start:middle]
            start = middle
        except H5PY_ERRORS:
            stop = middle
    return start
