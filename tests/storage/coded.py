"""Rows whose values encode their call and row, and a program that streams them without end.

``python -m tests.storage.coded PATH SHAPE [COMPRESSION]`` prints, after each flush, how many calls
count.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace

import numpy as np

from grutrace.records import DEFAULT_RECORD, CallRecord, SiteRows, WeightsRecord
from grutrace.storage.write.file_sink import FileSink
from tests.storage.streams import make_header, make_module

HIDDEN = 32

#: Rows in the batch, steps of each, and whether sequences continue from call to call.
SHAPES = {"big": (16, 64, False), "stepwise": (8, 1, True), "small": (2, 3, False)}

#: The pause of a program that streams without end between two calls, so that it does not fill the
#: disk. Seconds.
PAUSES = {"big": 0.01, "stepwise": 0.0005, "small": 0.0005}

HEADER = make_header(make_module(hidden=HIDDEN, width=1, dtype="float64"))


def header(compression=None):
    return replace(HEADER, options={"compression": compression} if compression else {})


def rows(call, count):
    """(count, HIDDEN), all numbers distinct, also between calls."""
    numbers = np.arange(count * HIDDEN, dtype=np.float64)
    return (call * 1e7 + numbers).reshape(count, HIDDEN)


def block(call, shape):
    batch, steps, goes_on = SHAPES[shape]
    begins = not goes_on or call == 0
    first = 0 if goes_on else call * batch
    values = rows(call, batch * steps)
    quantities = {name: values + index for index, name in enumerate(DEFAULT_RECORD)}
    initial = rows(call, batch if begins else 0)
    return CallRecord(
        module=0,
        time=float(call),
        tag=f"tag {call // 100}",
        training=False,
        weights=0,
        steps=np.full(batch, steps, np.uint32),
        sequences=np.arange(first, first + batch, dtype=np.uint64),
        sites={"l0": SiteRows(quantities, initial, float(call), 0.5, 2.0**-23)},
    )


def weights():
    sites = {"l0": {"weight_ih": (3 * HIDDEN, 1), "weight_hh": (3 * HIDDEN, HIDDEN)}}
    for name in ("bias_ih", "bias_hh"):
        sites["l0"][name] = (3 * HIDDEN,)
    return WeightsRecord(
        0, 0, {"l0": {name: np.ones(shape, "f4") for name, shape in sites["l0"].items()}}
    )


def write(path, shape, calls=None, flush_every=3, report=lambda _: None, compression=None):
    sink = FileSink(path, header(compression))
    report(0)
    sink.append(weights())
    for call in itertools.count() if calls is None else range(calls):
        sink.append(block(call, shape))
        if (call + 1) % flush_every == 0:
            sink.flush()
            report(call + 1)
        if calls is None:
            time.sleep(PAUSES[shape])
    sink.close()


def check_trace(trace):
    """Check every number of a trace against the written one; return the number of calls."""
    calls = trace.calls
    if not len(calls):
        return 0
    counts = calls["steps"].tolist()
    values = np.concatenate([rows(call, count) for call, count in enumerate(counts)])
    site = trace["rnn.l0"]
    for index, name in enumerate(DEFAULT_RECORD):
        assert np.array_equal(site.rows(name), values + index)
    assert calls["time"].tolist() == list(range(len(calls)))
    assert calls["tag"].tolist() == [f"tag {call // 100}" for call in range(len(calls))]
    assert np.array_equal(calls["residual"], np.arange(len(calls), dtype=np.float32))
    batch = int(calls["batch"][0])
    begun = [rows(call, batch) for call in range(max(1, len(site) // batch))]
    assert np.array_equal(site.initial, np.concatenate(begun))
    assert int(site.lengths.sum()) == len(values)
    pieces = trace.snapshot.tables.pieces[0]
    numbers = np.arange(len(pieces)) % (batch if len(site) == batch else len(pieces))
    assert np.array_equal(pieces["sequence"], numbers)
    assert site.weights(0)["bias_hh"].all()
    return len(calls)


def check_plain(plain):
    site = plain.modules[0].sites["l0"]
    if len(plain.calls):
        counts = [0] * len(plain.calls)
        for pieces in plain.modules[0].pieces.values():
            for call, _, _, steps in pieces:
                counts[call] += steps
        values = np.concatenate([rows(call, count) for call, count in enumerate(counts)])
        for index, name in enumerate(DEFAULT_RECORD):
            assert np.array_equal(site.rows[name], values + index)
        assert plain.calls["time"].tolist() == list(range(len(counts)))
        tags = [f"tag {call // 100}" for call in range(len(counts))]
        assert [plain.tag(call) for call in plain.calls] == tags


if __name__ == "__main__":
    write(
        *sys.argv[1:3],
        report=lambda count: print(count, flush=True),
        compression=sys.argv[3] if len(sys.argv) > 3 else None,
    )
