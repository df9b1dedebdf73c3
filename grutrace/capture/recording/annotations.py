"""Align tokens and labels with the recorded steps that they belong to.

Users give values for a batch, one list per sequence, but a recording may contain calls of several
modules. Without a module name, values go only to modules whose batch they fit exactly: the number
of sequences is equal, and the longest list is as long as the longest sequence.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from grutrace.annotation_values import ParsedValues, Values, parse
from grutrace.capture.kernel_calls.replacement import GatesAsSet
from grutrace.capture.sequences.assignment import SequenceAssignment
from grutrace.errors import GrutraceWarning, OptionError, join_names, short_repr
from grutrace.gru.layout import SequenceLayout
from grutrace.gru.residual import ResidualViolation
from grutrace.records import (
    MARK_PREFIX,
    SET_PREFIX,
    VALUE_PREFIX,
    AnnotationRecord,
    ModuleInfo,
)
from grutrace.reprs import plural

#: Values, or values by the path of the module that they belong to, which may be a glob.
AnnotationValues: TypeAlias = Values | Mapping[str, Values]


#: Maximum number of sequences and batches per module that a recording block keeps.
MAX_SEQUENCES, MAX_BATCHES = 4096, 256


class RecordedCall(NamedTuple):
    """An observed call, and its numbers in the trace.

    Attributes:
        module: Index of the module in the header.
        assignment: The sequences of the call, as the tracker assigned them.
        lengths: (B,) number of steps of each sequence in the call, recorded or not.
        numbers: (B,) number in the trace of each sequence's first segment; -1 for none.
        start: The first recorded step of every sequence.
        stop: The step after the last recorded step; None for no end.
        violations: Sites whose residual exceeds the tolerance.
        precision_losses: One sentence for each loss of precision in the rows.
    """

    module: int
    assignment: SequenceAssignment
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    start: int = 0
    stop: int | None = None
    violations: Sequence[ResidualViolation] = ()
    precision_losses: Sequence[str] = ()


def recorded_call(module: int, assignment: SequenceAssignment) -> RecordedCall:
    """Return the result of a call of one step whose steps are all recorded."""
    lengths = np.ones(len(assignment.sequences), np.int64)
    return RecordedCall(module, assignment, lengths, assignment.roots.view(np.int64))


@dataclass(eq=False)
class _Batch:
    """The sequences of one batch, (B,) each.

    Attributes:
        sequences: Numbers of the first segments, as the tracker assigned them.
        first: The first step of each sequence in this batch.
        steps: Number of steps of each sequence since then.
        numbers: Numbers of the sequences in the trace; -1 for none.
        start: The first recorded step.
        stop: The step after the last recorded step; None for no end.
    """

    sequences: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    start: int
    stop: int | None


class _ModuleBatches:
    """The batches of one module, with the batch and row of each sequence.

    Attributes:
        batches: The batches that are kept, the most recently used last.
        dropped: Number of batches that were dropped.
    """

    def __init__(self, *, keep_all: bool) -> None:
        self.batches: OrderedDict[_Batch, None] = OrderedDict()
        self.dropped = 0
        self._keep_all, self._count = keep_all, 0
        # Keys are the ids of the arrays of sequences. A batch keeps its array alive, and all calls
        # of a decoder share one array.
        self._by_array: dict[int, _Batch] = {}
        # Filled on demand: most calls continue no batch, or a whole one.
        self._by_sequence: dict[int, tuple[_Batch, int]] = {}
        self._unlisted: deque[_Batch] = deque()

    def with_array(self, sequences: npt.NDArray[np.uint64]) -> _Batch | None:
        """Return the batch with this array of sequences; None if there is none."""
        batch = self._by_array.get(id(sequences))
        if batch is not None:
            self.batches.move_to_end(batch)
        return batch

    def find(self, sequences: npt.NDArray[np.uint64]) -> list[tuple[_Batch, int] | None]:
        """Return the batch and the row of each sequence; None for a sequence without a batch."""
        while self._unlisted:
            batch = self._unlisted.popleft()
            for row, number in enumerate(batch.sequences.tolist()):
                self._by_sequence[number] = batch, row
        positions = [self._by_sequence.get(number) for number in sequences.tolist()]
        for batch in dict.fromkeys(position[0] for position in positions if position is not None):
            self.batches.move_to_end(batch)
        return positions

    def add(self, batch: _Batch) -> None:
        """Add a batch, and drop the least recently used batches if there are too many."""
        self.batches[batch] = None
        self._by_array[id(batch.sequences)] = batch
        self._unlisted.append(batch)
        self._count += len(batch.sequences)
        while not self._keep_all and len(self.batches) > 1 and self._are_too_many():
            self._drop(next(iter(self.batches)))

    def _are_too_many(self) -> bool:
        return self._count > MAX_SEQUENCES or len(self.batches) > MAX_BATCHES

    def _drop(self, batch: _Batch) -> None:
        del self.batches[batch], self._by_array[id(batch.sequences)]
        self._count -= len(batch.sequences)
        self.dropped += 1
        if batch in self._unlisted:
            self._unlisted.remove(batch)
            return
        for number in batch.sequences.tolist():
            del self._by_sequence[number]


class RecordedBatches:
    """The batches recorded in one recording block, by module.

    Args:
        modules: The traced modules.
        keep_all: Whether to keep all batches. If False, only the latest of each module are kept.
    """

    def __init__(self, modules: Sequence[ModuleInfo], *, keep_all: bool = False) -> None:
        self._modules = modules
        self._keep_all = keep_all
        self._batches = [_ModuleBatches(keep_all=keep_all) for _ in modules]
        self._modules_with_skips: set[int] = set()
        self._has_warned = False

    def note_skipped_call(self, module: int) -> None:
        """Note that a call of a module was not recorded, so that its values fit no batch.

        The number of sequences of a skipped call is unknown, because the call is not inspected.
        """
        self._modules_with_skips.add(module)

    def clear(self) -> None:
        """Remove all batches, because the trace was cleared."""
        self._batches = [_ModuleBatches(keep_all=self._keep_all) for _ in self._modules]

    def add(self, recorded: RecordedCall) -> None:
        """Add a call. It extends known batches, or starts a new batch."""
        assignment, lengths, numbers = recorded.assignment, recorded.lengths, recorded.numbers
        batches = self._batches[recorded.module]
        # Numbers only grow: a sequence without a number gets one, and a sequence without recorded
        # steps gets a new one.
        batch = batches.with_array(assignment.roots)
        if batch is not None:
            batch.steps += lengths
            np.maximum(batch.numbers, numbers, out=batch.numbers)
            return
        is_known = False
        if not (assignment.begun.all() and assignment.roots is assignment.sequences):
            for row, position in enumerate(batches.find(assignment.roots)):
                if position is not None:
                    is_known = True
                    batch, index = position
                    batch.steps[index] += lengths[row]
                    batch.numbers[index] = max(batch.numbers[index], numbers[row])
        if not is_known and not assignment.forks:
            batches.add(
                _Batch(
                    assignment.roots,
                    assignment.steps_before.copy(),
                    lengths.copy(),
                    numbers.copy(),
                    recorded.start,
                    recorded.stop,
                )
            )

    def annotations(
        self, name: str, values_by_module: AnnotationValues, module: str | None = None
    ) -> list[AnnotationRecord]:
        """Return the annotations that give the values to the steps they belong to.

        Args:
            name: ``tokens``, or the label's name.
            values_by_module: The values, or values by module.
            module: Path or glob of the modules that the values belong to.

        Raises:
            OptionError: The values fit no recorded batch; the message lists what was recorded.
        """
        if not isinstance(name, str):
            raise OptionError(f"labels: expected a text as a name, found {short_repr(name)}")
        if name.startswith(MARK_PREFIX):
            raise OptionError(
                f"labels: names that begin with {MARK_PREFIX!r} are grutrace's own; found "
                f"{short_repr(name)}"
            )
        self._warn_of_dropped(name)
        if isinstance(values_by_module, Mapping):
            named = values_by_module.items()
            return [record for glob, values in named for record in self._named(name, glob, values)]
        if module is not None:
            return list(self._named(name, module, values_by_module))
        values = parse(name, values_by_module)
        fitting = [batch for batch in self._all() if _fits_exactly(values, batch[1])]
        if not fitting:
            if self._modules_with_skips:
                return []
            raise OptionError(
                f"{name}: got {_describe_values(name, values)}; {self._describe_batches()}. "
                "Values for a module with longer sequences need its path: {path: values}"
            )
        return [
            annotation
            for number, batch in fitting
            for annotation in _align(name, number, values, batch)
        ]

    def _named(self, name: str, glob: str, unparsed: Values) -> Iterator[AnnotationRecord]:
        values = parse(name, unparsed)
        if not any(fnmatchcase(module.path, glob) for module in self._modules):
            paths = join_names(module.path or "''" for module in self._modules)
            raise OptionError(f"{name}: {glob!r} matches no traced module: {paths}")
        left_out = any(
            fnmatchcase(self._modules[index].path, glob)
            for index in tuple(self._modules_with_skips)
        )
        matching = [
            batch for batch in self._all() if fnmatchcase(self._modules[batch[0]].path, glob)
        ]
        if not matching and not left_out:
            raise OptionError(
                f"{name}: {glob!r} matches no recorded module; {self._describe_batches()}"
            )
        fitting = [(module, batch) for module, batch in matching if _fits(values, batch)]
        if not fitting and not left_out:
            raise OptionError(
                f"{name}: got {_describe_values(name, values)} for {glob!r}; "
                f"{self._describe_batches()}"
            )
        for module, batch in fitting:
            yield from _align(name, module, values, batch)

    def _all(self) -> Iterator[tuple[int, _Batch]]:
        for module, batches in enumerate(self._batches):
            for batch in batches.batches:
                yield module, batch

    def _dropped(self) -> str:
        """Return a sentence about dropped batches; an empty text if no batch was dropped."""
        dropped = sum(batches.dropped for batches in self._batches)
        if not dropped:
            return ""
        return (
            f"the {dropped} oldest batches of this recording are no longer kept, and cannot be "
            "given values: annotate sooner, or pass tokens and labels to recording()"
        )

    def _warn_of_dropped(self, name: str) -> None:
        message = self._dropped()
        if message and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{name}: {message}", GrutraceWarning, stacklevel=5)

    def _describe_batches(self) -> str:
        batches = {
            f"the recorded batch of {self._modules[module].path or 'the model'} has "
            f"{plural(len(batch.steps), 'sequence')} of up to "
            f"{plural(int(batch.steps.max(initial=0)), 'step')}"
            for module, batch in self._all()
        }
        dropped = self._dropped()
        parts = [*sorted(batches), *([dropped] if dropped else [])]
        return "; ".join(parts) or "nothing was recorded"


def set_labels(
    recorded: RecordedCall,
    suffix: str,
    gates: GatesAsSet,
    steps: SequenceLayout,
    dtype: npt.DTypeLike | None,
) -> Iterator[AnnotationRecord]:
    """Yield labels that name the values set by an intervention at a site.

    Args:
        recorded: The call.
        suffix: Suffix of the site.
        gates: The gates of the site.
        steps: The layout of the recorded steps.
        dtype: Data type of the rows, to add labels with the values of the gates that were set; None
            for none.
    """
    codes = steps.to_rows(gates.codes, "int64")[:, 0]
    texts = [None, *gates.texts]
    named = [texts[code] for code in codes.tolist()]
    yield from _row_labels(recorded, f"{SET_PREFIX}{suffix}", named, steps.lengths)
    if dtype is None:
        return
    rows = {name: steps.to_rows(gate, dtype) for name, gate in gates.gates.items()}
    for code, by_gate in enumerate(gates.units, start=1):
        is_set = codes == code
        for name, units in by_gate.items():
            values = rows[name][is_set][:, list(units)]
            # One label for all units with the same values.
            different, places = np.unique(values, axis=1, return_inverse=True)
            for place, column in enumerate(different.T.tolist()):
                own = [unit for unit, at in zip(units, places.ravel(), strict=True) if at == place]
                labels: list[float | None] = [None] * len(codes)
                for row, value in zip(np.flatnonzero(is_set).tolist(), column, strict=True):
                    labels[row] = value
                label = f"{VALUE_PREFIX}{suffix}:{name}[{','.join(map(str, own))}]"
                yield from _row_labels(recorded, label, labels, steps.lengths)


def _row_labels(
    recorded: RecordedCall,
    name: str,
    labels: Sequence[Any],
    lengths: npt.NDArray[np.int64],
) -> Iterator[AnnotationRecord]:
    """Yield the labels of the recorded rows of a call, None for no label.

    Args:
        recorded: The call.
        name: Name of the label.
        labels: (N,) of each row, a text or a number.
        lengths: (B,) number of recorded steps of each sequence.
    """
    before = np.maximum(recorded.assignment.steps_before - recorded.start, 0)
    ends = np.cumsum(lengths)
    for row, (number, end) in enumerate(zip(recorded.numbers.tolist(), ends.tolist(), strict=True)):
        own = labels[end - int(lengths[row]) : end]
        has_label = np.array([label is not None for label in own], bool)
        bounds = np.flatnonzero(np.diff(has_label, prepend=False, append=False))
        for start, stop in bounds.reshape(-1, 2).tolist():
            if number >= 0:
                yield AnnotationRecord(
                    module=recorded.module,
                    sequence=number,
                    name=name,
                    first=int(before[row]) + start,
                    values=tuple(own[start:stop]),
                )


def _fits(values: ParsedValues, batch: _Batch) -> bool:
    """Whether each sequence has at least as many steps as values, not counting padding."""
    longest = batch.steps.max(initial=0)
    return len(values.lists) == len(batch.steps) and all(
        not isinstance(entry, list) or len(entry) <= (longest if values.padded else steps)
        for entry, steps in zip(values.lists, batch.steps, strict=True)
    )


def _fits_exactly(values: ParsedValues, batch: _Batch) -> bool:
    return _fits(values, batch) and values.longest in (None, batch.steps.max(initial=0))


def _align(
    name: str, module: int, values: ParsedValues, batch: _Batch
) -> Iterator[AnnotationRecord]:
    for row, entry in enumerate(values.lists):
        steps = int(batch.steps[row])
        repeated = entry[:steps] if isinstance(entry, list) else [entry] * steps
        first, clipped = _clip_values(repeated, int(batch.first[row]), batch.start, batch.stop)
        if clipped and batch.numbers[row] >= 0:
            is_text = isinstance(clipped[0], str)
            yield AnnotationRecord(
                module=module,
                sequence=int(batch.numbers[row]),
                name=name,
                first=first,
                values=tuple(clipped if is_text else map(float, clipped)),
            )


def _clip_values(
    values: Sequence[Any], first: int, start: int, stop: int | None
) -> tuple[int, Sequence[Any]]:
    """Return the recorded step of the first value, and the values of the recorded steps.

    Args:
        values: One per step.
        first: The step that the first value belongs to.
        start: The first recorded step.
        stop: The step after the last recorded step; None for no end.
    """
    end = None if stop is None else max(0, stop - first)
    return max(0, first - start), values[max(0, start - first) : end]


def _describe_values(name: str, values: ParsedValues) -> str:
    if values.longest is None:
        return plural(len(values.lists), "value")
    lists = plural(len(values.lists), "list")
    noun = "token" if name == "tokens" else "value"
    return f"{lists} of up to {plural(values.longest, noun)}"
