"""The cost of recording gradients in training, relative to a deferred trace.

A deferred trace of hidden states and inputs stores two quantities of the same width here. A trace
with gradients stores a third one. So it may cost half as much again, of what the deferred trace
costs beyond the untraced run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import grutrace
from benchmarks.figures import Figure, Target, measured
from benchmarks.pairs import ratio

#: T, B, H; the input is as wide as the state.
SHAPES = ((128, 32, 256), (64, 1, 128), (50, 16, 64), (512, 8, 256))


def figures() -> Iterator[Figure]:
    """Yield all figures."""
    for steps, batch, size in SHAPES:
        torch.manual_seed(0)
        run = partial(train, nn.GRU(size, size), torch.randn(steps, batch, size))
        name = f"T{steps} B{batch} I{size} H{size}"
        with tempfile.TemporaryDirectory() as folder:
            two = _trace(run, Path(folder, "deferred.h5"), ("hidden", "input"))
            three = _trace(run, Path(folder, "gradient.h5"), ("hidden", "gradient"))
            with two, three:
                deferred, gradient = _recorded(two, run), _recorded(three, run)
                of_two = ratio(run, deferred, limit=1.0, settle=two.flush)
                yield measured(f"deferred, {name}, over the untraced training step", of_two)
                flush = _both(two.flush, three.flush)
                more = ratio(deferred, gradient, limit=1.0, settle=flush)
                target = Target(1 + (of_two.median - 1) / of_two.median / 2)
                yield measured(f"with gradients, {name}, over the deferred trace", more, target)


def train(layer: nn.GRU, x: Tensor) -> None:
    """Run forward and backward."""
    layer.zero_grad()
    output, final = layer(x)
    (output.square().mean() + final.square().mean()).backward()


def _trace(run: partial[None], path: Path, record: tuple[str, ...]) -> grutrace.Tracer:
    return grutrace.trace(run.args[0], path, record=record, recording=False, gates="deferred")


def _recorded(trace: grutrace.Tracer, run: Callable[[], None]) -> Callable[[], None]:
    def recorded() -> None:
        with trace.recording():
            run()

    return recorded


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run
