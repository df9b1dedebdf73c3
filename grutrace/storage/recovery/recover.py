"""From a file that its writer left behind, or that was damaged, to one that any HDF5 tool opens.

All that is committed is copied, block by block, so that memory is bounded; except for what lies
beyond damage. Of a file that was cut short, the longest run of calls from the first is kept that is
whole in every dataset.
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

#: What is read and written at a time. Bytes.
BLOCK = 8 * 1024 * 1024

#: How much of a file is looked at in a second, at least. Bytes.
MIN_SCAN_RATE = 1e9

#: Told how many bytes are copied, and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RecoveryReport:
    """What became of one file.

    Attributes:
        source: The file that was read.
        path: The file that was written.
        closed: Whether its writer had closed it in order.
        calls: Calls that are in the new file.
        lost: By table, entries that were committed and are not in the new file, since something
            of them or of what they stand for cannot be read.
        reason: Where what can be read ends, and why; empty if nothing is lost.
        dropped: By dataset, items that the file held and that are not in the new one: rows and
            entries that were not committed, and those that belong to lost calls.
        mended: Structures of the file that were half written, as after a loss of power, and were
            read all the same. If there are any, have the new file verified.
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
    """Write what is committed in a trace file to a new one, which any HDF5 tool opens.

    The file may have been left behind by a writer that was killed, be cut short, be damaged, or be
    sound. It is not changed, and nobody must write to it meanwhile. If it is the first part of a
    run, all parts are recovered, to files beside the output that are named as parts are.

    Args:
        path: Of the file.
        output: Of the new file.
        progress: Called as bytes are copied.
        patience: How long HDF5 may take to look through a small file, in seconds: there is damage
            in which it never comes to an end.

    Returns:
        What became of each file.

    Raises:
        TraceFileError: The file is no trace, is damaged where nothing can be done without, or
            changed meanwhile; or the output exists or cannot be written. Nothing is left behind.
    """
    _check_first(Path(path), timeout)
    sources, target = _source_files(Path(path)), Path(os.path.realpath(output))
    targets = {number: part_path(target, number) if number else target for number in sources}
    for each in targets.values():
        if each.exists():
            raise TraceFileError(f"{each} exists: name another file to recover to")
    total = sum(source.stat().st_size for source in sources.values())
    made: list[tuple[Path, RecoveryReport]] = []
    placed: list[Path] = []
    try:
        for number, source in sources.items():
            before = sum(each.source.stat().st_size for _, each in made)

            def advance(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(min(before + done, total), total)

            made.append(_recover_one(source, targets[number], advance))
        if progress is not None:
            progress(total, total)
        # The first comes last: it is what the others are found by.
        for new, recovery in reversed(made):
            publish(new, recovery.path, "w")
            placed.append(recovery.path)
        fsync_directory(target)
    except BaseException:
        for ours in (*placed, *(new for new, _ in made)):
            with contextlib.suppress(OSError):
                ours.unlink(missing_ok=True)
        raise
    return [each for _, each in made]


def _check_first(path: Path, timeout: float) -> None:
    """Let a process of its own find out whether HDF5 comes to an end with a file."""
    if not path.is_file():
        raise TraceFileError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    files = [path, *part_files(path).values()]
    size = sum(each.stat().st_size for each in files)
    check_in_subprocess(files, timeout + size / MIN_SCAN_RATE, "scan_for_recovery")


def _source_files(path: Path) -> dict[int, Path]:
    """The files of the run that this is the first part of, by number; by 0 a file by itself."""
    own = _read_stamp(path)
    if own is None or own.part != 1:
        return {0: path}
    found = {1: path}
    for number, file in part_files(path).items():
        # Of a file whose header is damaged, nobody can say whether it is of this run.
        if _read_stamp(file) == RunPart(own.run, number):
            found[number] = file
    missing = [number for number in range(1, max(found)) if number not in found]
    if missing:
        raise TraceFileError(
            f"{path}: part {missing[0]} of its run is missing, {part_path(path, missing[0])}. Each "
            "part can be recovered by itself, the first one from a folder of its own"
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
    """Make the new file, not yet in its place."""
    before = _size_and_time(source)
    plan = best_plan(source)
    while True:
        new = temporary_path(path, "w")
        try:
            _copy(source, path, new, plan, advance)
            break
        except _UnreadableItem as found:
            # Its place was known, and yet it cannot be read.
            new.unlink(missing_ok=True)
            plan = make_plan(
                source, repair=plan.repair, limits={**plan.limits, found.place: found.items}
            )
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    if _size_and_time(source) != before:
        new.unlink()
        raise TraceFileError(
            f"{source} has changed while it was read: its writer is at work. It can be read with "
            "grutrace.open, and needs no recovery before its writer has ended"
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

        def blocks(place: str, count: int) -> Iterator[Array]:
            return _blocks(get_dataset(file, place), place, count)

        header, kept = read_header(file), plan.kept
        write_datasets(path, new, header, kept.counts, kept.committed, blocks, advance)


class _UnreadableItem(Exception):
    """An item of a dataset that cannot be read."""

    def __init__(self, place: str, items: int) -> None:
        super().__init__(place, items)
        self.place, self.items = place, items


def _blocks(dataset: h5py.Dataset, place: str, count: int) -> Iterator[Array]:
    """The first items of a dataset, some at a time."""
    item = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
    step = max(1, BLOCK // max(1, item))
    for start in range(0, count, step):
        stop = min(count, start + step)
        try:
            yield np.asarray(dataset[start:stop])
        except H5PY_ERRORS:
            raise _UnreadableItem(place, _count_readable(dataset, start, stop)) from None


def _count_readable(dataset: h5py.Dataset, start: int, stop: int) -> int:
    """How many items can be read from the first, given that this range cannot be as a whole."""
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            dataset[start:middle]
            start = middle
        except H5PY_ERRORS:
            stop = middle
    return start
