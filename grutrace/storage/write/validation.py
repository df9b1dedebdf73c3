"""Validate records against earlier ones. The memory sink and the file sink both use this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grutrace.errors import SinkError
from grutrace.records import (
    MARKS,
    AnnotationRecord,
    Array,
    CallBatch,
    CallRecord,
    CallSeries,
    Fork,
    ModuleInfo,
    Origin,
    Record,
    Site,
    WeightsRecord,
)
from grutrace.storage.format.schema import weight_shapes, width


@dataclass
class _ModuleChecks:
    """The expected shapes and types of the records of a module, and the counts so far."""

    module: ModuleInfo
    sites: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...]
    dtype: np.dtype[Any]
    never_continues: bool
    sequences: int = 0
    versions: int = 0


class RecordValidator:
    """Counts the sequences and weights of each module, and refuses inconsistent records.

    Sequences and versions are numbered from 0 in each run, even if a file is appended to.

    Args:
        modules: Modules of the trace.
    """

    def __init__(self, modules: Sequence[ModuleInfo]) -> None:
        self._checks = [_module_checks(module) for module in modules]

    def validate(self, record: Record) -> None:
        """Check a record and count it.

        Raises:
            SinkError: The record is inconsistent, and is not counted. The message names the
                record, the expected value and the found value.
        """
        if isinstance(record, CallBatch):
            self._validate_batch(record)
            return
        checks = self._checks_of(record.module)
        if isinstance(record, CallRecord):
            _validate_call(checks, record)
        elif isinstance(record, WeightsRecord):
            _validate_weights(checks, record)
        else:
            _validate_annotation(checks, record, checks.sequences)

    def _checks_of(self, module: int) -> _ModuleChecks:
        if not 0 <= module < len(self._checks):
            raise _error("a record", f"a module below {len(self._checks)}", module)
        return self._checks[module]

    def _validate_batch(self, batch: CallBatch) -> None:
        modules = [series.module for series in batch.series]
        counts = np.bincount(batch.order, minlength=len(modules)).tolist()
        lengths = [len(series) for series in batch.series]
        if len(set(modules)) < len(modules) or counts != lengths:
            raise _error(
                "a batch of calls",
                f"one series per module, with {counts} calls",
                f"modules {modules} with {lengths} calls",
            )
        before = [self._checks_of(module).sequences for module in modules]
        try:
            for series in batch.series:
                _validate_series(self._checks[series.module], series)
        except SinkError:
            for module, sequences in zip(modules, before, strict=True):
                self._checks[module].sequences = sequences
            raise


def _module_checks(module: ModuleInfo) -> _ModuleChecks:
    return _ModuleChecks(
        module=module,
        sites=tuple(
            (site.suffix, module.unit_count(site), _widths(module, site)) for site in module.sites
        ),
        dtype=np.dtype(module.dtype),
        never_continues=any(site.reverse for site in module.sites),
    )


def _widths(module: ModuleInfo, site: Site) -> tuple[tuple[str, int], ...]:
    return tuple((quantity, width(module, site, quantity)) for quantity in site.quantities)


def _validate_call(checks: _ModuleChecks, call: CallRecord) -> None:
    begun = _count_new_sequences(checks, call)
    _require_version(checks, call.weights)
    rows = int(call.steps.sum())
    for suffix, units, quantities in checks.sites:
        site = call.sites.get(suffix)
        if site is None:
            raise _error(_describe_call(checks), f"site {suffix!r}", list(call.sites))
        for quantity, columns in quantities:
            _require_array(checks, suffix, quantity, site.rows.get(quantity), (rows, columns))
        _require_array(checks, suffix, "initial", site.initial, (begun, units))
    _require_starts(checks, checks.sequences, begun, call.forks, call.origins)
    for annotation in call.annotations:
        _validate_annotation(checks, annotation, checks.sequences + begun)
    checks.sequences += begun


def _validate_series(checks: _ModuleChecks, series: CallSeries) -> None:
    if series.sequences.ndim != 2 or len(series.sequences) != len(series):
        raise _error(
            _describe_call(checks), f"sequences ({len(series)}, B)", series.sequences.shape
        )
    begun = _count_begun_in_series(checks, series.sequences)
    if begun.tolist() != series.begun.tolist():
        raise _error(
            _describe_call(checks), f"{begun.tolist()} sequences begun", series.begun.tolist()
        )
    _require_version(checks, series.weights)
    calls, rows, starts = len(series), series.sequences.size, int(begun.sum())
    for suffix, units, quantities in checks.sites:
        site = series.sites.get(suffix)
        if site is None:
            raise _error(_describe_call(checks), f"site {suffix!r}", list(series.sites))
        for quantity, columns in quantities:
            _require_array(checks, suffix, quantity, site.rows.get(quantity), (rows, columns))
        _require_array(checks, suffix, "initial", site.initial, (starts, units))
        shapes = site.residuals.shape, site.tolerances.shape
        if shapes != ((calls,), (calls,)):
            raise _error(_describe_call(checks), f"checks of {calls} calls", shapes)
    for call in sorted({*series.forks, *series.origins}):
        first = checks.sequences + int(begun[:call].sum())
        of_call = series.forks.get(call, ()), series.origins.get(call, ())
        _require_starts(checks, first, int(begun[call]), *of_call)
    checks.sequences += starts


def _require_version(checks: _ModuleChecks, version: int) -> None:
    if not 0 <= version < checks.versions:
        raise _error(
            _describe_call(checks), f"a version of the weights below {checks.versions}", version
        )


def _require_starts(
    checks: _ModuleChecks,
    first: int,
    begun: int,
    forks: Sequence[Fork],
    origins: Sequence[Origin],
) -> None:
    """Check the forks and marks of the sequences that a call begins, the first with this number."""
    last = first + begun
    for fork in forks:
        if not (first <= fork.sequence < last and 0 <= fork.parent < fork.sequence):
            raise _error(
                _describe_call(checks),
                f"a fork of sequence {first} to {last - 1} from an earlier sequence",
                fork,
            )
    for origin in origins:
        if not first <= origin.sequence < last or origin.mark not in MARKS:
            raise _error(
                _describe_call(checks),
                f"a mark ({', '.join(MARKS)}) of a sequence that begins in this call",
                origin,
            )


def _count_begun_in_series(checks: _ModuleChecks, sequences: Array) -> npt.NDArray[np.int64]:
    """Check (n, B) sequences of n calls of one step; return how many each call begins."""
    calls, batch = sequences.shape
    numbers = sequences.ravel()
    is_new = numbers >= checks.sequences
    if not is_new.any():
        new, call_of = numbers[:0], np.empty(0, np.int64)
    else:
        new, where = np.unique(numbers[is_new], return_index=True)
        call_of = np.flatnonzero(is_new)[where] // batch
        expected = np.arange(checks.sequences, checks.sequences + len(new), dtype=np.uint64)
        if (new != expected).any() or (np.diff(where) < 0).any():
            raise _error(
                _describe_call(checks), f"{checks.sequences} as the next new sequence", numbers
            )
    begun = np.bincount(call_of, minlength=calls)
    continuing = sequences[begun < batch]
    if len(continuing) and checks.never_continues:
        raise _error(
            _describe_call(checks),
            "only new sequences, because the module has a reverse direction",
            continuing[0].tolist(),
        )
    # A decoder's calls have the same sequences.
    rows = continuing[:1] if (continuing == continuing[:1]).all() else continuing
    if (np.diff(np.sort(rows, axis=1), axis=1) == 0).any():
        raise _error(_describe_call(checks), "each sequence once", rows.tolist())
    return begun


def _count_new_sequences(checks: _ModuleChecks, call: CallRecord) -> int:
    """Check the steps and sequences of a call, and return the number of sequences it begins."""
    steps, sequences = call.steps, call.sequences
    if steps.ndim != 1 or steps.shape != sequences.shape:
        raise _error(
            _describe_call(checks),
            "steps and sequences of shape (B,)",
            (steps.shape, sequences.shape),
        )
    numbers: list[int] = sequences.tolist()
    next_number = checks.sequences
    for number in numbers:
        if number == next_number:
            next_number += 1
        elif number > next_number:
            raise _error(_describe_call(checks), f"{next_number} as the next new sequence", number)
    new_sequences = next_number - checks.sequences
    if new_sequences < len(numbers):
        if checks.never_continues:
            raise _error(
                _describe_call(checks),
                "only new sequences, because the module has a reverse direction",
                numbers,
            )
        if len(set(numbers)) < len(numbers):
            raise _error(_describe_call(checks), "each sequence once", numbers)
    return new_sequences


def _require_array(
    checks: _ModuleChecks, suffix: str, quantity: str, array: Array | None, shape: tuple[int, int]
) -> None:
    if array is None:
        raise _error(_describe_call(checks), f"{suffix}.{quantity}", "nothing")
    if array.shape != shape or array.dtype != checks.dtype:
        raise _error(
            f"{_describe_call(checks)}, {suffix}.{quantity}",
            f"{checks.dtype} {shape}",
            f"{array.dtype} {array.shape}",
        )


def _validate_weights(checks: _ModuleChecks, weights: WeightsRecord) -> None:
    where = f"weights of module {checks.module.path!r}"
    if weights.version != checks.versions:
        raise _error(where, f"version {checks.versions}", weights.version)
    for site in checks.module.sites:
        shapes = weight_shapes(checks.module, site)
        arrays = _site_weights(weights.sites, site.suffix, where)
        actual = {name: array.shape for name, array in arrays.items()}
        if actual != shapes:
            raise _error(f"{where}, {site.suffix}", shapes, actual)
    checks.versions += 1


def _site_weights(
    sites: Mapping[str, Mapping[str, Array]], suffix: str, where: str
) -> Mapping[str, Array]:
    if suffix not in sites:
        raise _error(where, f"site {suffix!r}", list(sites))
    return sites[suffix]


def _validate_annotation(
    checks: _ModuleChecks, annotation: AnnotationRecord, sequences: int
) -> None:
    """Check an annotation of a module with this number of sequences."""
    where = f"{annotation.name!r} of module {checks.module.path!r}"
    if not 0 <= annotation.sequence < sequences:
        raise _error(where, f"a sequence below {sequences}", annotation.sequence)
    if annotation.first < 0:
        raise _error(where, "a first step of at least 0", annotation.first)
    if len({isinstance(value, str) for value in annotation.values}) > 1:
        raise _error(where, "either strings or numbers only", annotation.values)


def _describe_call(checks: _ModuleChecks) -> str:
    return f"a call of module {checks.module.path!r}"


def _error(where: str, expected: object, found: object) -> SinkError:
    return SinkError(f"{where} cannot be recorded: expected {expected}, found {found}")
