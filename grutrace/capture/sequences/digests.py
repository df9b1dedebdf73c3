"""Digests of states and names that were dropped from memory, to recognize them later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Number of values of a state in its digest, spread over all units.
DIGEST_COLUMNS = 16

#: Odd constants of multiplicative hashing.
_FACTOR, _MIXER = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93

Hashes: TypeAlias = npt.NDArray[np.uint64]


class Digests:
    """64-bit digests of dropped states and names, in a table of fixed size.

    A digest may replace an older one, so states that were dropped long ago may be missing.

    Args:
        limit: Bytes of the table.
    """

    def __init__(self, limit: int) -> None:
        self._bits = max(4, (limit // 8).bit_length() - 1)
        self._table: Hashes | None = None

    def add(self, states: Sequence[Tensor]) -> None:
        """Add states, (B, W) each."""
        if states:
            self.add_hashes(_digests(states))

    def hold(self, states: Tensor) -> list[bool]:
        """Whether each of (B, W) states was added."""
        if self._table is None:
            return [False] * len(states)
        return self.hold_hashes(_digests([states]))

    def add_hashes(self, hashes: Hashes) -> None:
        """Add (n,) hashes."""
        # An empty slot is 0.
        hashes = hashes | np.uint64(1)
        if self._table is None:
            table = torch.zeros(1 << self._bits, dtype=torch.int64, device="cpu")
            self._table = table.numpy().view(np.uint64)
        self._table[self._slots(hashes)] = hashes

    def hold_hashes(self, hashes: Hashes) -> list[bool]:
        """Whether each of (n,) hashes was added."""
        if self._table is None:
            return [False] * len(hashes)
        hashes = hashes | np.uint64(1)
        held: list[bool] = (self._table[self._slots(hashes)] == hashes).tolist()
        return held

    def _slots(self, hashes: Hashes) -> Hashes:
        return (hashes * np.uint64(_MIXER)) >> np.uint64(64 - self._bits)


def _digests(states: Sequence[Tensor]) -> Hashes:
    """Return the digests of the states of several batches, concatenated."""
    stride = max(1, -(-states[0].shape[1] // DIGEST_COLUMNS))
    # A copy in float64, which holds every value of any floating-point type.
    columns = torch.cat([tensor[:, ::stride] for tensor in states]).to("cpu", torch.float64)
    # Adding 0 turns -0 into 0, because the two are equal.
    bits = (columns.numpy() + 0.0).view(np.uint64)
    factors = np.arange(1, 1 + bits.shape[1], dtype=np.uint64) * np.uint64(_FACTOR)
    bits = (bits ^ (bits >> np.uint64(29))) * (factors | np.uint64(1))
    hashes: Hashes = (bits ^ (bits >> np.uint64(32))).sum(1, dtype=np.uint64)
    return hashes
