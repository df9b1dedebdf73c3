"""One step of a GRU and its gates: PyTorch's equations, once, as pure functions.

With x the input of a step, h' the state before it and h the state after it:

    reset      r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)
    update     z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)
    candidate  n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))
    hidden     h = (1 - z) * n + z * h'

Source: the documentation of torch.nn.GRU. z = 1 *keeps* the old state, as in Cho et al. (2014);
Chung et al. (2014) and many tutorials write z for what is 1 - z here. Unlike in both, r is applied
after the product with W_hn. docs/equations.md says how to convert what can be converted.

A weight stacks its three parts along its first axis in the order reset, update, candidate.
Leading axes ``...`` are free: every function treats each step on its own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear


class Products(NamedTuple):
    """The two matrix products of a step, biases included: each (..., 3H)."""

    input: Tensor
    hidden: Tensor


class Gates(NamedTuple):
    """The gates of a step, or their pre-activations: each (..., H)."""

    reset: Tensor
    update: Tensor
    candidate: Tensor


def products(
    input: Tensor,
    previous: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Products:
    """Return ``W_i x + b_i`` and ``W_h h' + b_h``.

    Args:
        input: (..., I).
        previous: (..., H), the state before each step.
        weight_ih: (3H, I).
        weight_hh: (3H, H).
        bias_ih: (3H,) or None.
        bias_hh: (3H,) or None.
    """
    return Products(linear(input, weight_ih, bias_ih), linear(previous, weight_hh, bias_hh))


def preactivations(products: Products) -> Gates:
    """Return what the sigmoids and the tanh are applied to; the last one holds the reset gate."""
    input_reset, input_update, input_candidate = products.input.chunk(3, -1)
    hidden_reset, hidden_update, hidden_candidate = products.hidden.chunk(3, -1)
    reset = input_reset + hidden_reset
    return Gates(
        reset,
        input_update + hidden_update,
        input_candidate + reset.sigmoid() * hidden_candidate,
    )


def activate(preactivations: Gates) -> Gates:
    """Return the gates that these pre-activations lead to."""
    reset, update, candidate = preactivations
    return Gates(reset.sigmoid(), update.sigmoid(), candidate.tanh())


def gates(products: Products) -> Gates:
    """Return reset, update and candidate."""
    return activate(preactivations(products))


def step(gates: Gates, previous: Tensor) -> Tensor:
    """Return the state after each step, (..., H), from its gates and the state before it.

    The order of the operations is that of PyTorch's CPU kernel.
    """
    return (previous - gates.candidate) * gates.update + gates.candidate
