"""The expected content of a trace, computed from the records with loops."""

from __future__ import annotations

import numpy as np
import pytest

from grutrace.errors import NotRecordedError
from grutrace.records import AnnotationRecord, CallRecord, WeightsRecord


class Expected:
    """Everything about a list of records, sequence by sequence."""

    def __init__(self, header, records):
        self.header = header
        self.blocks = [record for record in records if isinstance(record, CallRecord)]
        self.weights = [record for record in records if isinstance(record, WeightsRecord)]
        self.annotations = [record for record in records if isinstance(record, AnnotationRecord)]

    def of(self, module):
        return [block for block in self.blocks if block.module == module]

    def sequences(self, module):
        """By sequence: its pieces as (block, place, first row of the block, steps)."""
        results = {}
        for block in self.of(module):
            row = 0
            for batch_index, (steps, number) in enumerate(
                zip(block.steps.tolist(), block.sequences.tolist(), strict=True)
            ):
                results.setdefault(number, []).append((block, batch_index, row, steps))
                row += steps
        return results

    def rows(self, module, suffix, quantity, number):
        pieces = self.sequences(module)[number]
        parts = [
            block.sites[suffix].rows[quantity][row : row + steps] for block, _, row, steps in pieces
        ]
        return np.concatenate(parts)

    def all_rows(self, module, site, quantity):
        kind = self.header.modules[module]
        width = site.input_size if quantity == "input" else kind.hidden_size
        parts = [block.sites[site.suffix].rows[quantity] for block in self.of(module)]
        return np.concatenate([np.empty((0, width), kind.dtype), *parts])

    def initial(self, module, suffix):
        hidden = self.header.modules[module].hidden_size
        parts = [block.sites[suffix].initial for block in self.of(module)]
        return np.concatenate([np.empty((0, hidden)), *parts])

    def all_rows_made(self, module):
        return [row for block in self.of(module) for row in range(int(block.steps.sum()))]

    def forks(self, module):
        return {fork.sequence: fork for block in self.of(module) for fork in block.forks}

    def annotated(self, module, number, length):
        """By name, the value of each step, None where there is none."""
        results = {}
        for annotation in self.annotations:
            if (annotation.module, annotation.sequence) == (module, number):
                values = results.setdefault(annotation.name, [None] * length)
                for step, value in enumerate(annotation.values, annotation.first):
                    if step < length:
                        values[step] = value
        return results


def check_trace(trace, header, records):
    """Compare everything that a trace shows with the records."""
    expected = Expected(header, records)
    assert trace.header == header
    assert trace.modules == header.modules
    assert trace.options == header.options
    assert trace.sites == tuple(site.name for module in header.modules for site in module.sites)
    assert list(trace) == list(trace.sites)
    _check_calls(trace, expected)
    _check_sequences(trace, expected)
    for number, module in enumerate(header.modules):
        for site in module.sites:
            assert site.name in trace
            _check_site(trace[site.name], expected, number, site)


def _check_calls(trace, expected):
    assert len(trace.calls) == len(expected.blocks)
    for call, block in zip(trace.calls, expected.blocks, strict=True):
        assert call["module"] == expected.header.modules[block.module].path
        assert call["tag"] == block.tag
        assert (call["weights"], call["training"]) == (block.weights, block.training)
        assert (call["batch"], call["steps"]) == (len(block.steps), block.steps.sum())
        assert call["time"] == block.time
        assert call["residual"] == np.float32(max(s.residual for s in block.sites.values()))


def _check_sequences(trace, expected):
    rows = iter(trace.sequences)
    for number, module in enumerate(expected.header.modules):
        for sequence, pieces in sorted(expected.sequences(number).items()):
            row = next(rows)
            block, batch_index, _, _ = pieces[0]
            fork = expected.forks(number).get(sequence)
            assert (row["module"], row["sequence"]) == (module.path, sequence)
            assert expected.blocks[row["call"]] is block
            assert (row["place"], row["tag"], row["pieces"]) == (
                batch_index,
                block.tag,
                len(pieces),
            )
            assert row["steps"] == sum(steps for *_, steps in pieces)
            parent = (fork.parent, fork.steps) if fork else (-1, -1)
            assert (row["parent"], row["parent_steps"]) == parent
    assert next(rows, None) is None


def _check_site(site, expected, module, description):
    suffix = description.suffix
    blocks = expected.of(module)
    sequences = expected.sequences(module)
    assert (site.name, len(site)) == (description.name, len(sequences))
    for quantity in description.quantities:
        rows = expected.all_rows(module, description, quantity)
        assert np.asarray(site.rows(quantity)).dtype == rows.dtype
        np.testing.assert_array_equal(site.rows(quantity), rows)
        padded, lengths = site.padded(quantity)
        np.testing.assert_array_equal(lengths, site.lengths)
        for number in sequences:
            exact = expected.rows(module, suffix, quantity, number)
            np.testing.assert_array_equal(padded[number, : len(exact)], exact)
            assert not padded[number, len(exact) :].any()
    np.testing.assert_array_equal(site.initial, expected.initial(module, suffix))
    checks = [block.sites[suffix] for block in blocks]
    for name in ("residual", "tolerance", "precision"):
        exact = np.array([getattr(check, name) for check in checks], np.float32)
        np.testing.assert_array_equal(site.checks[name], exact)
    assert site.residual == max((np.float32(check.residual) for check in checks), default=0.0)
    used = 1 + max((block.weights for block in blocks), default=-1)
    for record in expected.weights:
        if record.module == module and record.version < used:
            result = site.weights(record.version)
            assert list(result) == list(record.sites[suffix])
            for name, array in record.sites[suffix].items():
                np.testing.assert_array_equal(result[name], array)
    for number, sequence in enumerate(site):
        _check_sequence(sequence, expected, module, description, number)
    _check_labels(site, expected, module)


def _check_labels(site, expected, module):
    """Check that the labels of all rows are those of each step."""
    names = {annotation.name for annotation in expected.annotations if annotation.module == module}
    assert set(site.label_names) == names
    for name in names:
        result, seen = site.row_labels(name), []
        assert (result.name, len(result)) == (name, len(expected.all_rows_made(module)))
        values = np.array([*result.values, None], object)[result.codes]
        for number in range(len(site)):
            length = len(site.sequence(number))
            exact = expected.annotated(module, number, length).get(name, [None] * length)
            assert values[site.rows_between(number, number + 1)].tolist() == exact
            seen += exact
        assert set(result.values) == set(seen) - {None}
        numbers = [value for value in result.values if not isinstance(value, str)]
        texts = result.values[len(numbers) :]
        assert result.values == (*sorted(numbers), *sorted(texts))
    with pytest.raises(NotRecordedError, match="no label 'mood'"):
        site.row_labels("mood")


def _check_sequence(sequence, expected, module, site, number):
    pieces = expected.sequences(module)[number]
    length = sum(steps for *_, steps in pieces)
    initial = expected.initial(module, site.suffix)[number]
    fork = expected.forks(module).get(number)
    assert (sequence.number, len(sequence)) == (number, length)
    assert (sequence.tag, sequence.place) == (pieces[0][0].tag, pieces[0][1])
    assert [expected.blocks[call] for call in sequence.calls] == [piece[0] for piece in pieces]
    assert sequence.parent == (fork.parent if fork else None)
    assert sequence.parent_steps == (fork.steps if fork else None)
    np.testing.assert_array_equal(sequence.initial, initial)
    for quantity in site.quantities:
        exact = expected.rows(module, site.suffix, quantity, number)
        np.testing.assert_array_equal(sequence.rows(quantity), exact)
    if "hidden" in site.quantities:
        hidden = expected.rows(module, site.suffix, "hidden", number)
        for step in range(length):
            before = step + 1 if site.reverse else step - 1
            state = hidden[before] if 0 <= before < length else initial
            np.testing.assert_array_equal(sequence.previous[step], state)
    annotated = expected.annotated(module, number, length)
    assert sequence.tokens == annotated.pop("tokens", None)
    assert set(sequence.labels) == set(annotated)
    for name, values in annotated.items():
        result = sequence.labels[name]
        if isinstance(result, np.ndarray):
            values = [np.nan if value is None else value for value in values]
            np.testing.assert_array_equal(result, values)
        else:
            assert result == values
