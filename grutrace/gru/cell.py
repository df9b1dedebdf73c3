"""One step of a GRU and its gates: PyTorch's equations, once, as pure functions.

With x the input of a step, h' the state before it and h the state after it:

    reset      r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)
    update     z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)
    candidate  n = tanh(W_in x + b_in + r * (W_hn h' + b_hn))
    hidden     h = (1 - z) * n + z * h'

Source: the documentation of torch.nn.GRU. z = 1 *keeps* the old state, as in Cho et al. (2014);
Chung et al. (2014) and many tutorials write z for what is 1 - z here. Unlike in both, r is applied
after the product with W_hn. docs/equations.md says which conventions can be converted, and how.

A weight stacks the rows of reset, update and candidate, in this order, along its first axis.
Every function treats each step on its own, so the leading axes ``...`` may have any shape.

I input size, H hidden size, R rows of a weight, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

#: Alignment of operands in bytes. The last digits of an MKL product depend on the addresses of its
#: operands modulo this number, says Intel's guide (on AMD processors we saw it modulo 16). Memory
#: that torch allocates has this alignment.
ALIGNMENT = 64


class Products(NamedTuple):
    """The two matrix products of a step, with biases: (..., 3H) each, or (..., R) of some rows."""

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
    return Products(product(input, weight_ih, bias_ih), product(previous, weight_hh, bias_hh))


def product(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``W v + b`` of each step, (..., R), for any R rows of a weight.

    On a CPU the result depends only on the values, their shape and the number of threads, not on
    memory addresses or strides. So two replays of one call give the same bits.
    """
    if values.device.type == "cpu":
        # With three axes, PyTorch computes one product of all rows or one per step, which differ in
        # the last digits. The choice depends on the strides, which differ for (1, B, I) of a
        # batch-first layer, and on whether the weight requires gradients. So reshape to rows.
        rows = values.reshape(values.shape[:-1].numel(), values.shape[-1]).contiguous()
        result = linear(_aligned(rows), _aligned(weight), bias)
        return result.view(*values.shape[:-1], weight.shape[0])
    return linear(values, weight, bias)


def products_of_calls(
    inputs: Sequence[Tensor],
    previous: Sequence[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Products:
    """Return the products of several calls of one step, with the same bits as from `products`.

    Each call has a product of its own, because the last digits depend on the number of rows. Only
    the memory is shared.

    Args:
        inputs: (B, I) of each call, on the CPU.
        previous: (B, H) of each call.
        weight_ih: (3H, I).
        weight_hh: (3H, H).
        bias_ih: (3H,) or None.
        bias_hh: (3H,) or None.

    Returns:
        Each (calls, B, 3H).
    """
    return Products(
        _products_of_calls(inputs, weight_ih, bias_ih),
        _products_of_calls(previous, weight_hh, bias_hh),
    )


def _products_of_calls(values: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.stack([product(call_values, weight, bias) for call_values in values])


def _aligned(values: Tensor) -> Tensor:
    """Return the values at an aligned address; copied if necessary."""
    return values.clone() if values.data_ptr() % ALIGNMENT else values


def preactivations(products: Products) -> Gates:
    """Return the arguments of the sigmoids and the tanh. The last one includes the reset gate."""
    input, hidden = (product.chunk(3, -1) for product in products)
    reset, update, candidate = (Products(*pair) for pair in zip(input, hidden, strict=True))
    reset_preactivation = _gate_preactivation(reset)
    return Gates(
        reset_preactivation,
        _gate_preactivation(update),
        _candidate_preactivation(candidate, reset_preactivation.sigmoid()),
    )


def partial_gates(products: Mapping[str, Products]) -> dict[str, Tensor]:
    """Return some of the gates, (..., U) each, from their columns of the products.

    Args:
        products: By gate name. The candidate needs the reset gate of the same units.
    """
    gates = {
        name: _gate_preactivation(products[name]).sigmoid()
        for name in ("reset", "update")
        if name in products
    }
    if "candidate" in products:
        gates["candidate"] = _candidate_preactivation(products["candidate"], gates["reset"]).tanh()
    return gates


def _gate_preactivation(products: Products) -> Tensor:
    """Return the argument of the sigmoid of the reset or the update gate."""
    return products.input + products.hidden


def _candidate_preactivation(products: Products, reset: Tensor) -> Tensor:
    """Return the argument of the tanh of the candidate."""
    return products.input + reset * products.hidden


def activate(preactivations: Gates) -> Gates:
    """Return the gates from their pre-activations."""
    reset, update, candidate = preactivations
    return Gates(reset.sigmoid(), update.sigmoid(), candidate.tanh())


def gates(products: Products) -> Gates:
    """Return reset, update and candidate."""
    return activate(preactivations(products))


def gates_in_place(products: Products) -> Gates:
    """Return reset, update and candidate, computed in the memory of the products.

    The products are overwritten. The operations are those of `gates`, in the same order, with fewer
    passes through memory. At the end of a row, torch's sigmoid may differ in the last digit.
    """
    size = products.hidden.shape[-1] // 3
    reset_update = products.input[..., : 2 * size]
    reset_update.add_(products.hidden[..., : 2 * size]).sigmoid_()
    reset, update = reset_update.chunk(2, -1)
    candidate = products.input[..., 2 * size :]
    candidate.add_(products.hidden[..., 2 * size :].mul_(reset)).tanh_()
    return Gates(reset, update, candidate)


def step(gates: Gates, previous: Tensor) -> Tensor:
    """Return the state after each step, (..., H), from its gates and the previous state.

    The operations have the order of PyTorch's CPU kernel, so the bits are the same.
    """
    return (previous - gates.candidate).mul_(gates.update).add_(gates.candidate)
