"""Calls of one step that are replayed together give the same bits as alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grutrace.gru.joint_replay import OneStep, calls_at_once, replay_calls
from grutrace.gru.kernel import CellWeights
from grutrace.gru.layout import PaddedLayout
from grutrace.gru.replay import GateReplay

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 7, 3), (3, 17, 5), (5, 100, 7), (1, 16, 3), (16, 128, 64)]
)
def test_calls_of_one_step_are_the_same_bits_together(shape, bias, dtype) -> None:
    batch, size, inputs = shape
    torch.manual_seed(0)
    layer = nn.GRU(inputs, size, bias=bias).to(dtype)
    shadow, calls = GateReplay(layer), []
    for _ in range(min(5, calls_at_once(batch, size, dtype))):
        x, initial = (
            torch.randn(1, batch, inputs, dtype=dtype),
            torch.randn(1, batch, size).to(dtype),
        )
        calls.append(OneStep(x[0], layer(x, initial)[0][0].detach(), initial[0]))
    gates, checks = replay_calls(calls, shadow.weights)
    for number, call in enumerate(calls):
        alone = shadow.replay(
            call.input[None], call.hidden[None], call.initial, PaddedLayout(1, batch)
        )
        for name in ("reset", "update", "candidate"):
            # A replay on its own is kept as float32, where NumPy has no such type.
            assert torch.equal(
                getattr(gates, name)[number].to(alone.gates[name]), alone.gates[name][0]
            )
        assert checks[number] == (alone.residual, alone.tolerance, alone.precision)
        assert checks[number].residual <= checks[number].tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_the_strides_of_a_call_do_not_matter(bias, dtype) -> None:
    """One step of a batch-first layer and of another have the same shape, and other strides."""
    torch.manual_seed(0)
    for size in (3, 4, 8, 17):
        layer = nn.GRU(size, size, bias=bias).to(dtype)
        replay = GateReplay(layer)
        # Copies, as a trace has them: for weights with gradients PyTorch ignores the strides.
        weights = CellWeights(*(weight.detach() for weight in replay.weights if weight is not None))
        for batch in (2, 3, 5):
            x, initial = torch.randn(2, 1, batch, size, dtype=dtype)
            hidden = layer(x, initial)[0].detach()
            by_batch = [tensor[0].unsqueeze(1).transpose(0, 1) for tensor in (x, hidden)]
            assert by_batch[0].is_contiguous()
            assert by_batch[0].stride() != x.stride()
            actual = replay.replay(*by_batch, initial[0], PaddedLayout(1, batch), weights)
            expected = replay.replay(x, hidden, initial[0], PaddedLayout(1, batch), weights)
            for name, gate in expected.gates.items():
                assert torch.equal(actual.gates[name], gate)
            assert actual.check == expected.check


def test_a_wrong_call_among_others_is_the_one_that_is_noticed() -> None:
    torch.manual_seed(0)
    cell_, calls = nn.GRUCell(3, 8), []
    for number in range(4):
        x, initial = torch.randn(2, 3), torch.randn(2, 8)
        hidden = cell_(x, initial).detach()
        hidden[1, 2] += {2: 1e-3}.get(number, 0.0)
        initial[0, 0] = math.nan if number == 3 else initial[0, 0]
        calls.append(OneStep(x, hidden, initial))
    _, checks = replay_calls(calls, GateReplay(cell_).weights)
    assert [check is None for check in checks] == [False, False, False, True]
    assert [check.residual > check.tolerance for check in checks[:3]] == [False, False, True]


def test_large_calls_are_replayed_on_their_own(instruction_set) -> None:
    shapes = (32, 512), (16, 128), (1, 8), (0, 8), (512, 1024)
    plain = [calls_at_once(*shape, torch.float64) for shape in shapes]
    assert plain == [0, 7, 32, 32, 0]
    compiled = [calls_at_once(*shape, torch.float32) for shape in shapes]
    assert compiled == (plain if instruction_set == "none" else [5, 32, 32, 32, 1])
