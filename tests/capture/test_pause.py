"""`Tracer.pause` and `Tracer.resume`: what is recorded, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from tests.capture.models import EncoderDecoder


@pytest.fixture
def model() -> EncoderDecoder:
    torch.manual_seed(1)
    return EncoderDecoder(layers=2)


@pytest.mark.parametrize("to_file", [False, True])
def test_calls_between_pause_and_resume_are_left_out(model, to_file: bool, tmp_path: Path) -> None:
    model.eval()
    inputs = [torch.randn(2, 3, 5) for _ in range(6)]
    path = tmp_path / "run.h5" if to_file else None
    with grutrace.Tracer(model, path, recording=False) as tracer, grutrace.trace(model) as full:
        for number, batch in enumerate(inputs):
            if number % 2:
                tracer.pause()
                assert not tracer.is_recording
            else:
                tracer.resume(f"batch {number}")
                assert tracer.is_recording
            model(batch)
    calls = full.calls["module"].size // 6
    assert tracer.calls["tag"].tolist() == [
        tag for tag in ("batch 0", "batch 2", "batch 4") for _ in range(calls)
    ]
    for site in ("encoder.l0", "encoder.l1"):
        rows = np.asarray(full[site].update).reshape(6, 6, -1)[::2].reshape(18, -1)
        np.testing.assert_array_equal(tracer[site].update, rows)


def test_weights_that_change_during_a_pause_are_told_apart(model) -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2))
        trace.pause()
        with torch.no_grad():
            layer.weight_hh_l0 += 1
        trace.resume()
        layer(torch.randn(5, 2))
    assert trace.calls["weights"].tolist() == [0, 1]
    assert trace["l0"].residual < 1e-6


def test_start_and_a_recording_block_end_a_pause() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        trace.pause()
        with trace.recording("block"):
            layer(torch.randn(5, 2))
        trace.pause()
        trace.start("started")
        layer(torch.randn(5, 2))
        trace.pause()
        layer(torch.randn(5, 2))
    assert trace.calls["tag"].tolist() == ["block", "started"]


def test_resume_after_stop_starts_again() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        trace.pause()
        trace.stop()
        layer(torch.randn(5, 2))
        trace.resume("again")
        layer(torch.randn(5, 2))
    assert trace.calls["tag"].tolist() == ["again"]
    with pytest.raises(grutrace.StateError, match="closed"):
        trace.resume()


def test_every_counts_recorded_time_only() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer, every=2) as trace:
        layer(torch.randn(1, 2))
        trace.pause()
        layer(torch.randn(2, 2))
        trace.resume()
        layer(torch.randn(3, 2))
        layer(torch.randn(4, 2))
    assert trace.calls["steps"].tolist() == [1, 4]


def test_a_tag_of_another_type() -> None:
    layer = nn.GRU(2, 3)
    with grutrace.trace(layer) as trace:
        layer(torch.randn(5, 2))
        with pytest.raises(grutrace.OptionError, match="tag"):
            trace.resume(3)  # type: ignore[arg-type]
