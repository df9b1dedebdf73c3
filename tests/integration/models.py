"""A model with every kind of traced layer, and the comparison of its traces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import grutrace
from tests.checks import EVERYTHING


class Mixed(nn.Module):
    """A stack with dropout, a single layer and a cell."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.stack = nn.GRU(3, 4, 2, batch_first=True, dropout=dropout)
        self.layer = nn.GRU(4, 4, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(8, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, batch: Tensor) -> Tensor:
        output, _ = self.layer(self.stack(batch * 2)[0])
        state = self.cell(output[:, 0])
        return self.out(self.cell(output[:, 1], state))


#: The modules of `Mixed` in the order of their calls.
CALLS = ["stack", "layer", "cell", "cell"]


def trace(model: nn.Module, **options: Any) -> grutrace.Tracer:
    return grutrace.trace(model, record=EVERYTHING, check="raise", **options)


def eagerly(model: nn.Module, run: Callable[[], Any], seed: int = 0) -> tuple[Any, grutrace.Trace]:
    """The result of an untraced run, and the trace of the same run."""
    torch.manual_seed(seed)
    expected = run()
    torch.manual_seed(seed)
    with trace(model) as eager:
        run()
    return expected, eager


def assert_same(a: Any, b: Any) -> None:
    """Compare two traces of one computation: exactly, except for the last bits of values.

    The kernel and the replay may differ there from run to run, with the addresses of their tensors.
    """
    assert a.sites == b.sites
    for field in ("module", "weights", "training", "tag"):
        assert a.calls[field].tolist() == b.calls[field].tolist()
    for name in a.sites:
        assert a[name].lengths.tolist() == b[name].lengths.tolist()
        np.testing.assert_allclose(a[name].initial, b[name].initial, rtol=0, atol=1e-6)
        for quantity in EVERYTHING:
            left, right = a[name].rows(quantity), b[name].rows(quantity)
            assert left.size
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-6, err_msg=quantity)


@contextmanager
def words() -> Iterator[list[str]]:
    """Collect grutrace's warnings; other warnings pass."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always", grutrace.GrutraceWarning)
        yield messages
    for warning in recorded:
        if issubclass(warning.category, grutrace.GrutraceWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def about(said: list[str]) -> list[str]:
    """The subject of each warning of a missed call."""
    return [
        message.partition(" was not recorded: ")[0].removeprefix("a call of ") for message in said
    ]
