"""Trace files of any length, written from records without a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from grutrace.records import (
    DEFAULT_RECORD,
    AnnotationRecord,
    Array,
    CallRecord,
    ModuleInfo,
    Record,
    SiteRows,
    WeightsRecord,
)
from grutrace.storage.format.schema import weight_shapes
from grutrace.storage.write.writer import Writer
from tests.storage.streams import make_header, make_module

#: A call: steps of each sequence, sequences, units.
STEPS, BATCH, HIDDEN = 128, 32, 256


def wide_module(record: tuple[str, ...] = DEFAULT_RECORD) -> ModuleInfo:
    """One layer with these quantities, by default all gates and states."""
    return make_module("rnn", hidden=HIDDEN, width=HIDDEN, record=record)


def call_bytes(record: tuple[str, ...] = DEFAULT_RECORD) -> int:
    """Bytes of the rows of a call."""
    return len(record) * STEPS * BATCH * HIDDEN * np.dtype(np.float32).itemsize


@cache
def _numbers(shape: tuple[int, int], seed: int) -> Array:
    """Uniform values between 0 and 1, as hard to compress as gates. Cached."""
    return np.random.default_rng(seed).random(shape, np.float32)


def records(
    module: ModuleInfo, steps: int, batch: int, calls: int, label: str | None = None
) -> Iterator[Record]:
    """Yield calls that begin new sequences. All hold the same values.

    If a label's name is given, each sequence has that label, with a new value every 16 steps.
    """
    (site,) = module.sites
    shapes = weight_shapes(module, site)
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    yield WeightsRecord(0, 0, {site.suffix: weights})
    shape = (steps * batch, module.hidden_size)
    rows = {name: _numbers(shape, seed) for seed, name in enumerate(site.quantities)}
    initial = np.zeros((batch, module.hidden_size), np.float32)
    recorded = {site.suffix: SiteRows(rows, initial, 1e-7, 1e-6, 2.0**-23)}
    lengths = np.full(batch, steps, np.uint32)
    for call in range(calls):
        sequences = np.arange(call * batch, (call + 1) * batch, dtype=np.uint64)
        yield CallRecord(0, 1.6e9 + call, None, False, 0, lengths, sequences, recorded)
        for sequence in sequences.tolist() if label else ():
            values = tuple(float((sequence + step // 16) % 2) for step in range(steps))
            yield AnnotationRecord(0, sequence, label, 0, values)


def write(
    path: Path, module: ModuleInfo, steps: int, batch: int, calls: int, label: str | None = None
) -> None:
    """Write a trace of such calls, and close it."""
    writer = Writer(path, make_header(module), "overwrite")
    for record in records(module, steps, batch, calls, label):
        writer.write(record)
    writer.close()


def write_wide(
    path: Path,
    size: int,
    label: str | None = None,
    record: tuple[str, ...] = DEFAULT_RECORD,
) -> None:
    """Write a trace of about this many bytes, with these quantities of one layer."""
    calls = math.ceil(size / call_bytes(record))
    write(path, wide_module(record), STEPS, BATCH, calls, label)


def command(*arguments: str) -> list[str]:
    """The command line of grutrace, in a process of its own."""
    return [sys.executable, "-m", "grutrace", *arguments]
