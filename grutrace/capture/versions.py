"""Telling one version of a module's weights from the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grutrace.gru.kernel import CellWeights

#: How many elements of each weight are looked at to find a change that the version counter missed.
_SAMPLES = 16


@dataclass(frozen=True)
class Seen:
    """What weights looked like: enough to tell whether they have changed, without a copy of all.

    A change is found by a tensor's address and version counter. Two kinds of change escape the
    counter: tensors made under inference_mode have none, so they are never the same; and writing
    through ``.data`` (as some optimizers and averaging schemes do) leaves it alone, so a few
    elements of each weight are compared.
    """

    marks: list[tuple[int, int]] | None
    #: A few elements of each weight: as they were, and as they are now (views).
    samples: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, weights: list[Tensor]) -> Seen:
        """Look at weights."""
        views = [_sample(weight) for weight in weights]
        return cls(_marks(weights), [(view.clone(), view) for view in views])

    def is_still(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        return (
            self.marks is not None
            and self.marks == _marks(weights)
            and all(torch.equal(kept, now) for kept, now in self.samples)
        )


class WeightVersions:
    """Counts the versions of one module's weights.

    They are told as by `Seen`, and those of which it cannot tell are compared whole.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[Tensor] = []
        self._seen: Seen | None = None

    def changed(self, weights: list[Tensor]) -> list[Tensor] | None:
        """Return copies of the weights if they are a new version, else None.

        Afterwards ``count - 1`` is the number of the present version.
        """
        if self._seen is not None and self._seen.is_still(weights):
            return None
        self._seen = Seen.of(weights)
        if self._kept and all(map(_same, self._kept, weights)):
            return None
        self._kept = [weight.detach().clone() for weight in weights]
        self.count += 1
        return self._kept


class KeptRows:
    """Some rows of weights, taken anew only where the weights have changed."""

    def __init__(self, take: Callable[[CellWeights], CellWeights]) -> None:
        self._take = take
        # In one, so that another thread never sees rows of other weights.
        self._latest: tuple[Seen, CellWeights] | None = None

    def of(self, weights: CellWeights) -> CellWeights:
        """Return the rows of these weights."""
        present = [each for each in weights if each is not None]
        latest = self._latest
        if latest is None or not latest[0].is_still(present):
            latest = Seen.of(present), self._take(weights)
            self._latest = latest
        return latest[1]


def _marks(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    if any(weight.is_inference() for weight in weights):
        return None
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _same(kept: Tensor, weight: Tensor) -> bool:
    return kept.dtype == weight.dtype and kept.device == weight.device and torch.equal(kept, weight)


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)]
