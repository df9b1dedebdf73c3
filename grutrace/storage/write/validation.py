"""Validate records against earlier ones. The memory sink and the file sink both use this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grutrace.errors import SinkError
from grutrace.records import (
    MARKS,
    AnnotationRecord,
    Array,
    CallRecord,
    ModuleInfo,
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
        if not 0 <= record.module < len(self._checks):
            raise _error("a record", f"a module below {len(self._checks)}", record.module)
        checks = self._checks[record.module]
        if isinstance(record, CallRecord):
            _validate_call(checks, record)
        elif isinstance(record, WeightsRecord):
            _validate_weights(checks, record)
        else:
            _validate_annotation(checks, record)


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
    new_sequences = _count_new_sequences(checks, call)
    if not 0 <= call.weights < checks.versions:
        raise _error(
            _describe_call(checks),
            f"a version of the weights below {checks.versions}",
            call.weights,
        )
    rows = int(call.steps.sum())
    for suffix, units, quantities in checks.sites:
        site = call.sites.get(suffix)
        if site is None:
            raise _error(_describe_call(checks), f"site {suffix!r}", list(call.sites))
        for quantity, columns in quantities:
            _require_array(checks, suffix, quantity, site.rows.get(quantity), (rows, columns))
        _require_array(checks, suffix, "initial", site.initial, (new_sequences, units))
    for fork in call.forks:
        start, stop = checks.sequences, checks.sequences + new_sequences
        if not (start <= fork.sequence < stop and 0 <= fork.parent < fork.sequence):
            raise _error(
                _describe_call(checks),
                f"a fork of sequence {start} to {stop - 1} from an earlier sequence",
                fork,
            )
    for origin in call.origins:
        is_new = 0 <= origin.sequence - checks.sequences < new_sequences
        if not is_new or origin.mark not in MARKS:
            raise _error(
                _describe_call(checks),
                f"a mark ({', '.join(MARKS)}) of a sequence that begins in this call",
                origin,
            )
    checks.sequences += new_sequences


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
        found = {name: array.shape for name, array in arrays.items()}
        if found != shapes:
            raise _error(f"{where}, {site.suffix}", shapes, found)
    checks.versions += 1


def _site_weights(
    sites: Mapping[str, Mapping[str, Array]], suffix: str, where: str
) -> Mapping[str, Array]:
    if suffix not in sites:
        raise _error(where, f"site {suffix!r}", list(sites))
    return sites[suffix]


def _validate_annotation(checks: _ModuleChecks, annotation: AnnotationRecord) -> None:
    where = f"{annotation.name!r} of module {checks.module.path!r}"
    if not 0 <= annotation.sequence < checks.sequences:
        raise _error(where, f"a sequence below {checks.sequences}", annotation.sequence)
    if annotation.first < 0:
        raise _error(where, "a first step of at least 0", annotation.first)
    if len({isinstance(value, str) for value in annotation.values}) > 1:
        raise _error(where, "either strings or numbers only", annotation.values)


def _describe_call(checks: _ModuleChecks) -> str:
    return f"a call of module {checks.module.path!r}"


def _error(where: str, expected: object, found: object) -> SinkError:
    return SinkError(f"{where} cannot be recorded: expected {expected}, found {found}")
