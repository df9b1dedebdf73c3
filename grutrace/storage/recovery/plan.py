"""Plan which part of a damaged trace to keep, and how to read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py

from grutrace.errors import TraceFileError
from grutrace.storage.format.header import read_header
from grutrace.storage.hdf5.errors import FormatError, translate_read_errors
from grutrace.storage.hdf5.superblock import RepairedFile, open_repaired
from grutrace.storage.recovery.prefix import IntactPrefix, PrefixScanner

#: Bytes of the chunk cache of each dataset: a few uncompressed chunks.
CHUNK_CACHE = 8 * 1024 * 1024


@contextlib.contextmanager
def open_damaged(path: Path, *, repair: bool) -> Iterator[tuple[RepairedFile, h5py.File]]:
    """Return a context with a file, opened as if its writer had closed it.

    Args:
        path: Path of the file.
        repair: Whether to accept half-written structures by correcting their checksums.

    Raises:
        TraceFileError: The file cannot be read.
    """
    with (
        translate_read_errors(path),
        RepairedFile(path, repair=repair) as image,
        open_repaired(image, CHUNK_CACHE) as file,
    ):
        yield image, file


@dataclass
class RecoveryPlan:
    """Which part of a file to keep, and how to read it.

    Attributes:
        prefix: The intact prefix.
        repair: Whether half-written structures are accepted.
        repaired: Number of half-written structures.
        limits: Number of readable items of a dataset, by path, for datasets where a read failed.
    """

    prefix: IntactPrefix
    repair: bool
    repaired: int
    limits: dict[str, int]


def make_plan(source: Path, *, repair: bool, limits: dict[str, int]) -> RecoveryPlan:
    """Scan a file for its intact prefix.

    Args:
        source: Path of the file.
        repair: Whether to accept half-written structures.
        limits: As for `PrefixScanner`.

    Raises:
        TraceFileError: No call is intact, or the file cannot be read.
    """
    with open_damaged(source, repair=repair) as (image, file):
        prefix = PrefixScanner(file, read_header(file).modules, image.size, limits).scan()
        if not prefix.calls and prefix.lost:
            raise FormatError("calls", "at least one intact call", f"none: {prefix.reason}")
        return RecoveryPlan(prefix, repair, len(image.repaired), limits)


def best_plan(source: Path) -> RecoveryPlan:
    """Plan the recovery of a file. Accept half-written structures only if that keeps more calls.

    Raises:
        TraceFileError: No call is intact, or the file cannot be read.
    """
    plan, error = None, None
    try:
        plan = make_plan(source, repair=False, limits={})
        if not plan.prefix.lost:
            return plan
    except TraceFileError as plan_error:
        error = plan_error
    with contextlib.suppress(TraceFileError):
        repair_plan = make_plan(source, repair=True, limits={})
        if plan is None or repair_plan.prefix.calls > plan.prefix.calls:
            return repair_plan
    if plan is None:
        assert error is not None
        raise error
    return plan
