"""Telling one version of a module's weights from the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grutrace.gru.kernel import CellWeights

#: How many elements of each weight are looked at to find a change that the version counter missed.
_SAMPLES = 16


class Seen(NamedTuple):
    """What weights looked like: enough to tell whether they have changed, without a copy of all.

    A change is found by a tensor's address and version counter. Two kinds of change escape the
    counter: tensors made under inference_mode have none, so they are never the same; and writing
    through ``.data`` (as some optimizers and averaging schemes do) leaves it alone, so a few
    elements of each weight are compared.

    Attributes:
        marks: Address and version counter of each weight; None where one has no counter.
        samples: What reads a few elements of each weight, and what it read.
    """

    marks: list[tuple[int, int]] | None
    samples: list[tuple[Callable[[], bytes], bytes]]

    @classmethod
    def of(cls, weights: list[Tensor]) -> Seen:
        """Look at weights."""
        return cls(_marks(weights), [(now, now()) for now in map(_sample, weights)])

    def is_still(self, weights: list[Tensor]) -> bool:
        """Whether these are the same weights, unchanged."""
        return (
            self.marks is not None
            and self.marks == _marks(weights)
            and all(now() == then for now, then in self.samples)
        )


class _State(NamedTuple):
    """How many versions there were, copies of the present one, and what it looked like."""

    versions: int = 0
    kept: list[Tensor] = []
    seen: Seen | None = None


class WeightVersions:
    """Counts the versions of one module's weights.

    They are told as by `Seen`, and those of which it cannot tell are compared whole.

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
        count, kept, seen = self.state
        if seen is not None and seen.is_still(weights):
            return None
        seen = Seen.of(weights)
        if kept and all(map(_same, kept, weights)):
            self.state = _State(count, kept, seen)
            return None
        copies = [weight.detach().clone() for weight in weights]
        self.state = _State(count + 1, copies, seen)
        return copies


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


def _sample(weight: Tensor) -> Callable[[], bytes]:
    """Return what reads a few elements of a weight, whenever it is called."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // _SAMPLES)].unsqueeze(-1).view(torch.uint8)
    # A view of the weight's own memory, which NumPy reads in a fifth of the time.
    return few.numpy().tobytes if few.device.type == "cpu" else lambda: few.cpu().numpy().tobytes()
