"""How far recorded gates are from leading to the recorded states: the residual, row by row.

N rows, one a step, sequence by sequence; B sequences, H hidden size.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grutrace.gru.cell import Gates, step
from grutrace.record import Array

#: What is looked at in one go, so that it stays in the processor's cache. Elements.
BLOCK = 64 * 1024


def prove(
    update: Array,
    candidate: Array,
    hidden: Array,
    initial: Tensor,
    lengths: npt.NDArray[np.int64],
    *,
    reverse: bool,
) -> float:
    """Return the largest ``|h from the gates - recorded h|`` of a call.

    States that are the same infinity, or not a number in both, do not differ; not a number in just
    one counts as infinite.

    Args:
        update: (N, H)
        candidate: (N, H)
        hidden: (N, H)
        initial: (B, H) what each sequence started from.
        lengths: (B,) steps of each; N in all.
        reverse: Whether rows, which are in time order, were made from the last to the first.
    """
    z, n, h = (torch.from_numpy(rows) for rows in (update, candidate, hidden))
    if not h.numel():
        return 0.0
    ends = np.cumsum(lengths)
    begins = torch.from_numpy((ends - 1 if reverse else ends - lengths)[lengths > 0])
    first = initial[torch.from_numpy(lengths > 0)].to(h)
    found = _differences(z[begins], n[begins], h[begins], first).max().item()
    if len(begins) == len(h):
        return found
    # Between two rows of a sequence lies a step, between those of two sequences none.
    between = torch.zeros(len(h), dtype=torch.bool)
    between[begins] = True
    first_made, shift = (0, 1) if reverse else (1, -1)
    size = max(1, BLOCK // h.shape[1])
    for start in range(first_made, first_made + len(h) - 1, size):
        made = slice(start, min(start + size, first_made + len(h) - 1))
        previous = h[made.start + shift : made.stop + shift]
        off = _differences(z[made], n[made], h[made], previous)
        off[between[made]] = 0.0
        found = max(found, off.max().item())
    return found


def _differences(update: Tensor, candidate: Tensor, hidden: Tensor, previous: Tensor) -> Tensor:
    expected = step(Gates(update, update, candidate), previous)
    off = (expected - hidden).abs_()
    if math.isfinite(off.sum().item()):
        return off
    same = (expected == hidden) | (expected.isnan() & hidden.isnan())
    return off.masked_fill_(same, 0.0).nan_to_num_(nan=math.inf)
