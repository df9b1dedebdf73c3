"""Tests of the gate replay: it uses the current weights, and its residual detects errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from grutrace.gru import cell
from grutrace.gru.kernel import CellWeights
from grutrace.gru.layout import PaddedLayout
from grutrace.gru.replay import GateReplay, ReplayResult
from grutrace.gru.tolerance import tolerance
from tests import oracles, other_processor

T, B, H = 30, 4, 6


class Call:
    """A call of a bidirectional layer, and what its forward direction read and made."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.layer = nn.GRU(5, H, bidirectional=True).to(dtype)
        self.input = torch.randn(T, B, 5, dtype=dtype)
        self.initial = torch.randn(2, B, H, dtype=dtype)
        self.hidden = self.layer(self.input, self.initial)[0].detach()[..., :H]

    def replay(self, reverse: bool = False, **changed: Tensor | CellWeights) -> ReplayResult:
        arguments = {"input": self.input, "hidden": self.hidden, "initial": self.initial[0]}
        shadow = GateReplay(self.layer, reverse=reverse)
        return shadow.replay(steps=PaddedLayout(T, B), **(arguments | changed))


@pytest.fixture(params=[torch.float32, torch.float64])
def call(request) -> Call:
    return Call(request.param)


def test_a_correct_replay_is_within_its_tolerance(call) -> None:
    result = call.replay()
    assert result.residual <= result.tolerance
    assert result.tolerance < 200 * torch.finfo(call.input.dtype).eps


def test_replayed_gates_equal_the_kernels(call) -> None:
    output, _ = call.layer(call.input, call.initial)
    (kernel,) = oracles.harvest_layers(output.grad_fn, 2 * H)
    for name, value in call.replay().gates.items():
        assert (value - kernel[name][..., :H]).abs().max() <= call.replay().tolerance


def test_the_replay_holds_no_copy_of_the_weights(call) -> None:
    shadow = GateReplay(call.layer, reverse=True)
    assert shadow.weights.weight_hh is call.layer.weight_hh_l0_reverse
    before = call.replay().gates["update"]
    with torch.no_grad():
        call.layer.bias_ih_l0 += 1
    assert (call.replay().gates["update"] > before).all()


def swapped(weights: CellWeights) -> CellWeights:
    """Reset and update exchanged."""
    return CellWeights(*(torch.cat((z, r, n)) for r, z, n in (w.chunk(3) for w in weights)))


def other_convention(weights: CellWeights) -> CellWeights:
    """Weights whose z is 1 - z."""
    return CellWeights(*(torch.cat((r, -z, n)) for r, z, n in (w.chunk(3) for w in weights)))


def noisy(layer: nn.GRU) -> CellWeights:
    weight_hh = layer.weight_hh_l0.detach().clone()
    weight_hh[2 * H, 1] += 1e-3
    return GateReplay(layer).weights._replace(weight_hh=weight_hh)


CONTROLS = {
    "one weight off by a thousandth": lambda call: call.replay(weights=noisy(call.layer)),
    "swapped reset and update": lambda call: call.replay(
        weights=swapped(GateReplay(call.layer).weights)
    ),
    "the other convention": lambda call: call.replay(
        weights=other_convention(GateReplay(call.layer).weights)
    ),
    "flipped direction": lambda call: call.replay(
        reverse=True, weights=GateReplay(call.layer).weights
    ),
    "the other direction's weights": lambda call: call.replay(
        weights=GateReplay(call.layer, reverse=True).weights
    ),
    "states shifted by a step": lambda call: call.replay(hidden=call.hidden.roll(1, 0)),
    "input shifted by a step": lambda call: call.replay(input=call.input.roll(1, 0)),
    "another initial state": lambda call: call.replay(initial=torch.zeros_like(call.initial[0])),
    "batch rows exchanged": lambda call: call.replay(input=call.input.flip(1)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control_wrong_values_exceed_the_tolerance(call, control) -> None:
    result = CONTROLS[control](call)
    assert result.residual > 10 * result.tolerance


def test_nan_in_both_is_equal_and_in_one_is_infinite(call) -> None:
    call.input[3, 1, 2] = math.nan
    call.hidden = call.layer(call.input, call.initial)[0].detach()[..., :H]
    assert call.hidden.isnan().any()
    assert call.replay().residual <= call.replay().tolerance < 1e-3
    call.hidden[0, 0, 0] = math.nan
    assert call.replay().residual == math.inf


def elsewhere(values: Tensor, offset: int) -> Tensor:
    """The same values, so many elements behind an aligned address."""
    memory = torch.empty(values.numel() + 2 * cell.ALIGNMENT, dtype=values.dtype)
    first = -memory.data_ptr() % cell.ALIGNMENT // values.itemsize + offset
    moved = memory[first : first + values.numel()].view(values.shape)
    return moved.copy_(values)


def replay_elsewhere(call: Call, offset: int) -> ReplayResult:
    arguments = {"input": call.input, "hidden": call.hidden, "initial": call.initial[0]}
    weights = CellWeights(*(elsewhere(weight, offset) for weight in GateReplay(call.layer).weights))
    moved = {name: elsewhere(tensor, offset) for name, tensor in arguments.items()}
    return call.replay(weights=weights, **moved)


@pytest.mark.parametrize("here", [True, False], ids=["this processor", "another"])
def test_replays_are_bit_identical_for_any_address(call, here, monkeypatch) -> None:
    if not here:
        other_processor.install(monkeypatch)
    expected = call.replay()
    for offset in range(1, cell.ALIGNMENT // call.input.itemsize):
        result = replay_elsewhere(call, offset)
        for name, gate in expected.gates.items():
            assert torch.equal(result.gates[name], gate), (name, offset)
        assert result.residual == expected.residual


def test_control_on_another_processor_the_address_matters(call, monkeypatch) -> None:
    other_processor.install(monkeypatch)
    monkeypatch.setattr(cell, "_aligned", lambda values: values)
    expected, result = call.replay(), replay_elsewhere(call, 1)
    off = (expected.gates["update"] - result.gates["update"]).abs().max().item()
    assert 0 < off <= expected.tolerance


def test_the_tolerance_covers_gates_of_fewer_rows(call, monkeypatch) -> None:
    """On another processor, a replay of some steps may round differently from one of all."""
    other_processor.install(monkeypatch)
    whole = call.replay()
    for count in range(1, T):
        part = GateReplay(call.layer).replay(
            call.input[:count], call.hidden[:count], call.initial[0], PaddedLayout(count, B)
        )
        off = [
            (gate - whole.gates[name][:count]).abs().max().item()
            for name, gate in part.gates.items()
        ]
        assert 0 < max(off) <= whole.tolerance


def test_an_empty_batch(call) -> None:
    steps = PaddedLayout(T, 0)
    result = GateReplay(call.layer).replay(
        call.input[:, :0], call.hidden[:, :0], call.initial[0, :0], steps
    )
    assert result.residual == 0
    assert result.gates["update"].shape == (T, 0, H)


def test_the_tolerance_covers_float32_against_float64() -> None:
    """One step each of layers of many sizes and scales, computed in both."""
    torch.manual_seed(0)
    for hidden_size in (4, 64, 512):
        for input_size in (4, 64, 512):
            for scale in (0.3, 1, 10, 30):
                layer = nn.GRUCell(input_size, hidden_size).requires_grad_(False)
                for parameter in layer.parameters():
                    parameter *= scale
                x, h = torch.randn(64, input_size), torch.rand(64, hidden_size) * 2 - 1
                wide = GateReplay(layer.double()).replay(
                    x.double()[None], h.double()[None], h.double(), PaddedLayout(1, 64)
                )
                narrow = GateReplay(layer.float()).replay(x[None], h[None], h, PaddedLayout(1, 64))
                off = max(
                    (a.double() - b).abs().max().item()
                    for a, b in zip(narrow.gates.values(), wide.gates.values(), strict=True)
                )
                assert off <= 0.5 * narrow.tolerance


def test_the_tolerance_grows_with_sizes_and_scales() -> None:
    sizes = {"terms": 100, "state": 1.0, "product": 3.0, "recurrent": 2.0}
    plain = tolerance(torch.float32, **sizes)
    for name, size in sizes.items():
        assert tolerance(torch.float32, **(sizes | {name: 4 * size})) > plain
    assert tolerance(torch.float64, **sizes) == pytest.approx(plain * 2.0**-29)
