"""Tests of GRUs that cannot be traced: a message names each and an alternative."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.runs import run_once

INPUT, HIDDEN = 4, 6


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUT, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        return self.rnn(input)[0]


class Stepper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRUCell(INPUT, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        state = torch.zeros(input.shape[1], self.rnn.hidden_size)
        for step in input:
            state = self.rnn(step, state)
        return state


class OwnGRU(nn.RNNBase):
    """A GRU in Python, built on PyTorch's base class, as torchrl's is."""

    def __init__(self) -> None:
        super().__init__("GRU", INPUT, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        state = torch.zeros(input.shape[1], HIDDEN)
        for step in input:
            r, z, n = nn.functional.linear(step, self.weight_ih_l0, self.bias_ih_l0).chunk(3, -1)
            hidden = nn.functional.linear(state, self.weight_hh_l0, self.bias_hh_l0).chunk(3, -1)
            r, z = (r + hidden[0]).sigmoid(), (z + hidden[1]).sigmoid()
            n = (n + r * hidden[2]).tanh()
            state = (1 - z) * n + z * state
        return state


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = OwnGRU()

    def forward(self, input: Tensor) -> Tensor:
        return self.rnn(input)


class GRUOfMyOwn(nn.Module):
    """Called GRU, and nothing of the kind."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


def quiet(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What PyTorch says about its own deprecated functions is not tested here."""

    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return build


def quantized(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.GRUCell}, torch.qint8)


def example() -> Tensor:
    return torch.randn(5, 3, INPUT, generator=torch.Generator().manual_seed(0))


KINDS = {
    "scripted": (quiet(lambda: torch.jit.script(Tagger())), "a GRU inside TorchScript"),
    "scripted cell": (quiet(lambda: torch.jit.script(Stepper())), "a GRU inside TorchScript"),
    "jit.traced": (quiet(lambda: torch.jit.trace(Tagger(), example())), "a GRU inside TorchScript"),
    "quantized": (quiet(lambda: quantized(Tagger())), "a quantized GRU"),
    "quantized cell": (quiet(lambda: quantized(Stepper())), "a quantized GRU"),
    "python": (
        Holder,
        r"a GRU implementation of its own \(tests.capture.test_unsupported_grus.OwnGRU\)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_only_unsupported_grus_is_an_error(kind: str) -> None:
    build, what = KINDS[kind]
    with pytest.raises(grutrace.UnsupportedError, match=f"; rnn is {what}.*: "):
        grutrace.trace(build())


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_that_the_message_names_makes_a_layer_of_its_weights(kind: str) -> None:
    """What is quantized agrees to the rounding of 8 bits, everything else to that of float32."""
    torch.manual_seed(0)
    theirs = KINDS[kind][0]()
    with pytest.raises(grutrace.UnsupportedError) as caught:
        grutrace.trace(theirs)
    (call,) = re.findall(r"grutrace\.(convert\(.*?\))(?:;|$)", str(caught.value))
    convert = eval(call, {"convert": grutrace.convert, "gru": theirs.rnn})
    found = convert(example())
    output = theirs(example())
    final = output if output.shape == found[1][0].shape else output[-1]
    allowed = 0.05 if "quantized" in kind else 1e-6
    assert (found[1][0] - final).abs().max() < allowed
    with grutrace.trace(convert) as trace:
        convert(example())
    assert trace.sites == ("l0",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_unsupported_grus_beside_others_are_reported(kind: str) -> None:
    build, what = KINDS[kind]
    torch.manual_seed(0)
    model = nn.ModuleDict({"ours": Tagger(), "theirs": build()})

    def run(model: nn.ModuleDict) -> list[Tensor]:
        return [model["ours"](example()), model["theirs"](example())]

    expected = run_once(model, run)
    with (
        pytest.warns(grutrace.GrutraceWarning, match=f"^theirs.rnn is {what}.*: ") as file,
        grutrace.trace(model, check="raise") as trace,
    ):
        expected.assert_same(run_once(model, run))
    assert len(file) == 1
    assert file[0].filename == __file__
    assert trace.sites == ("ours.rnn.l0",)
    assert len(trace["ours.rnn.l0"]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_unselected_unsupported_grus_are_not_reported(kind: str) -> None:
    model = nn.ModuleDict({"ours": Tagger(), "theirs": KINDS[kind][0]()})
    with grutrace.trace(model, sites="ours.*") as trace:
        model["ours"](example())
    assert trace.sites == ("ours.rnn.l0",)


def test_a_class_named_gru_is_not_reported() -> None:
    """Warnings are errors here."""
    model = nn.ModuleDict({"ours": Tagger(), "theirs": GRUOfMyOwn(), "other": nn.LSTM(2, 2)})
    with grutrace.trace(model) as trace:
        model["ours"](example())
    assert trace.sites == ("ours.rnn.l0",)


def test_a_model_without_any_gru() -> None:
    with pytest.raises(grutrace.UnsupportedError, match=r"found none in LSTM$"):
        grutrace.trace(nn.LSTM(2, 2))


def test_complex_layers_are_refused_by_name() -> None:
    layer = nn.GRU(3, 4, dtype=torch.complex64)
    with pytest.raises(grutrace.UnsupportedError, match="complex"):
        grutrace.trace(layer)
    model = nn.ModuleList([layer, nn.GRU(3, 4)])
    with pytest.warns(grutrace.GrutraceWarning, match="^0 is complex"):
        trace = grutrace.trace(model)
    assert trace.sites == ("1.l0",)
    trace.close()
