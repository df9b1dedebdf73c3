"""What a record adds to each dataset of a trace: the one place where records become entries.

Both sinks take entries from here, so they hold the same numbers; they differ in where to.

Texts as numbers: a tag or token that comes a million times is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from grutrace.records import (
    MARK_PREFIX,
    AnnotationRecord,
    Array,
    CallRecord,
    ModuleInfo,
    Record,
    WeightsRecord,
)
from grutrace.storage.format.schema import (
    ANNOTATION,
    CALL,
    CHECK,
    FORK,
    PIECE,
    input_owner,
    pieces_path,
    quantity_path,
    site_path,
)

#: Texts that are remembered. After so many different ones the memory starts afresh, which may store
#: a text twice, but cannot grow without bound.
MAX_INTERNED = 1 << 20


class StringTable:
    """Gives every text a number, and keeps the new ones until somebody takes them.

    Args:
        known: Texts that have the numbers 0, 1, ... already.
        characters: Bytes that those take.
    """

    def __init__(self, known: Sequence[str] = (), characters: int = 0) -> None:
        self._numbers: dict[str, int] = {text: number for number, text in enumerate(known)}
        self._count = len(known)
        self._characters = characters
        self._new: list[bytes] = []

    def intern(self, text: str) -> int:
        """Number of the text, the next one if it is new."""
        number = self._numbers.get(text)
        if number is None:
            number = self._add(text)
        return number

    def intern_optional(self, text: str | None) -> int:
        """One more than the number of the text; 0 for none."""
        return 0 if text is None else 1 + self.intern(text)

    def pop_new(self) -> tuple[Array, Array]:
        """The texts added since the last take: where each ends, (texts,), and their UTF-8 bytes."""
        lengths = np.fromiter(map(len, self._new), np.uint64, len(self._new))
        ends = np.uint64(self._characters) + np.cumsum(lengths, dtype=np.uint64)
        joined = b"".join(self._new)
        self._characters += len(joined)
        self._new = []
        return ends, np.frombuffer(joined, np.uint8)

    def _add(self, text: str) -> int:
        if len(self._numbers) >= MAX_INTERNED:
            self._numbers.clear()
        number = self._numbers[text] = self._count
        self._count += 1
        # A lone surrogate has no UTF-8 form.
        self._new.append(text.encode("utf-8", "backslashreplace"))
        return number


Entry = tuple[str, Array]


class _DatasetPaths:
    """The places in the file of one module's datasets, spelt once."""

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
                site_path(module, site.suffix, "checks"),
            )
            for site in module.sites
        ]


class RecordEncoder:
    """Turns records into (place, items to append there).

    Args:
        modules: The modules of the trace.
        strings: Numbers of the texts so far.
        sequences: By module, the sequences of an earlier run in the same file; numbers go on there.
        versions: By module, likewise the versions of its weights.
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
        """Have the first weights of this run be the last version that is there already."""
        self._versions[module] -= 1

    def encode(self, record: Record) -> Iterator[Entry]:
        """Everything that the record adds, except the texts, which wait in `strings`."""
        if isinstance(record, CallRecord):
            yield from self._encode_call(record)
        elif isinstance(record, WeightsRecord):
            yield from self._encode_weights(record)
        else:
            yield from self._encode_annotation(record)

    def _encode_call(self, block: CallRecord) -> Iterator[Entry]:
        paths, first = self._paths[block.module], self._sequences[block.module]
        for suffix, quantities, initial, checks in paths.sites:
            site = block.sites[suffix]
            for quantity, path in quantities:
                yield path, site.rows[quantity]
            yield initial, site.initial
            yield checks, np.array([(site.residual, site.tolerance, site.precision)], CHECK)
        pieces = np.empty(len(block.steps), PIECE)
        pieces["sequence"] = block.sequences
        pieces["sequence"] += np.uint64(first)
        pieces["steps"] = block.steps
        yield paths.pieces, pieces
        yield "calls", self._encode_call_entry(block)
        if block.forks:
            forks = [
                (block.module, first + fork.sequence, first + fork.parent, fork.steps)
                for fork in block.forks
            ]
            yield "forks", np.array(forks, FORK)
        if block.origins:
            marks = [
                (
                    block.module,
                    self._strings.intern_optional(MARK_PREFIX + origin.mark),
                    first + origin.sequence,
                    *(0, 0, False),
                )
                for origin in block.origins
            ]
            yield "annotations", np.array(marks, ANNOTATION)

    def _encode_call_entry(self, block: CallRecord) -> Array:
        weights = self._versions[block.module] + block.weights
        tag = self._strings.intern_optional(block.tag)
        call = (block.time, block.module, tag, weights, len(block.steps), block.training)
        return np.array([call], CALL)

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
