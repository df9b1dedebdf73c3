"""Copy the intact prefix of a damaged or unclosed trace to a new file that any HDF5 tool opens.

All committed calls are copied, up to the first one that is damaged in any dataset. The data are
copied in blocks, so memory is bounded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from grutrace.errors import TraceFileError
from grutrace.records import Array
from grutrace.storage.format.header import read_header
from grutrace.storage.hdf5.atomic_write import (
    fsync_directory,
    publish,
    temporary_path,
    unlink_on_error,
)
from grutrace.storage.hdf5.errors import H5PY_ERRORS
from grutrace.storage.hdf5.safe_access import get_dataset
from grutrace.storage.recovery.plan import RecoveryPlan, best_plan, make_plan, open_damaged
from grutrace.storage.recovery.preflight import TIMEOUT, check_in_subprocess
from grutrace.storage.save import items_per_block, write_datasets
from grutrace.storage.shards.run_parts import RunPart, part_files, part_path, run_part_of

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
    _check_in_subprocess(Path(path), timeout)
    sources, target = _source_files(Path(path)), Path(os.path.realpath(output))
    targets = {number: part_path(target, number) if number else target for number in sources}
    for new_file in targets.values():
        if new_file.exists():
            raise TraceFileError(f"{new_file} exists: choose another output path")
    total = sum(source.stat().st_size for source in sources.values())
    recovered: list[tuple[Path, RecoveryReport]] = []
    published: list[Path] = []
    try:
        for number, source in sources.items():
            preceding = sum(report.source.stat().st_size for _, report in recovered)

            def advance(copied: int, preceding: int = preceding) -> None:
                if progress is not None:
                    progress(min(preceding + copied, total), total)

            recovered.append(_recover_file(source, targets[number], advance))
        if progress is not None:
            progress(total, total)
        # Publish the first part last, because readers find the other parts through it.
        for temporary, report in reversed(recovered):
            publish(temporary, report.path, "w")
            published.append(report.path)
        fsync_directory(target)
    except BaseException:
        for new_file in (*published, *(temporary for temporary, _ in recovered)):
            with contextlib.suppress(OSError):
                new_file.unlink(missing_ok=True)
        raise
    return [report for _, report in recovered]


def _check_in_subprocess(path: Path, timeout: float) -> None:
    """Find out in a subprocess whether HDF5 can read a file at all."""
    if not path.is_file():
        raise TraceFileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    files = [path, *part_files(path).values()]
    size = sum(file.stat().st_size for file in files)
    check_in_subprocess(files, timeout + size / MIN_SCAN_RATE, "scan_for_recovery")


def _source_files(path: Path) -> dict[int, Path]:
    """Return the files of a run by part number, given its first part. Key 0 for a single file."""
    run_part = _read_run_part(path)
    if run_part is None or run_part.part != 1:
        return {0: path}
    files = {1: path}
    for number, file in part_files(path).items():
        # A file with a damaged header raises here: it may or may not belong to this run.
        if _read_run_part(file) == RunPart(run_part.run, number):
            files[number] = file
    missing = [number for number in range(1, max(files)) if number not in files]
    if missing:
        raise TraceFileError(
            f"{path}: part {missing[0]} of its run is missing: {part_path(path, missing[0])}. You "
            "can recover each part separately; move the first one to another folder before"
        )
    return files


def _read_run_part(path: Path) -> RunPart | None:
    try:
        with open_damaged(path, repair=False) as (_, file):
            return run_part_of(read_header(file).options)
    except TraceFileError:
        with open_damaged(path, repair=True) as (_, file):
            return run_part_of(read_header(file).options)


def _recover_file(
    source: Path, path: Path, advance: Callable[[int], None]
) -> tuple[Path, RecoveryReport]:
    """Write the new file at a temporary path. Return that path and the report."""
    signature = _size_and_time(source)
    plan = best_plan(source)
    while True:
        temporary = temporary_path(path, "w")
        try:
            with unlink_on_error(temporary):
                _copy(source, path, temporary, plan, advance)
            break
        except _UnreadableItem as error:
            # The item is within the file, but reading it fails.
            limits = {**plan.limits, error.dataset_path: error.items}
            plan = make_plan(source, repair=plan.repair, limits=limits)
    if _size_and_time(source) != signature:
        temporary.unlink()
        raise TraceFileError(
            f"{source} changed while it was read: its writer is still running. Read it with "
            "grutrace.open, or recover it after the writer has ended"
        )
    prefix = plan.prefix
    report = RecoveryReport(
        source=source,
        path=path,
        closed=prefix.closed,
        calls=prefix.calls,
        lost=prefix.lost,
        reason=prefix.reason,
        dropped=prefix.dropped,
        repaired=plan.repaired,
    )
    return temporary, report


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _copy(
    source: Path, path: Path, temporary: Path, plan: RecoveryPlan, advance: Callable[[int], None]
) -> None:
    """Copy the intact prefix of a file to a temporary path."""
    with open_damaged(source, repair=plan.repair) as (_, file):
        header, prefix = read_header(file), plan.prefix
        items = (
            (dataset_path, block)
            for dataset_path, count in prefix.counts.items()
            for block in _blocks(get_dataset(file, dataset_path), dataset_path, count)
        )
        write_datasets(path, temporary, header, prefix.counts, prefix.committed, items, advance)


class _UnreadableItem(Exception):
    """An item of a dataset cannot be read."""

    def __init__(self, dataset_path: str, items: int) -> None:
        super().__init__(dataset_path, items)
        self.dataset_path, self.items = dataset_path, items


def _blocks(dataset: h5py.Dataset, dataset_path: str, count: int) -> Iterator[Array]:
    """Yield the first items of a dataset in blocks."""
    step = items_per_block(dataset)
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
