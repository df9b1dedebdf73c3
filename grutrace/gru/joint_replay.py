"""Recompute the gates of several calls of one step together.

Each call gives the same bits as `grutrace.gru.replay.GateReplay` gives for it alone. A decoder
makes such calls, one per token, and most of the time of a single replay is the overhead of its some
twenty PyTorch operations. See docs/design.md.

B sequences in a batch, I input size, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grutrace.gru import cell
from grutrace.gru.cell import Gates
from grutrace.gru.compiled_replay import Grouping, replay_products
from grutrace.gru.kernel import CellWeights
from grutrace.gru.residual import ResidualCheck
from grutrace.gru.tolerance import lowest_precision, machine_epsilon, tolerance
from grutrace.native.library import load
from grutrace.records import GATES

#: From this many elements on, PyTorch divides an operation among its threads, in the middle of a
#: row. The sigmoid gives other last digits at the ends of a row, and a divided row has more ends.
SINGLE_THREADED = 32 * 1024

#: Maximum number of calls that are replayed together. More of them save next to nothing.
MAX_CALLS = 32

#: Elements of the products of the calls that the compiled library replays together. They stay in
#: the processor's cache.
COMPILED_ELEMENTS = 512 * 1024


def calls_at_once(batch: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Return how many calls of one step can be replayed together; 0 if they are too large."""
    elements = max(1, batch * hidden_size)
    if load() is not None and dtype == torch.float32:
        return min(MAX_CALLS, max(1, COMPILED_ELEMENTS // (6 * elements)))
    return min(MAX_CALLS, (SINGLE_THREADED - 1) // (2 * elements))


class OneStep(NamedTuple):
    """One direction of one layer in a call of one step. On the CPU.

    Attributes:
        input: (B, I), the input of the layer.
        hidden: (B, H), the output of the kernel.
        initial: (B, H), the state before.
    """

    input: Tensor
    hidden: Tensor
    initial: Tensor


@torch.no_grad()
def replay_calls(
    calls: Sequence[OneStep], weights: CellWeights
) -> tuple[Gates, list[ResidualCheck | None]]:
    """Recompute the gates of several calls of one step.

    Args:
        calls: At most `calls_at_once`, with the same shapes, and with the data type of the weights.
            Autocast must be off.
        weights: The weights that the kernel used in all calls.

    Returns:
        The gates, each (calls, B, H), and the check of each call; None if a value of the call is
        not finite: replay it on its own.
    """
    inputs, hidden, initial = zip(*calls, strict=True)
    products = cell.products_of_calls(inputs, initial, *weights)
    previous, size = torch.stack(initial), products.hidden.shape[-1] // 3
    dtype = lowest_precision(hidden[0].dtype, products.input.dtype)
    terms = inputs[0].shape[-1] + size
    states = torch.stack(hidden)
    gates = Gates(*(torch.empty_like(states) for _ in GATES))
    found = replay_products(products, previous, states, gates._asdict(), Grouping.STEP)
    if found is not None:
        sizes = previous.abs().amax((1, 2)).tolist()
        return gates, [
            _make_check(dtype, terms, *check)
            for check in zip(*(column.tolist() for column in found), sizes, strict=True)
        ]
    parts = products.hidden[..., : 2 * size], products.hidden[..., 2 * size :]
    least, most = (
        [extreme(product, (1, 2)) for product in (products.input, *parts, previous)]
        for extreme in (torch.amin, torch.amax)
    )
    gates = cell.gates_in_place(products)
    off = cell.step(gates, previous).sub_(states)
    extremes = torch.stack([off.amin((1, 2)), off.amax((1, 2)), *least, *most], 1).tolist()
    checks: list[ResidualCheck | None] = []
    for low, high, *bounds in extremes:
        if not all(map(math.isfinite, (low, high, *bounds))):
            checks.append(None)
            continue
        input, first, recurrent, state = (
            max(map(abs, pair)) for pair in zip(bounds[:4], bounds[4:], strict=True)
        )
        residual, product = max(abs(low), abs(high)), max(input, first, recurrent)
        checks.append(_make_check(dtype, terms, residual, product, recurrent, state))
    return gates, checks


def _make_check(
    dtype: torch.dtype,
    terms: int,
    residual: float,
    product: float,
    recurrent: float,
    state: float,
) -> ResidualCheck | None:
    """Return the check of a call; None if a value is not finite."""
    if not math.isfinite(residual + product + state):
        return None
    allowed = tolerance(dtype, terms, max(1.0, state), product, recurrent)
    return ResidualCheck(residual, allowed, machine_epsilon(dtype))
