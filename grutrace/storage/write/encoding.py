"""Encode records as items to append to the datasets of a trace.

The memory sink and the file sink both use this encoder, so they store the same items.
`StringTable` stores a tag or token that occurs a million times once, and refers to it by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from grutrace.records import (
    MARK_PREFIX,
    AnnotationRecord,
    Array,
    CallBatch,
    CallRecord,
    CallSeries,
    Fork,
    ModuleInfo,
    Origin,
    Record,
    WeightsRecord,
)
from grutrace.storage.format.schema import (
    ANNOTATION,
    BACKWARD,
    CALL,
    CHECK,
    FORK,
    PIECE,
    call_tables,
    input_owner,
    pieces_path,
    quantity_path,
    site_path,
)

#: Number of different strings that are remembered. Beyond it the table forgets all of them, so that
#: its memory is bounded; a string may then be stored twice.
MAX_INTERNED = 1 << 20


class StringTable:
    """Maps strings to numbers, and collects the new strings until `pop_new`.

    Args:
        strings: Strings that already have the numbers 0, 1, ...
        characters: UTF-8 bytes that they take in the file.
    """

    def __init__(self, strings: Sequence[str] = (), characters: int = 0) -> None:
        self._numbers: dict[str, int] = {text: number for number, text in enumerate(strings)}
        self._count = len(strings)
        self._characters = characters
        self._new: list[bytes] = []

    def intern(self, text: str) -> int:
        """Return the number of a string. A new string gets the next number."""
        number = self._numbers.get(text)
        if number is None:
            number = self._add(text)
        return number

    def intern_optional(self, text: str | None) -> int:
        """Return one more than the number of a string; 0 for None."""
        return 0 if text is None else 1 + self.intern(text)

    def pop_new(self) -> tuple[Array, Array]:
        """Return the strings added since the last call: their ends, (strings,), and UTF-8 bytes."""
        lengths = np.fromiter(map(len, self._new), np.uint64, len(self._new))
        ends = np.uint64(self._characters) + np.cumsum(lengths, dtype=np.uint64)
        characters = b"".join(self._new)
        self._characters += len(characters)
        self._new = []
        return ends, np.frombuffer(characters, np.uint8)

    def _add(self, text: str) -> int:
        if len(self._numbers) >= MAX_INTERNED:
            self._numbers.clear()
        number = self._numbers[text] = self._count
        self._count += 1
        # A lone surrogate cannot be encoded in UTF-8.
        self._new.append(text.encode("utf-8", "backslashreplace"))
        return number


#: Path of a dataset, and items to append to it.
Entry: TypeAlias = tuple[str, Array]


class _DatasetPaths:
    """The paths of the datasets of one module, computed once."""

    def __init__(self, module: ModuleInfo) -> None:
        self.pieces = pieces_path(module)
        self.sites = [
            (
                site.suffix,
                [
                    (quantity, quantity_path(module, site, quantity))
                    for quantity in site.quantities
                    if quantity != "input" or input_owner(module, site) is site
                ],
                site_path(module, site.suffix, "initial"),
                {name: site_path(module, site.suffix, name) for name in call_tables(site)},
            )
            for site in module.sites
        ]


class RecordEncoder:
    """Encodes records as pairs of a dataset path and the items to append there.

    Args:
        modules: Modules of the trace.
        strings: The strings so far.
        sequences: Number of sequences of each module in the file. New sequences are numbered from
            there.
        versions: Number of versions of the weights of each module in the file.
    """

    def __init__(
        self,
        modules: Sequence[ModuleInfo],
        strings: StringTable,
        sequences: Sequence[int] | None = None,
        versions: Sequence[int] | None = None,
    ) -> None:
        self._modules = modules
        self._paths = [_DatasetPaths(module) for module in modules]
        self._strings = strings
        self._sequences = sequences or [0] * len(modules)
        self._versions = list(versions or [0] * len(modules))

    def reuse_last_weights(self, module: int) -> None:
        """Map the first weights of this run to the last version in the file."""
        self._versions[module] -= 1

    def encode(self, record: Record) -> Iterator[Entry]:
        """Yield the items that a record adds, except new strings, which stay in the table."""
        if isinstance(record, CallRecord):
            yield from self._encode_call(record)
        elif isinstance(record, CallBatch):
            yield from self._encode_batch(record)
        elif isinstance(record, WeightsRecord):
            yield from self._encode_weights(record)
        else:
            yield from self._encode_annotation(record)

    def _encode_call(self, call: CallRecord) -> Iterator[Entry]:
        # Records count sequences from 0, the file from its last sequence on.
        paths, offset = self._paths[call.module], self._sequences[call.module]
        for suffix, quantities, initial, of_calls in paths.sites:
            site = call.sites[suffix]
            for quantity, path in quantities:
                yield path, site.rows[quantity]
            yield initial, site.initial
            check = site.residual, site.tolerance, site.precision
            yield of_calls["checks"], np.array([check], CHECK)
            if "backward" in of_calls:
                backward = site.is_attached, site.loss_scale
                yield of_calls["backward"], np.array([backward], BACKWARD)
        pieces = np.empty(len(call.steps), PIECE)
        pieces["sequence"] = call.sequences
        pieces["sequence"] += np.uint64(offset)
        pieces["steps"] = call.steps
        yield paths.pieces, pieces
        weights, tag = self._weights_and_tag(call)
        entry = (call.time, call.module, tag, weights, len(call.steps), call.training)
        yield "calls", np.array([entry], CALL)
        yield from self._encode_starts(call.module, call.forks, call.origins)
        for annotation in call.annotations:
            yield from self._encode_annotation(annotation)

    def _encode_batch(self, batch: CallBatch) -> Iterator[Entry]:
        calls = np.empty(len(batch), CALL)
        for index, series in enumerate(batch.series):
            yield from self._encode_series(series)
            entries = np.empty(len(series), CALL)
            entries["time"], entries["module"] = series.times, series.module
            entries["weights"], entries["tag"] = self._weights_and_tag(series)
            entries["batch"] = series.sequences.shape[1]
            entries["training"] = series.training
            calls[batch.order == index] = entries
        yield "calls", calls
        for series in batch.series:
            for call in sorted({*series.forks, *series.origins}):
                of_call = series.forks.get(call, ()), series.origins.get(call, ())
                yield from self._encode_starts(series.module, *of_call)

    def _encode_series(self, series: CallSeries) -> Iterator[Entry]:
        paths, offset = self._paths[series.module], self._sequences[series.module]
        for suffix, quantities, initial, of_calls in paths.sites:
            site = series.sites[suffix]
            for quantity, path in quantities:
                yield path, site.rows[quantity]
            yield initial, site.initial
            checks = np.empty(len(series), CHECK)
            checks["residual"], checks["tolerance"] = site.residuals, site.tolerances
            checks["precision"] = site.precision
            yield of_calls["checks"], checks
            if "backward" in of_calls:
                yield of_calls["backward"], np.zeros(len(series), BACKWARD)
        pieces = np.empty(series.sequences.size, PIECE)
        pieces["sequence"] = series.sequences.ravel()
        pieces["sequence"] += np.uint64(offset)
        pieces["steps"] = 1
        yield paths.pieces, pieces

    def _weights_and_tag(self, calls: CallRecord | CallSeries) -> tuple[int, int]:
        """Return the number of the version of the weights, and of the tag."""
        version = self._versions[calls.module] + calls.weights
        return version, self._strings.intern_optional(calls.tag)

    def _encode_starts(
        self, module: int, forks: Sequence[Fork], origins: Sequence[Origin]
    ) -> Iterator[Entry]:
        """Yield the forks and the marks of the sequences that start in one call."""
        offset = self._sequences[module]
        if forks:
            entries = [
                (module, offset + fork.sequence, offset + fork.parent, fork.steps) for fork in forks
            ]
            yield "forks", np.array(entries, FORK)
        if origins:
            marks = [
                (
                    module,
                    self._strings.intern_optional(MARK_PREFIX + origin.mark),
                    offset + origin.sequence,
                    *(0, 0, False),
                )
                for origin in origins
            ]
            yield "annotations", np.array(marks, ANNOTATION)

    def _encode_weights(self, weights: WeightsRecord) -> Iterator[Entry]:
        module = self._modules[weights.module]
        for site in module.sites:
            for name, array in weights.sites[site.suffix].items():
                yield site_path(module, site.suffix, name), array[np.newaxis]

    def _encode_annotation(self, annotation: AnnotationRecord) -> Iterator[Entry]:
        values = annotation.values
        text = bool(values) and isinstance(values[0], str)
        if text:
            values = tuple(float(self._strings.intern(str(value))) for value in values)
        entry = (
            annotation.module,
            self._strings.intern_optional(annotation.name),
            self._sequences[annotation.module] + annotation.sequence,
            annotation.first,
            len(values),
            text,
        )
        yield "annotations", np.array([entry], ANNOTATION)
        yield "values", np.array(values, "<f8")
