"""Tokens and labels for sequences that are recorded already, in memory or in a finished file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from numbers import Integral
from pathlib import Path
from typing import Any

from grutrace.annotation_values import match_modules, parse
from grutrace.errors import OptionError, SinkError, TraceFileError, join_names, short_repr
from grutrace.records import MARK_PREFIX, AnnotationRecord, ModuleInfo
from grutrace.storage.format.header import read_header
from grutrace.storage.hdf5.errors import translate_read_errors
from grutrace.storage.hdf5.handle import SharedReadHandle
from grutrace.storage.write.writer import Writer


def annotation_records(
    name: str,
    values: Any,
    modules: Sequence[ModuleInfo],
    lengths: Sequence[Sequence[int]],
    module: str | None = None,
) -> list[AnnotationRecord]:
    """Return the records that give tokens or a label to sequences of a trace.

    Args:
        name: ``tokens``, or the name of the label.
        values: For each sequence of a module one value per step, or one value for all steps, or
            None; or such values by number of the sequence; or any of these by path of the module.
        modules: Modules of the trace.
        lengths: By module, the number of steps of each sequence.
        module: Path, or glob, of the modules. None for all that the values fit.

    Raises:
        OptionError: The values have another form, or do not fit the sequences.
    """
    if name.startswith(MARK_PREFIX) or not name:
        raise OptionError(
            f"labels: expected names that do not begin with {MARK_PREFIX!r}, found {name!r}"
        )
    if isinstance(values, Mapping) and values and all(isinstance(key, str) for key in values):
        if module is not None:
            raise OptionError(f"{name}: expected values by module, or module={module!r}; not both")
        return [
            record
            for path, of_module in values.items()
            for record in annotation_records(name, of_module, modules, lengths, path)
        ]
    fitting, reasons = list[AnnotationRecord](), list[str]()
    numbers = match_modules([info.path for info in modules], module)
    for number in numbers:
        by_sequence, reason = _values_by_sequence(name, values, lengths[number])
        if reason is None:
            fitting += _records(name, number, by_sequence, lengths[number])
        else:
            path = modules[number].path
            reasons.append(f"{f'module {path!r}' if path else 'the model'}: {reason}")
    if len(reasons) == len(numbers):
        raise OptionError(f"{name}: {'; '.join(reasons)}")
    return fitting


def _values_by_sequence(
    name: str, values: Any, lengths: Sequence[int]
) -> tuple[dict[int, Any], str | None]:
    """Return the values by sequence, and the reason why they do not fit the sequences, if so."""
    if isinstance(values, Mapping):
        keys = list(values)
        if not all(isinstance(key, Integral) for key in keys):
            raise OptionError(
                f"{name}: expected values by number of the sequence, or by path of the module; "
                f"found the keys {join_names(map(short_repr, keys))}"
            )
        parsed = parse(name, [values[key] for key in keys], missing=True)
        wrong = [key for key in keys if not 0 <= key < len(lengths)]
        if wrong:
            return {}, f"expected sequences below {len(lengths)}, found {wrong[0]}"
        by_sequence = dict(zip(map(int, keys), parsed.lists, strict=True))
    else:
        parsed = parse(name, values, missing=True)
        if len(parsed.lists) != len(lengths):
            found = len(parsed.lists)
            return {}, f"expected values for {len(lengths)} sequences, found those of {found}"
        by_sequence = dict(enumerate(parsed.lists))
    is_padded = parsed.padded and parsed.longest == max(lengths, default=0)
    for number, of_steps in by_sequence.items():
        if isinstance(of_steps, list) and len(of_steps) != lengths[number] and not is_padded:
            steps = lengths[number]
            return {}, f"expected {steps} values for sequence {number}, found {len(of_steps)}"
    return by_sequence, None


def _records(
    name: str, module: int, by_sequence: Mapping[int, Any], lengths: Sequence[int]
) -> Iterator[AnnotationRecord]:
    """Yield a record for each run of steps that have a value."""
    for sequence, of_steps in by_sequence.items():
        length = lengths[sequence]
        values = of_steps[:length] if isinstance(of_steps, list) else [of_steps] * length
        first = 0
        for is_missing, run in groupby(values, _is_missing):
            run_values = tuple(run)
            if not is_missing:
                yield AnnotationRecord(module, sequence, name, first, run_values)
            first += len(run_values)


def _is_missing(value: Any) -> bool:
    """Return whether a value is None or NaN."""
    return value is None or value != value


def annotate_file(path: Path, annotations: Sequence[AnnotationRecord]) -> None:
    """Add annotations to a closed trace file. Nothing else in the file changes.

    They are committed together, with the file closed: a process that is killed meanwhile leaves all
    or none of them.

    Args:
        path: Path of the file.
        annotations: The annotations. Their sequences are numbered as in the file.

    Raises:
        TraceFileError: The file was not closed in order, is written by another process, or cannot
            be written.
    """
    with translate_read_errors(path):
        handle = SharedReadHandle(path)
        try:
            with handle.acquire() as file:
                header = read_header(file)
        finally:
            handle.close()
    writer = Writer(path, header, "a")
    try:
        writer.write_annotations(annotations)
        writer.close()
    except SinkError as error:
        raise TraceFileError(f"{path} was not annotated: {error}") from error
    finally:
        # Without an error it is closed already.
        writer.abandon()
