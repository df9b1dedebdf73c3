"""Links are read as they were written; wrong ones are named and ignored."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grutrace.view.live.engine.link import ORDERS, Link, Steps, parse_link
from grutrace.view.live.engine.window import STATISTICS

NUMBERS = st.integers(0, 10**9 - 1)
STEPS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(
    lambda n: Steps(*min(n[:2], n[2:]), *max(n[:2], n[2:]))
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
LINKS = st.builds(
    Link,
    run=TEXTS,
    beside=st.none() | TEXTS,
    site=TEXTS,
    select=st.none() | TEXTS,
    quantity=st.none() | TEXTS,
    statistic=st.none() | st.sampled_from(STATISTICS),
    order=st.none() | st.sampled_from(ORDERS),
    steps=st.none() | STEPS,
    units=st.none() | st.tuples(NUMBERS, NUMBERS),
    mark=st.none() | STEPS,
    on=st.none() | st.tuples(st.integers(-99, 99).map(lambda n: n / 100), st.booleans()),
    around=st.none() | st.tuples(NUMBERS, NUMBERS),
    chosen=st.none() | st.lists(NUMBERS, max_size=4).map(tuple),
    least=st.none() | NUMBERS,
    follow=st.none() | st.booleans(),
    search=st.none() | st.booleans(),
)


@given(LINKS)
def test_a_link_is_read_as_it_was_written(link: Link) -> None:
    arguments = dict(parse_qsl(link.query(), keep_blank_values=True, strict_parsing=True))
    assert parse_link(arguments) == (link, [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "3-9", "link: steps: expected numbers such as 3.5-3.9; found '3-9'"),
        ("mark", "3.9-3.5", "link: mark: expected steps in time order; found '3.9-3.5'"),
        ("on", "0.5", "link: on: expected >0.5 or <0.5; found '0.5'"),
        ("on", ">nan", "link: on: expected >0.5 or <0.5; found '>nan'"),
        ("units", "-1-3", "link: units: expected numbers such as 0-64; found '-1-3'"),
        ("units", "\u0661-\u0663", "link: units: expected numbers such as 0-64"),
        ("statistic", "sum", "link: statistic: expected one of mean, min, max; found 'sum'"),
        ("chosen", "1,x", "link: chosen: expected numbers such as 3; found 'x'"),
        ("follow", "yes", "link: follow: expected one of 0, 1; found 'yes'"),
        ("site", "x" * 501, "link: site: expected at most 500 characters"),
    ],
)
def test_wrong_parts_are_named_and_ignored(name: str, text: str, message: str) -> None:
    link, problems = parse_link({"run": "run.h5", name: text, "unknown": "x"})
    assert link == Link(run="run.h5")
    assert len(problems) == 1
    assert problems[0].startswith(message)
