"""Tests of the warnings of a tracer: modules without calls, and a trace that grows large."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grutrace
from grutrace.capture import model_recorder
from grutrace.errors import GrutraceWarning


def test_a_module_that_was_never_called_is_reported(model, batch) -> None:
    with (
        pytest.warns(grutrace.GrutraceWarning, match="nothing was recorded of decoder: no call"),
        grutrace.trace(model),
    ):
        model.encoder(batch)


def test_a_subclass_that_never_calls_the_kernel_is_reported() -> None:
    class NormedCell(nn.GRUCell):
        def forward(self, x, h):
            return torch.tanh(nn.functional.linear(x, self.weight_ih)[:, :4] + h)

    model = nn.ModuleDict({"cell": NormedCell(3, 4), "gru": nn.GRU(3, 4)})
    trace = grutrace.trace(model)
    trace.start()
    model["gru"](torch.randn(5, 2, 3))
    model["cell"](torch.randn(2, 3), torch.zeros(2, 4))
    with pytest.warns(grutrace.GrutraceWarning, match=r"of cell.*without the kernel"):
        trace.close()


@pytest.mark.parametrize("gates", ["inline", "background"])
def test_a_large_trace_in_memory_warns_once(gates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.GRU(4, 8)
    batch = torch.randn(50, 4, 4)
    monkeypatch.setattr(model_recorder, "LARGE_TRACE_BYTES", 3 * 50 * 4 * 8 * 4 * 4)
    with grutrace.trace(layer, gates=gates) as trace:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(batch)
            assert trace["l0"].update.shape == (200, 8)
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            for _ in range(6):
                layer(batch)
                assert trace["l0"].update.shape[1] == 8
    assert [message.category for message in messages] == [GrutraceWarning]
    message = str(messages[0].message)
    assert "2 GiB" in message
    ways = ("path", "gates='deferred'", "units", "every", "max_bytes", "Statistics", "clear()")
    assert all(way in message for way in ways)
    assert trace.nbytes > model_recorder.LARGE_TRACE_BYTES


def test_a_large_file_does_not_warn(monkeypatch, tmp_path: Path) -> None:
    layer = nn.GRU(4, 8)
    monkeypatch.setattr(model_recorder, "LARGE_TRACE_BYTES", 100)
    with grutrace.trace(layer, tmp_path / "run.h5") as trace:
        layer(torch.randn(50, 4, 4))
        assert trace.nbytes == 0
