"""Runs that trace without end and print what was acknowledged, to be killed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import grutrace
from grutrace.capture import selection
from tests.capture.models import EncoderDecoder, StepwiseDecoder
from tests.checks import EVERYTHING

#: Kinds of recordings: three kinds of gates, a decoder with one call per token, statistics.
KINDS = ("inline", "background", "deferred", "stepwise", "statistics")

#: Calls of a decoder in one run of its model.
TOKENS = 40


def make(kind: str) -> tuple[nn.Module, Callable[[], torch.Tensor], int]:
    """Return a model, a function that runs it once, and the number of GRU calls in a run."""
    if kind == "stepwise":
        decoder = StepwiseDecoder(layers=2)

        def decode() -> torch.Tensor:
            with torch.no_grad():
                return decoder(torch.randn(1, 8, 4), torch.randn(2, 8, 6), TOKENS)

        return decoder, decode, TOKENS
    model = EncoderDecoder(layers=2, dropout=0.3)
    return model, lambda: model(torch.randn(8, 12, 5), steps=6), 7


def warm_up() -> None:
    """Load and compile everything that the first run needs, before the forks."""
    torch.set_num_threads(1)
    for kind in KINDS:
        model, run, _ = make(kind)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        gates = "deferred" if kind == "deferred" else "inline"
        with grutrace.trace(model, record=EVERYTHING, gates=gates):
            result = run()
        if result.requires_grad:
            result.sum().backward()
            optimizer.step()


@contextlib.contextmanager
def tracing(
    kind: str, model: nn.Module, path: Path, *, fsync: bool = False, **options: object
) -> Iterator[grutrace.Tracer]:
    """Trace a model to a path, as this kind of recording."""
    if kind == "statistics":
        sink = grutrace.Statistics(path, save_seconds=0.02, fsync=fsync)
        tracer = grutrace.Tracer(model, sink=sink, record=EVERYTHING, **options)
    else:
        gates = "background" if kind == "stepwise" else kind
        # Otherwise its thread computes gates for a device only.
        selection.BACKGROUND_ON_CPU = True
        tracer = grutrace.Tracer(
            model, path, gates=gates, record=EVERYTHING, fsync=fsync, **options
        )
    with tracer:
        yield tracer


def run_for_ever(
    kind: str,
    path: Path,
    acknowledge: Callable[[int], None],
    seed: int,
    *,
    fsync: bool = False,
    runs: int | None = None,
) -> None:
    """Trace, train and flush at times, and print the number of flushed calls."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, run, calls_a_run = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    calls = 0
    with tracing(kind, model, path, fsync=fsync) as tracer:
        while runs is None or calls < runs * calls_a_run:
            result = run()
            calls += calls_a_run
            if result.requires_grad and rng.random() < 0.3:
                result.square().mean().backward()
                optimizer.step()
            if rng.random() < 0.3:
                tracer.flush()
                acknowledge(calls)
