"""Token patterns against a plain search, token by token."""

from __future__ import annotations

import re
from fnmatch import translate
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grutrace.errors import OptionError
from grutrace.storage.memory import MemorySink
from grutrace.storage.read.annotations import row_labels
from grutrace.storage.read.selection.patterns import TokenPattern, parse_globs, value_text
from grutrace.storage.read.trace import Trace
from tests.storage.streams import Stream, make_header, make_module

TOKENS = ("a", "b", "ab", "A", "^", "", None)


def search(sequences: list[list[str | None]], pattern: str) -> list[tuple[int, int]]:
    """Every match, found as a person would."""
    globs = pattern.split()
    at_start, at_end = globs[0] == "^", globs[-1] == "$"
    globs = [glob for glob in globs if glob not in "^$"]
    found = []
    for number, tokens in enumerate(sequences):
        for first in range(len(tokens) - len(globs) + 1):
            part = tokens[first : first + len(globs)]
            if at_start and first > 0:
                continue
            if at_end and first + len(globs) < len(tokens):
                continue
            if all(
                token is not None and re.match(translate(glob), token)
                for token, glob in zip(part, globs, strict=True)
            ):
                found.append((number, first))
    return found


def trace_of(sequences: list[list[str | None]], *, stepwise: bool = False) -> Trace:
    stream = Stream(make_header(make_module(directions=(False,))))
    if stepwise:
        stream.call([0] * len(sequences))
        for step in range(max(map(len, sequences), default=0)):
            going = [number for number, tokens in enumerate(sequences) if len(tokens) > step]
            stream.call([1] * len(going), go_on=going)
    else:
        stream.call([len(tokens) for tokens in sequences])
    for number, tokens in enumerate(sequences):
        for step, token in enumerate(tokens):
            if token is not None:
                stream.annotate(number, "tokens", [token], first=step)
    stream.annotate(0, "tokens", ["beyond the end"], first=99)
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    return Trace(sink)


def find(trace: Trace, pattern: Any) -> list[tuple[int, int]]:
    index, tables = trace.snapshot.index(0), trace.snapshot.tables
    column = row_labels(tables, 0, index, "tokens")
    found = TokenPattern.parse(pattern).find(column, index)
    return list(zip(*(numbers.tolist() for numbers in found), strict=True))


@given(
    st.lists(st.lists(st.sampled_from(TOKENS), max_size=6), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "*", "a*", "[!a]", "?", "[^]", "[ab]"]), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_matches_are_those_of_a_plain_search(sequences, globs, start, end, stepwise) -> None:
    pattern = " ".join(["^"] * start + globs + ["$"] * end)
    trace = trace_of(sequences, stepwise=stepwise)
    expected = search(sequences, pattern)
    assert find(trace, pattern) == expected
    selected = trace.select(tokens=pattern)
    assert selected.sequences["original"].tolist() == sorted({number for number, _ in expected})


def test_control_a_match_does_not_cross_from_one_sequence_into_the_next() -> None:
    trace = trace_of([["a", "b"], ["b", "a"]])
    assert find(trace, "b b") == []
    assert find(trace, "b a") == [(1, 0)]
    assert find(trace, "a b") == [(0, 0)]
    assert find(trace, "^ b") == [(1, 0)]
    assert find(trace, "b $") == [(0, 1)]


def test_numbers_match_by_their_text() -> None:
    assert [value_text(value) for value in (3.0, -0.0, 0.1, 1e300, "x")][:3] == ["3", "0", "0.1"]
    trace = trace_of([["a"]])
    stream = Stream(make_header(make_module(directions=(False,))))
    stream.call([3, 2])
    stream.annotate(0, "tokens", [7.0, 17.0, 8.0])
    stream.annotate(1, "tokens", [17.0, 7.0])
    sink = MemorySink(stream.header)
    for record in stream.records:
        sink.append(record)
    trace = Trace(sink)
    assert find(trace, "7 17") == [(0, 0)]
    assert find(trace, [17, 7]) == [(1, 0)]
    assert find(trace, "1?") == [(0, 1), (1, 0)]


def test_a_list_has_one_glob_for_each_token_with_spaces_in_it() -> None:
    trace = trace_of([["New York", "is"], ["New", "York"]])
    assert find(trace, ["New York", "is"]) == [(0, 0)]
    assert find(trace, "New York") == [(1, 0)]
    assert find(trace, "New?York") == [(0, 0)]


@pytest.mark.parametrize("pattern", ["", "  ", "^", "^ $", [], 3, None, [None], b"a", {"a": 1}])
def test_what_is_no_pattern_is_refused(pattern) -> None:
    with pytest.raises(OptionError, match="tokens: expected"):
        TokenPattern.parse(pattern)


@pytest.mark.parametrize("value", [None, [], [None], [[1]], object()])
def test_what_is_no_glob_is_refused(value) -> None:
    with pytest.raises(OptionError, match="pos: expected a glob or a number"):
        parse_globs("pos", value)
    assert parse_globs("pos", np.float32(0.5)) == ("0.5",)
    assert parse_globs("pos", [np.int64(3), "x*"]) == ("3", "x*")
