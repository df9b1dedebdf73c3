"""Detect new versions of a module's weights, however they change.

There are three checks, from the cheapest to the most reliable:

1. The address and the version counter of each weight. Every PyTorch operation on the weight itself
   increments the counter.
2. A sample of elements from each row and each column of every weight. ``weight.data[...] = 0``, a
   write through a NumPy view and an averaged copy that is swapped in do not increment the counter,
   but rarely leave all these elements unchanged.
3. A comparison of every byte with a copy. It is exact, and reads the weights once more.

The first check runs at every call. The third check runs when it is cheap compared with the time
since its last run (see `MAX_COMPARE_FRACTION`), at the first call after a recording begins or a tag
changes, and before records are appended to the sink. The second check runs when the third does not.
A call between two full comparisons is *uncertain*: it gets the version that was current when it
ran. The code that computes its gates then checks whether this version leads to the recorded states.
(See docs/design.md, Versions of the weights.)

The user's tensors do not change. Their memory is read by its address, because a NumPy view would
make a tensor's storage permanently unresizable.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grutrace.capture.recording.tensor_copy import compare
from grutrace.options import WeightChecks

#: Maximum fraction of the elapsed time that comparisons take. In training, most time passes between
#: the calls, in the backward pass and the optimizer.
MAX_COMPARE_FRACTION = 0.05

#: Maximum time that one comparison takes after a pause. Seconds.
MAX_ALLOWANCE_SECONDS = 0.02

#: Cost of checking a sample. If comparing every byte takes no longer, every byte is compared.
#: Seconds.
SAMPLE_SECONDS = 5e-6

#: Number of versions that are kept, to find later the version that a call used.
MAX_VERSIONS = 3

#: Number of elements of each weight that are compared in one call.
SAMPLE_SIZE = 64


class Version(NamedTuple):
    """One version of a module's weights.

    Attributes:
        number: Counted from 0 for each module.
        weights: Copies in a flat list, as the kernel takes them, with the strides of the originals.
    """

    number: int
    weights: list[Tensor]


class _WeightFingerprint:
    """The weights at the last comparison of every byte.

    Args:
        copies: Copies of the weights.
        weights: The weights, which are not kept alive.
    """

    def __init__(self, copies: list[Tensor], weights: list[Tensor]) -> None:
        self._copies = copies
        self._ids = _ids(weights)
        self._sample_index = 0
        self._samples: list[_Sample] | None = None
        self._ranges: list[tuple[int, int, int]] | None = None

    def has_ids_of(self, weights: list[Tensor]) -> bool:
        """Whether these are the same tensors with unchanged version counters."""
        return self._ids is not None and self._ids == _ids(weights)

    def has_sample_of(self, weights: list[Tensor]) -> bool:
        """Whether a sample is the same. Call it only if `has_ids_of` has just returned True.

        Each call compares another part of the sample.
        """
        if self._samples is None:
            pairs = zip(self._copies, weights, strict=True)
            self._samples = [
                _Sample(*pair) for pair in pairs if _is_alike(*pair) and pair[0].numel()
            ]
        self._sample_index += 1
        return all(sample.matches(self._sample_index) for sample in self._samples)

    def has_bytes_of(self, weights: list[Tensor]) -> bool:
        """Whether every byte is the same. Call it only if `has_ids_of` has just returned True."""
        if self._ranges is None:
            pairs = list(zip(self._copies, weights, strict=True))
            if not all(_is_alike(*pair) for pair in pairs):
                return _are_same(self._copies, weights)
            self._ranges = [
                (copy.data_ptr(), weight.data_ptr(), copy.numel() * copy.element_size())
                for copy, weight in pairs
            ]
        return not any(compare(*memory_range) for memory_range in self._ranges)


class _Sample:
    """An element of each row and each column of a weight, and of its copy, read from memory."""

    def __init__(self, copy: Tensor, weight: Tensor) -> None:
        self._step = _sample_step(weight)
        self._copy, self._weight = _memory(copy), _memory(weight)
        self._parts = math.ceil(len(self._copy) / self._step / SAMPLE_SIZE)

    def matches(self, index: int) -> bool:
        """Whether a part of the sample is the same in both."""
        step = self._step
        first = index % self._parts * SAMPLE_SIZE * step
        part = slice(first, first + SAMPLE_SIZE * step, step)
        return self._copy[part].tobytes() == self._weight[part].tobytes()


class WeightVersionTracker:
    """Numbers the versions of one module's weights. Only one thread may use it at a time.

    Args:
        checks: ``exact`` to compare every byte at every call.

    Attributes:
        new_versions: Versions that are not recorded yet, oldest first.
    """

    def __init__(self, checks: WeightChecks = "auto") -> None:
        self.new_versions: deque[Version] = deque()
        self._exact = checks == "exact"
        self._known: tuple[Version, ...] = ()
        self._count = 0
        self._fingerprint: _WeightFingerprint | None = None
        self._live: list[weakref.ref[Tensor]] = []
        self._due = True
        # Seconds available for comparisons, the time of that figure, and the cost of a comparison.
        self._allowance, self._time, self._cost = 0.0, time.perf_counter(), 0.0

    @property
    def known(self) -> tuple[Version, ...]:
        """The versions whose copies are kept, the current one first."""
        return self._known

    @property
    def present(self) -> Version:
        """The current version: the one found by the last check."""
        return self._known[0]

    def expect_changes(self) -> None:
        """Compare every byte at the next call."""
        self._due = True

    def check(self, weights: list[Tensor], *, exact: bool = False) -> bool:
        """Check the weights of a call that has just run. `present` is then their version.

        Args:
            weights: The weights that were passed to the kernel.
            exact: Whether to compare every byte at any cost.

        Returns:
            Whether every byte was compared. If not, the call may have used another version.
        """
        began = time.perf_counter()
        gained = MAX_COMPARE_FRACTION * (began - self._time)
        self._allowance = min(self._allowance + gained, MAX_ALLOWANCE_SECONDS)
        self._time = began
        fingerprint = self._fingerprint
        if fingerprint is not None and fingerprint.has_ids_of(weights):
            is_cheap = self._cost <= max(SAMPLE_SECONDS, self._allowance)
            if not (exact or self._exact or self._due or is_cheap):
                if fingerprint.has_sample_of(weights):
                    return False
            elif fingerprint.has_bytes_of(weights):
                self._cost = time.perf_counter() - began
                self._allowance = max(0.0, self._allowance - self._cost)
                self._due = False
                return True
        self.compare(weights)
        return True

    def compare(self, weights: list[Tensor]) -> None:
        """Compare every byte with the known versions. `present` is then the weights' version."""
        known = self._known
        same = next((version for version in known if _are_same(version.weights, weights)), None)
        if same is None:
            # An interruption can come between the two statements that add a new version.
            latest = max((version.number for version in self.new_versions), default=-1)
            number = max(self._count, latest + 1)
            same = Version(number, [_copy(weight) for weight in weights])
            self.new_versions.append(same)
            self._count = number + 1
        others = tuple(version for version in known if version is not same)[: MAX_VERSIONS - 1]
        self._known = (same, *others)
        self._fingerprint = _WeightFingerprint(same.weights, weights)
        self._live = [weakref.ref(weight) for weight in weights]
        self._due = False

    def recheck(self) -> bool:
        """Compare every byte of the last call's weights again, with their current values.

        Nothing changes if weights were garbage-collected, or if their memory is freed between calls
        (FSDP, offloaders).

        Returns:
            Whether the current version is the same as before.
        """
        if not self._known:
            return True
        before, fingerprint = self._known[0], self._fingerprint
        live = [weight for reference in self._live if (weight := reference()) is not None]
        if len(live) == len(before.weights) and not any(map(_is_freed, live)):
            if (
                fingerprint is not None
                and fingerprint.has_ids_of(live)
                and fingerprint.has_bytes_of(live)
            ):
                self._due = False
            else:
                self.compare(live)
        return self._known[0] is before


def _ids(weights: list[Tensor]) -> list[tuple[int, int]] | None:
    try:
        return [(weight.data_ptr(), weight._version) for weight in weights]
    except RuntimeError:
        # Tensors made under inference_mode have no version counter.
        return None


def _copy(weight: Tensor) -> Tensor:
    # Dense weights keep their strides, so a product with the copy has the same bits.
    return weight.detach().clone()


def _is_freed(weight: Tensor) -> bool:
    """Whether a weight has no memory now. FSDP and offloaders free it between calls."""
    return weight.is_meta or (weight.numel() > 0 and weight.untyped_storage().nbytes() == 0)


def _are_same(copies: list[Tensor], weights: list[Tensor]) -> bool:
    return len(copies) == len(weights) and all(map(_is_same, copies, weights))


def _is_same(copy: Tensor, weight: Tensor) -> bool:
    """Whether two tensors hold the same bytes, NaN included."""
    if copy.dtype != weight.dtype or copy.device != weight.device or copy.shape != weight.shape:
        return False
    if _is_alike(copy, weight):
        size = copy.numel() * copy.element_size()
        return compare(copy.data_ptr(), weight.data_ptr(), size) == 0
    weight = weight.detach()
    # The comparison of numbers is faster. Bytes are compared next, because NaN is not equal to NaN.
    return torch.equal(copy, weight) or torch.equal(
        copy.contiguous().view(torch.uint8), weight.contiguous().view(torch.uint8)
    )


def _is_alike(copy: Tensor, weight: Tensor) -> bool:
    """Whether both are in CPU memory with the same strides and without gaps."""
    return (
        weight.device.type == "cpu"
        and copy.stride() == weight.stride()
        and (copy.is_contiguous() or (copy.dim() == 2 and copy.t().is_contiguous()))
    )


def _sample_step(weight: Tensor) -> int:
    """Return a step through the memory of a weight that reaches every row and every column."""
    if weight.dim() < 2:
        return 1
    outer, inner = weight.shape
    if weight.stride(0) == 1:
        outer, inner = inner, outer
    # The step is at most a row, so that no row is left out. There are at least as many steps as
    # columns. The step has no common divisor with the row length, so each reaches another column.
    longest = max(1, min(inner, weight.numel() // max(outer, inner)))
    return next(step for step in range(longest, 0, -1) if math.gcd(step, inner) == 1)


def _memory(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a tensor without gaps as an array (elements,), for reading only.

    Unlike Tensor.numpy(), this does not change the tensor's storage, and does not keep it alive.
    """
    count, size = tensor.numel(), tensor.element_size()
    memory: Any = (ctypes.c_char * (count * size)).from_address(tensor.data_ptr())
    return np.ndarray((count,), f"u{size}", memory)
