"""The closed-form backward pass equals autograd's through a Python loop of nn.GRUCell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grutrace.gradients import backward
from grutrace.gru.kernel import CellWeights
from grutrace.gru.layout import PackedLayout
from tests.gradients.oracle import Loop, run_cell

#: Largest absolute difference that rounding in float64 explains. Gradients here are below 100.
TOLERANCE = 1e-10


class Problem:
    """A direction of a layer with random values, and the loop over its steps."""

    #: Rows whose derivatives are held at once; 0 for all.
    most_rows = 0

    def __init__(self, batch_sizes: list[int], seed: int, bias: bool, reverse: bool) -> None:
        torch.manual_seed(seed)
        inputs, units, rows = 3, 5, sum(batch_sizes)
        self.batch_sizes, self.reverse = batch_sizes, reverse
        self.cell = nn.GRUCell(inputs, units, bias=bias).double()
        with torch.no_grad():
            for parameter in self.cell.parameters():
                parameter.mul_(3)
        self.input = torch.randn(rows, inputs, dtype=torch.float64)
        self.initial = torch.randn(batch_sizes[0], units, dtype=torch.float64)
        self.arriving = torch.randn(rows, units, dtype=torch.float64)
        self.final = torch.randn_like(self.initial)
        self.loop = run_cell(self.cell, self.input, self.initial, batch_sizes, reverse=reverse)
        outputs = self.loop.rows("hidden")
        # The states of the rows at which the sequences end, in the order of the batch.
        loss = (outputs * self.arriving).sum() + (self.loop.final * self.final).sum()
        loss.backward()

    @property
    def weights(self) -> CellWeights:
        cell: Any = self.cell
        return CellWeights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)

    @torch.no_grad()
    def closed_form(self) -> dict[str, Tensor]:
        layout = PackedLayout(torch.tensor(self.batch_sizes), None)
        previous = layout.previous(
            self.loop.rows("hidden").detach(), self.initial, reverse=self.reverse
        )
        arguments = self.input, previous, self.weights, self.arriving, self.final, self.batch_sizes
        total, initial, derivatives = backward.call_gradients(*arguments, reverse=self.reverse)
        if self.most_rows:
            total, initial = backward.total_gradients(
                *arguments, reverse=self.reverse, most_rows=self.most_rows
            )
        gates = backward.gate_gradients(total, derivatives)
        before = backward.gate_gradients(total, derivatives, preactivations=True)
        return {
            "hidden": total,
            "initial": initial,
            "input": backward.input_gradient(total, derivatives, self.weights.weight_ih),
            **gates._asdict(),
            **{f"{name}_preactivation": value for name, value in before._asdict().items()},
        }


def difference(loop: Loop, found: dict[str, Tensor]) -> float:
    expected = loop.gradients()
    assert set(expected) == set(found)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_gradient_equals_autograds(sizes, seed, bias, reverse) -> None:
    problem = Problem(sorted(sizes, reverse=True), seed, bias, reverse)
    assert difference(problem.loop, problem.closed_form()) < TOLERANCE


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("most_rows", [1, 3, 5, 8, 100])
def test_gradients_in_parts_equal_autograds(most_rows, reverse) -> None:
    problem = Problem([4, 4, 3, 3, 1], 1, True, reverse)
    problem.most_rows = most_rows
    assert difference(problem.loop, problem.closed_form()) < TOLERANCE


@pytest.mark.parametrize("reverse", [False, True])
def test_control_the_recursion_in_the_wrong_direction_differs(reverse) -> None:
    problem = Problem([3, 3, 2], 0, True, reverse)
    problem.reverse = not reverse
    assert difference(problem.loop, problem.closed_form()) > 1e-3


def test_control_a_wrong_arriving_gradient_differs() -> None:
    problem = Problem([3, 3, 2], 0, True, False)
    problem.final[0, 0] += 1e-3
    assert difference(problem.loop, problem.closed_form()) > 1e-5


def test_half_precision_is_computed_in_float32() -> None:
    products = backward.Products(*torch.randn(2, 4, 15, dtype=torch.bfloat16))
    derivatives = backward.step_derivatives(products, torch.randn(4, 5, dtype=torch.bfloat16))
    assert derivatives.previous.dtype == torch.float32


def test_a_step_equals_gradcheck() -> None:
    """The closed form as the backward of an autograd function passes PyTorch's own check."""
    problem = Problem([4], 3, True, False)
    weights = CellWeights(*(weight.detach() for weight in problem.weights))

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Tensor, previous: Tensor) -> Tensor:
            ctx.save_for_backward(input, previous)
            return torch._VF.gru_cell(input, previous, *weights)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            input, previous = ctx.saved_tensors
            total, initial, derivatives = backward.call_gradients(
                input, previous, weights, gradient, torch.zeros_like(gradient), [4], reverse=False
            )
            return backward.input_gradient(total, derivatives, weights.weight_ih), initial

    arguments = problem.input.requires_grad_(), problem.initial.requires_grad_()
    assert torch.autograd.gradcheck(Step.apply, arguments)
