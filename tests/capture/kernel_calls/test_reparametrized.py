"""Tests of computed weights: the weights that the kernel received are recorded."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize, prune

import grutrace
from tests.runs import check_run, rebuilt, run_once

INPUT, HIDDEN = 4, 6

Layer = nn.GRU | nn.GRUCell


class Squash(nn.Module):
    """A parametrization without a state."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


class RandomDrop(nn.Module):
    """A parametrization that draws random numbers whenever the weight is read."""

    def forward(self, weight: Tensor) -> Tensor:
        return dropout(weight, 0.5, self.training)


class WeightDrop(nn.Module):
    """As in AWD-LSTM: the raw weight is the wrapper's, the layer gets a fresh tensor each call."""

    def __init__(self, layer: Layer, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names
        for name in names:
            raw = getattr(layer, name)
            delattr(layer, name)
            self.register_parameter(f"{name}_raw", raw)
            setattr(layer, name, raw.detach().clone())

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for name in self.names:
            raw = getattr(self, f"{name}_raw")
            setattr(self.layer, name, dropout(raw, 0.5) if self.training else raw.clone())
        return self.layer(*args)


class Hyper(nn.Module):
    """All weights come out of another network: the layer has no parameter of its own."""

    def __init__(self, layer: Layer, _: list[str]) -> None:
        super().__init__()
        self.layer = layer
        self.sizes = {name: weight.shape for name, weight in layer.named_parameters()}
        self.code = nn.Parameter(torch.randn(3))
        self.makers = nn.ModuleDict()
        for name, size in self.sizes.items():
            delattr(layer, name)
            setattr(layer, name, torch.zeros(size))
            self.makers[name] = nn.Linear(3, size.numel())

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for name, size in self.sizes.items():
            setattr(self.layer, name, self.makers[name](self.code).view(size))
        return self.layer(*args)


def old_weight_norm(layer: Layer, names: list[str]) -> nn.Module:
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer, name)
    return layer


def old_spectral_norm(layer: Layer, names: list[str]) -> nn.Module:
    for name in names:
        nn.utils.spectral_norm(layer, name)
    return layer


def pruned(layer: Layer, names: list[str]) -> nn.Module:
    for name in names:
        prune.random_unstructured(layer, name, 0.4)
    return layer


def parametrized_by(parametrization: Callable[[Layer, str], nn.Module]):
    def apply(layer: Layer, names: list[str]) -> nn.Module:
        for name in names:
            parametrization(layer, name)
        return layer

    return apply


def registered(parametrization: type[nn.Module]) -> Callable[[Layer, list[str]], nn.Module]:
    return parametrized_by(
        lambda layer, name: parametrize.register_parametrization(layer, name, parametrization())
    )


HABITS: dict[str, Callable[[Layer, list[str]], nn.Module]] = {
    "old weight_norm": old_weight_norm,
    "weight_norm": parametrized_by(parametrizations.weight_norm),
    "old spectral_norm": old_spectral_norm,
    "spectral_norm": parametrized_by(parametrizations.spectral_norm),
    "prune": pruned,
    "parametrize": registered(Squash),
    "random parametrize": registered(RandomDrop),
    "weight drop": WeightDrop,
    "hypernetwork": Hyper,
}

LAYERS: dict[str, tuple[Callable[[], Layer], list[str]]] = {
    "layer": (lambda: nn.GRU(INPUT, HIDDEN), ["weight_hh_l0"]),
    "stack": (
        lambda: nn.GRU(INPUT, HIDDEN, 2, bidirectional=True, dropout=0.3),
        ["weight_hh_l0", "weight_ih_l1_reverse"],
    ),
    "cell": (lambda: nn.GRUCell(INPUT, HIDDEN), ["weight_hh", "weight_ih"]),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("habit", HABITS)
def test_the_weights_of_the_call_are_recorded(
    habit: str, layer: str, training: bool, tmp_path: Path
) -> None:
    """Two calls, and two training steps: outputs, oracle and controls."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        make, names = LAYERS[layer]
        return HABITS[habit](make(), names)

    model = build().train(training)
    torch.manual_seed(1)
    inputs = torch.randn(2, 3, INPUT) if layer == "cell" else torch.randn(2, 5, 3, INPUT)
    state = torch.randn(3, HIDDEN)

    def run(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        outputs = []
        for input in inputs:
            arguments = (input, state) if layer == "cell" else (input,)
            result = model(*arguments)
            outputs.append(result if isinstance(result, Tensor) else result[0])
            if training:
                outputs[-1].square().mean().backward()
                optimizer.step()
        return outputs

    trace = check_run(model, run, tmp_path, rebuilt(build))
    assert len(trace.calls) == 2
    assert trace[trace.sites[0]].extent.versions == (2 if training else 1)


def test_tied_weights(tmp_path: Path) -> None:
    """Each layer has its own copy in the trace, and both change together."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.GRU(HIDDEN, HIDDEN), nn.GRU(HIDDEN, HIDDEN)])
        model[1].weight_hh_l0 = model[0].weight_hh_l0
        return model

    input = torch.randn(5, 3, HIDDEN)

    def run(model: nn.ModuleList) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        outputs = []
        for _ in range(2):
            outputs.append(model[1](model[0](input)[0])[0])
            outputs[-1].square().mean().backward()
            optimizer.step()
        return outputs

    trace = check_run(build(), run, tmp_path)
    first, second = (trace[site] for site in trace.sites)
    for version in range(2):
        mine, others = first.weights(version), second.weights(version)
        assert (mine["weight_hh"] == others["weight_hh"]).all()
        assert (mine["weight_ih"] != others["weight_ih"]).any()
    assert (first.weights(0)["weight_hh"] != first.weights(1)["weight_hh"]).any()


def test_a_forward_set_on_one_module(tmp_path: Path) -> None:
    """The kernel's input is recorded, whatever forward changes."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.GRU(INPUT, HIDDEN)
        layer.forward = functools.partial(doubled, layer)
        return layer

    def doubled(layer: nn.GRU, input: Tensor) -> tuple[Tensor, Tensor]:
        return nn.GRU.forward(layer, 2 * input)

    input = torch.randn(5, 3, INPUT)
    model = build()
    trace = check_run(model, lambda model: model(input), tmp_path, rebuilt(build))
    assert (trace["l0"].sequence(1).input == 2 * input[:, 1].numpy()).all()


def test_control_reading_a_parametrized_weight_recomputes_it() -> None:
    """Reading it from outside would change it, so the kernel's weights are recorded."""
    cell = nn.GRUCell(INPUT, HIDDEN)
    parametrize.register_parametrization(cell, "weight_hh", RandomDrop())
    assert not torch.equal(cell.weight_hh, cell.weight_hh)
    norm = parametrizations.spectral_norm(nn.GRUCell(INPUT, HIDDEN), "weight_hh")
    before = copy.deepcopy(norm.state_dict())
    norm.weight_hh  # noqa: B018
    assert any(not torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_a_wrapper_that_calls_forward_is_recorded() -> None:
    """The first AWD-LSTM calls `module.forward(...)`, where PyTorch calls no hooks."""

    class GoingRound(WeightDrop):
        def forward(self, *args: Tensor) -> Tensor:
            return self.layer.forward(*args)

    model = GoingRound(nn.GRUCell(INPUT, HIDDEN), ["weight_hh"])
    input = torch.randn(3, INPUT)
    expected = run_once(copy.deepcopy(model), lambda model: model(input))
    with grutrace.trace(model, check="raise") as trace:
        expected.assert_same(run_once(model, lambda model: model(input)))
    assert trace.calls["module"].tolist() == ["layer"]
