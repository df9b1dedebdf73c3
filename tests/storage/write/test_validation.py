"""Invalid records are refused with a message that says what was expected, by both sinks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from grutrace.errors import SinkError
from grutrace.records import AnnotationRecord, Fork, SiteRows, WeightsRecord
from grutrace.storage.memory import MemorySink
from grutrace.storage.read.trace import Trace
from grutrace.storage.write.writer import Writer
from tests.storage.oracle import check_trace
from tests.storage.streams import QUANTITIES, Stream, make_header, make_module

HEADER = make_header(
    make_module("a", record=QUANTITIES), make_module("b", directions=(False, True), bias=False)
)


def sound_stream():
    stream = Stream(HEADER)
    stream.call([2, 1])
    stream.call([1, 1], module=1)
    return stream


def block(**changes):
    """The third call of a sound stream, spoilt."""
    stream = sound_stream()
    return dataclasses.replace(stream.call([1, 2], go_on=[1, None]), **changes)


def site(**changes):
    sound = block().sites["l0"]
    rows = {**sound.rows, **changes.pop("rows", {})}
    return {"l0": dataclasses.replace(sound, rows=rows, **changes)}


def second_weights(**changes):
    stream = sound_stream()
    return dataclasses.replace(stream.weights(), **changes)


def reverse_goes_on():
    stream = sound_stream()
    return stream.call([1], module=1, go_on=[0])


SPOILT = {
    "module": (lambda: block(module=2), r"module below 2, found 2"),
    "weights": (lambda: block(weights=1), "a version of the weights below 1, found 1"),
    "shape of steps": (lambda: block(steps=np.ones((2, 1), np.uint32)), r"shape \(B,\)"),
    "fewer steps": (lambda: block(steps=np.ones(1, np.uint32)), r"shape \(B,\)"),
    "more rows": (
        lambda: block(steps=np.array([1, 3], np.uint32)),
        r"l0\.reset.*\(4, 3\).*\(3, 3\)",
    ),
    "a number left out": (
        lambda: block(sequences=np.array([1, 3], np.uint64)),
        "2 as the next new sequence, found 3",
    ),
    "a sequence twice": (
        lambda: block(sequences=np.array([1, 1], np.uint64)),
        "each sequence once",
    ),
    "no site": (lambda: block(sites={}), "site 'l0'"),
    "no quantity": (
        lambda: block(sites={"l0": SiteRows({}, np.zeros((1, 3), "f4"), 0, 0, 1)}),
        "reset",
    ),
    "width": (lambda: block(sites=site(rows={"input": np.zeros((3, 3), "f4")})), r"l0\.input"),
    "type": (lambda: block(sites=site(rows={"hidden": np.zeros((3, 3))})), "float32.*float64"),
    "initial": (lambda: block(sites=site(initial=np.zeros((2, 3), "f4"))), r"initial.*\(1, 3\)"),
    "fork of itself": (lambda: block(forks=(Fork(2, 2, 1),)), "fork"),
    "fork of an old one": (lambda: block(forks=(Fork(1, 0, 1),)), "fork"),
    "reverse goes on": (reverse_goes_on, "reverse direction"),
    "version": (lambda: second_weights(version=2), "version 1, found 2"),
    "weights' site": (lambda: second_weights(sites={}), "site 'l0'"),
    "weights' shape": (
        lambda: second_weights(sites={"l0": {"weight_ih": np.zeros((9, 3), "f4")}}),
        "weight_ih",
    ),
    "annotation of nothing": (
        lambda: AnnotationRecord(0, 2, "x", 0, (1.0,)),
        "a sequence below 2, found 2",
    ),
    "annotation before": (lambda: AnnotationRecord(0, 0, "x", -1, (1.0,)), "at least 0, found -1"),
    "mixed annotation": (
        lambda: AnnotationRecord(0, 0, "x", 0, (1.0, "a")),
        "either strings or numbers only",
    ),
}


class WriterSink(Writer):
    append = Writer.write


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("what", SPOILT)
def test_invalid_records_are_refused_and_not_stored(kind, what, tmp_path):
    make, message = SPOILT[what]
    sink = MemorySink(HEADER) if kind == "memory" else WriterSink(tmp_path / "run.h5", HEADER)
    stream = sound_stream()
    for record in stream.records:
        sink.append(record)
    with pytest.raises(SinkError, match=message):
        sink.append(make())
    sink.append(block())
    sink.append(second_weights())
    sink.close()
    if kind == "memory":
        check_trace(Trace(sink), HEADER, [*stream.records, block(), second_weights()])


def test_control_valid_records_are_accepted():
    sink = MemorySink(HEADER)
    for record in [*sound_stream().records, block(), second_weights()]:
        sink.append(record)
    assert isinstance(second_weights(), WeightsRecord)
