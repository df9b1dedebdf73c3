"""Telling one version of a module's weights from the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: How many elements of each weight are looked at to find a change that the version counter missed.
_SAMPLES = 16


class _State(NamedTuple):
    """What is known of one module's weights.

    Attributes:
        versions: How many so far.
        kept: Copies of the present one.
        marks: Address and version counter of each weight; None where one has no counter.
        samples: What reads a few elements of each weight, and what it read.
    """

    versions: int = 0
    kept: list[Tensor] = []
    marks: list[tuple[int, int]] | None = None
    samples: list[tuple[Callable[[], bytes], bytes]] = []


class WeightVersions:
    """Counts the versions of one module's weights.

    A change is found by a tensor's address and version counter. Two kinds of change escape the
    counter: tensors made under inference_mode have none, and writing through ``.data`` (as some
    optimizers and averaging schemes do) leaves it alone. So the former are compared whole, and of
    the others a few elements.

    Attributes:
        state: What it knows, which never changes itself: who sets it back has undone a call.
    """

    def __init__(self) -> None:
        self.state = _State()

    @property
    def count(self) -> int:
        """Versions so far; one less is the number of the present one."""
        return self.state.versions

    def changed(self, weights: list[Tensor]) -> list[Tensor] | None:
        """Return copies of the weights if they are a new version, else None."""
        count, kept, known, samples = self.state
        marks = _marks(weights)
        if marks is not None and marks == known and all(now() == then for now, then in samples):
            return None
        samples = [(now, now()) for now in map(_sample, weights)]
        if kept and all(map(_same, kept, weights)):
            self.state = _State(count, kept, marks, samples)
            return None
        copies = [weight.detach().clone() for weight in weights]
        self.state = _State(count + 1, copies, marks, samples)
        return copies


def _marks(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    if any(weight.is_inference() for weight in weights):
        return None
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _same(kept: Tensor, weight: Tensor) -> bool:
    return kept.dtype == weight.dtype and kept.device == weight.device and torch.equal(kept, weight)


def _sample(weight: Tensor) -> Callable[[], bytes]:
    """Return what reads a few elements of a weight, whenever it is called."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // _SAMPLES)].unsqueeze(-1).view(torch.uint8)
    # A view of the weight's own memory, which NumPy reads in a fifth of the time.
    return few.numpy().tobytes if few.device.type == "cpu" else lambda: few.cpu().numpy().tobytes()
