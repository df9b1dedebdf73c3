"""Traces to draw: in memory and in a file, with tokens and labels."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from matplotlib import pyplot

import grutrace

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def record(path=None, **options):
    """A trace of one layer of 7 units with 5 sequences of 6 steps."""
    torch.manual_seed(1)
    layer = torch.nn.GRU(3, 7, batch_first=True)
    with grutrace.trace(layer, path, **options) as trace:
        tokens = [[f"t{(row + step) % 3}" for step in range(6)] for row in range(5)]
        labels = {"late": [["no", "no", "no", "yes", "yes", "yes"]] * 5}
        with trace.recording(tokens=tokens, labels=labels), torch.no_grad():
            layer(torch.randn(5, 6, 3))
    return trace


@pytest.fixture(params=["memory", "file", "deferred"])
def trace(request, tmp_path):
    """The same trace in memory, in a file, and in a file with gates that are computed when read."""
    record_input = ("reset", "update", "candidate", "hidden", "input")
    if request.param == "memory":
        yield record(record=record_input)
        return
    gates = "deferred" if request.param == "deferred" else "inline"
    record(tmp_path / "run.h5", record=record_input, gates=gates)
    with grutrace.open(tmp_path / "run.h5") as opened:
        yield opened
