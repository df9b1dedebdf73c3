"""Traces of one run that an analysis must treat alike: memory or file, inline or deferred."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import grutrace
from tests.capture.models import StepwiseDecoder
from tests.checks import EVERYTHING


class Everything(nn.Module):
    """A bidirectional stack, and a decoder whose sequences have rows that are not adjacent."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(3, 5, 2, bidirectional=True, batch_first=True)
        self.decoder = StepwiseDecoder()

    def forward(self, batch: Any, steps: int) -> None:
        self.encoder(batch)
        self.decoder(torch.randn(1, batch.shape[0], 4), torch.randn(2, batch.shape[0], 6), steps)


def run(tracer_of: Callable[[nn.Module], Any]) -> Any:
    """Trace a model whose weights change between its calls; return the trace."""
    torch.manual_seed(7)
    model = Everything()
    with tracer_of(model) as trace:
        for steps in (3, 9):
            # One label changes along each sequence, one is the same all along it.
            labels = {
                "word": [[f"w{(row + step) % 3}" for step in range(steps)] for row in range(4)],
                "speaker": ["ann", "bob", "bob", "ann"],
            }
            with trace.recording(labels=labels):
                model(torch.randn(4, steps, 3), steps)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.7)
        model(torch.randn(1, 40, 3), 5)
    return trace


def in_memory() -> Any:
    """A trace in memory."""
    return run(lambda model: grutrace.trace(model, record=EVERYTHING))


def in_a_file(path: Path, gates: Any = "inline") -> grutrace.Trace:
    """The same in a file; the caller closes it."""
    run(lambda model: grutrace.trace(model, path, record=EVERYTHING, gates=gates))
    return grutrace.open(path)
