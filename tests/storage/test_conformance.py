"""A stream of records goes to memory and to a file, and everything read back is compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grutrace.storage.open import open_sink, open_source, open_trace
from grutrace.storage.read.trace import Trace
from tests.storage.oracle import check_trace
from tests.storage.streams import batches, drawn_streams, full_stream

KINDS = ("memory", "file")


def path_for(kind, folder):
    return None if kind == "memory" else folder / "run.h5"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 3, 20])
def test_everything_is_read_back(kind, parts, tmp_path):
    stream = full_stream()
    sink = open_sink(path_for(kind, tmp_path), stream.header)
    with Trace(open_source(sink)) as live:
        seen = []
        for part in batches(stream.records, parts):
            for record in part:
                sink.append(record)
            seen += part
            check_trace(live, stream.header, seen)
            sink.flush()
        sink.close()
        check_trace(live, stream.header, seen)
    if kind == "file":
        with open_trace(tmp_path / "run.h5") as trace:
            check_trace(trace, stream.header, seen)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=drawn_streams(), parts=st.integers(1, 4))
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_streams_are_read_back(kind, stream, parts, tmp_path_factory):
    path = path_for(kind, tmp_path_factory.mktemp("drawn"))
    sink = open_sink(path, stream.header)
    for part in batches(stream.records, parts):
        for record in part:
            sink.append(record)
        sink.flush()
    with Trace(open_source(sink)) as live:
        check_trace(live, stream.header, stream.records)
        sink.close()
        check_trace(live, stream.header, stream.records)
    if path:
        with open_trace(path) as trace:
            check_trace(trace, stream.header, stream.records)


def _shift_rows(record):
    sites = {
        suffix: dataclasses.replace(
            site, rows={name: np.roll(rows, 1, axis=0) for name, rows in site.rows.items()}
        )
        for suffix, site in record.sites.items()
    }
    return dataclasses.replace(record, sites=sites)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spoil",
    [
        _shift_rows,
        lambda block: dataclasses.replace(block, tag="other"),
        lambda block: dataclasses.replace(block, steps=block.steps[::-1]),
        lambda block: dataclasses.replace(block, training=not block.training),
    ],
)
def test_control_the_comparison_detects_a_difference(kind, spoil, tmp_path):
    stream = full_stream()
    sink = open_sink(path_for(kind, tmp_path), stream.header)
    for index, record in enumerate(stream.records):
        sink.append(spoil(record) if index == 1 else record)
    with Trace(open_source(sink)) as live, pytest.raises(AssertionError):
        check_trace(live, stream.header, stream.records)
    sink.close()
