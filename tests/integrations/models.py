"""A small model, a log that keeps what it gets, and the same figures from rows with NumPy."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grutrace.capture.kernel_calls import subscription
from grutrace.integrations import Figures
from tests.packages.needs import REQUIRED

QUANTITIES = ("reset", "update", "candidate", "hidden")


class Tagger(nn.Module):
    """A GRU inside a model, with a loss, as Hugging Face's Trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)
        self.out = nn.Linear(5, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.out(self.rnn(x)[0])
        loss = (scores - labels).square().mean() if labels is not None else scores.sum()
        return {"loss": loss, "logits": scores}


class KeptLog:
    """A log in memory."""

    def __init__(self) -> None:
        self.figures: list[Figures] = []
        self.closed = 0

    def write(self, figures: Figures) -> None:
        assert not self.closed
        self.figures.append(figures)

    def close(self) -> None:
        self.closed += 1

    def steps(self, tag: str) -> list[int]:
        return [figures.step for figures in self.figures if figures.tag == tag]


def assert_figures_of_rows(figures: Figures, prefix: str, rows: dict[str, np.ndarray]) -> None:
    """Compare logged figures with those of rows, (N, H) by quantity, in float64."""
    for quantity, values in rows.items():
        name, low, high = f"{prefix}/{quantity}", values < 0.1, values > 0.9
        finite = values[np.isfinite(values)].astype(np.float64)
        assert figures.scalars[f"{name}/nan"] == np.isnan(values).sum()
        assert figures.scalars[f"{name}/infinite"] == np.isinf(values).sum()
        if quantity in ("candidate", "hidden"):
            low, high = np.abs(values) < 0.1, np.abs(values) > 0.9
        expected = {
            "mean": finite.mean(),
            "std": finite.std(),
            "below": low.sum() / finite.size,
            "above": high.sum() / finite.size,
        }
        for figure, value in expected.items():
            # Sums of so few float64 numbers: some hundred ulps.
            assert figures.scalars[f"{name}/{figure}"] == pytest.approx(value, rel=1e-13, abs=1e-15)
        histogram = figures.histograms[name]
        assert histogram.counts.tolist() == np.histogram(finite, histogram.edges)[0].tolist()
        assert histogram.counts.sum() == finite.size
        assert (histogram.minimum, histogram.maximum) == (finite.min(), finite.max())
        assert histogram.total == pytest.approx(finite.sum(), rel=1e-12)
        assert histogram.squares == pytest.approx(np.square(finite).sum(), rel=1e-12)


def needs(name: str) -> ModuleType:
    """Import a library of the extra `integrations`, or skip the test module that asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get(REQUIRED):
            return importlib.import_module(name)
        reason = f"{name} is not installed: pip install -e '.[test,integrations]'"
        return pytest.importorskip(name, reason=reason)


def batches(number: int, seed: int = 0) -> list[Tensor]:
    """(4, 6, 3) inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 6, 3, generator=generator) for _ in range(number)]


def own_leaks() -> list[str]:
    """What grutrace has left behind. Libraries that log keep threads and files of their own."""
    threads = [thread.name for thread in threading.enumerate() if "grutrace" in thread.name]
    return [*threads, *(["overridden kernels"] if subscription.is_observing() else [])]
