"""What to keep of a file that its writer left behind or that was damaged, and how to read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py

from grutrace.errors import TraceFileError
from grutrace.storage.faults import Fault, reading
from grutrace.storage.header import read_header
from grutrace.storage.remains import Kept, Remains
from grutrace.storage.unmarked import Unmarked, open_unmarked

#: Bytes of the chunks of a dataset that HDF5 keeps: of a packed one, some that were unpacked.
CACHE = 8 * 1024 * 1024


@contextlib.contextmanager
def opened(path: Path, *, mend: bool) -> Iterator[tuple[Unmarked, h5py.File]]:
    """A file as if its writer had closed it; with half-written structures, or without."""
    with (
        reading(path),
        Unmarked(path, mend=mend) as unmarked,
        open_unmarked(unmarked, CACHE) as file,
    ):
        yield unmarked, file


@dataclass
class Plan:
    """What to keep of a file, and how to read it.

    Attributes:
        kept: What can be kept.
        mend: Whether half-written structures are read.
        mended: How many there were.
        limits: By dataset, how many items can be read, where it has turned out to be fewer than are
            there.
    """

    kept: Kept
    mend: bool
    mended: int
    limits: dict[str, int]


def plan_of(source: Path, *, mend: bool, limits: dict[str, int]) -> Plan:
    """Look what can be kept.

    Raises:
        TraceFileError: Nothing.
    """
    with opened(source, mend=mend) as (unmarked, file):
        kept = Remains(file, read_header(file).modules, unmarked.size, limits).longest()
        if not kept.calls and kept.lost:
            raise Fault("calls", "at least one that is whole", f"none: {kept.reason}")
        return Plan(kept, mend, len(unmarked.mended), limits)


def best_plan(source: Path) -> Plan:
    """What to keep of a file; with half-written structures only if that keeps more.

    Raises:
        TraceFileError: Nothing can be kept.
    """
    plan, error = None, None
    try:
        plan = plan_of(source, mend=False, limits={})
        if not plan.kept.lost:
            return plan
    except TraceFileError as found:
        error = found
    with contextlib.suppress(TraceFileError):
        other = plan_of(source, mend=True, limits={})
        if plan is None or other.kept.calls > plan.kept.calls:
            return other
    if plan is None:
        assert error is not None
        raise error
    return plan
