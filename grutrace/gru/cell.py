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

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

#: Products of MKL end in other digits where an operand lies at another address modulo this. Bytes.
#: Intel's guide says so; seen on AMD processors modulo 16. torch's own memory begins on it.
ALIGNMENT = 64


class Products(NamedTuple):
    """The two matrix products of a step, biases included: each (..., 3H), or of some rows only."""

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

    On a CPU the bits follow from the values, their shape and the number of threads, wherever the
    operands lie in memory: two replays of one call give the same.
    """
    if values.device.type == "cpu":
        # As rows: of three axes, PyTorch makes one product of all rows or one per step, which end
        # in other digits. It decides by the strides, which differ for (1, B, I) of a batch-first
        # layer, and by whether the weight requires gradients.
        rows = values.reshape(values.shape[:-1].numel(), values.shape[-1]).contiguous()
        found = linear(_aligned(rows), _aligned(weight), bias)
        return found.view(*values.shape[:-1], weight.shape[0])
    return linear(values, weight, bias)


def products_of_calls(
    inputs: Sequence[Tensor],
    previous: Sequence[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Products:
    """Return the products of several calls of one step, each the same bits as by `products`.

    Each call has a product of its own, since one product of more rows ends in other digits. Only
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
    return torch.stack([product(each, weight, bias) for each in values])


def _aligned(values: Tensor) -> Tensor:
    """Return the values at an address at which every product with them is computed alike."""
    return values.clone() if values.data_ptr() % ALIGNMENT else values


def preactivations(products: Products) -> Gates:
    """Return what the sigmoids and the tanh are applied to; the last one holds the reset gate."""
    parts = (each.chunk(3, -1) for each in products)
    reset, update, candidate = (Products(*of_gate) for of_gate in zip(*parts, strict=True))
    before = _gate_preactivation(reset)
    return Gates(
        before, _gate_preactivation(update), _candidate_preactivation(candidate, before.sigmoid())
    )


def partial_gates(products: Mapping[str, Products]) -> dict[str, Tensor]:
    """Return those gates whose products are there, each (..., U) as its products are.

    Args:
        products: By the gate that they lead to. The candidate needs the reset gate of its units.
    """
    found = {
        name: _gate_preactivation(products[name]).sigmoid()
        for name in ("reset", "update")
        if name in products
    }
    if "candidate" in products:
        found["candidate"] = _candidate_preactivation(products["candidate"], found["reset"]).tanh()
    return found


def _gate_preactivation(products: Products) -> Tensor:
    """What the sigmoid of the reset or of the update gate is applied to."""
    return products.input + products.hidden


def _candidate_preactivation(products: Products, reset: Tensor) -> Tensor:
    """What the tanh of the candidate is applied to."""
    return products.input + reset * products.hidden


def activate(preactivations: Gates) -> Gates:
    """Return the gates that these pre-activations lead to."""
    reset, update, candidate = preactivations
    return Gates(reset.sigmoid(), update.sigmoid(), candidate.tanh())


def gates(products: Products) -> Gates:
    """Return reset, update and candidate."""
    return activate(preactivations(products))


def gates_in_place(products: Products) -> Gates:
    """Return the same in the memory of the products, which are gone then.

    The operations are those of `gates`, in the same order, with fewer passes through memory. Where
    a row ends, torch's sigmoid can end in another last digit.
    """
    size = products.hidden.shape[-1] // 3
    openings = products.input[..., : 2 * size]
    openings.add_(products.hidden[..., : 2 * size]).sigmoid_()
    reset, update = openings.chunk(2, -1)
    candidate = products.input[..., 2 * size :]
    candidate.add_(products.hidden[..., 2 * size :].mul_(reset)).tanh_()
    return Gates(reset, update, candidate)


def step(gates: Gates, previous: Tensor) -> Tensor:
    """Return the state after each step, (..., H), from its gates and the state before it.

    The order of the operations is that of PyTorch's CPU kernel.
    """
    return (previous - gates.candidate).mul_(gates.update).add_(gates.candidate)
