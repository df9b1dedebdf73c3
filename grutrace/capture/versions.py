"""Telling one version of a module's weights from the next."""

from __future__ import annotations

import torch
from torch import Tensor

#: How many elements of each weight are looked at to find a change that the version counter missed.
_SAMPLES = 16


class WeightVersions:
    """Counts the versions of one module's weights.

    A change is found by a tensor's address and version counter. Two kinds of change escape the
    counter: tensors made under inference_mode have none, and writing through ``.data`` (as some
    optimizers and averaging schemes do) leaves it alone. So the former are compared whole, and of
    the others a few elements.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[Tensor] = []
        self._marks: list[tuple[int, int]] | None = None
        # A few elements of each weight: as they were, and as they are now (views).
        self._samples: list[tuple[Tensor, Tensor]] = []

    def changed(self, weights: list[Tensor]) -> list[Tensor] | None:
        """Return copies of the weights if they are a new version, else None.

        Afterwards ``count - 1`` is the number of the present version.
        """
        marks = _marks(weights)
        if marks is not None and marks == self._marks and self._same_samples():
            return None
        self._marks = marks
        views = [_sample(weight) for weight in weights]
        self._samples = [(view.clone(), view) for view in views]
        if self._kept and all(map(_same, self._kept, weights)):
            return None
        self._kept = [weight.detach().clone() for weight in weights]
        self.count += 1
        return self._kept

    def _same_samples(self) -> bool:
        return all(torch.equal(kept, now) for kept, now in self._samples)


def _marks(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    if any(weight.is_inference() for weight in weights):
        return None
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _same(kept: Tensor, weight: Tensor) -> bool:
    return kept.dtype == weight.dtype and kept.device == weight.device and torch.equal(kept, weight)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]
