"""With activation checkpointing, the recomputed forward is not recorded again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.integration.models import CALLS, Mixed, assert_same, eagerly, trace


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(1)
    return Mixed()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 5, 3, requires_grad=True)


def step(model: nn.Module, batch: torch.Tensor, reentrant: bool) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = checkpoint(model, batch, use_reentrant=reentrant).square().sum()
    loss.backward()
    return [loss, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("stacks", ["split", "rerun"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_not_recorded_again(reentrant, stacks, model, batch) -> None:
    forwards = []
    model.cell.register_forward_pre_hook(lambda *_: forwards.append(1))
    expected = step(model, batch, reentrant)
    assert len(forwards) == 4, "the control: there is a recomputation"
    _, eager = eagerly(model, lambda: model(batch), seed=2)
    with trace(model, stacks=stacks) as tracer:
        assert all(map(torch.equal, expected, step(model, batch, reentrant)))
        assert len(tracer.calls) == len(CALLS)
    assert_same(eager, tracer)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("starts", [False, True])
def test_recording_may_start_or_end_between_forward_and_backward(
    starts, reentrant, model, batch
) -> None:
    """PyTorch compares the saved tensors of the recomputation with those of the forward."""
    expected = step(model, batch, reentrant)
    model.zero_grad()
    torch.manual_seed(2)
    tracer = trace(model, recording=not starts)
    with tracer:
        loss = checkpoint(model, batch, use_reentrant=reentrant).square().sum()
        tracer.start() if starts else tracer.stop()
        loss.backward()
        assert len(tracer.calls) == (0 if starts else len(CALLS))
        model(batch)
        tracer.start()
        model(batch)
    results = [loss, *(parameter.grad for parameter in model.parameters())]
    assert all(map(torch.equal, expected, results))


def test_a_new_call_within_backward_is_recorded(batch) -> None:
    cell = nn.GRUCell(3, 3)

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, grad):
            return cell(grad)

    x = torch.randn(2, 3, requires_grad=True)
    with trace(cell) as tracer:
        InBackward.apply(x).sum().backward()
    assert len(tracer.calls) == 1
