"""Gates are tensors in the model's graph: values and gradients equal those of a Python loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grutrace
from tests.capture.differentiable.lattice import (
    LATTICE,
    Kind,
    Problem,
    joined,
    joined_gradients,
    largest_difference,
    leaf_gradients,
)

TOLERANCE = 1e-10

#: A loss on each quantity, so that no term hides another.
QUANTITIES = ("reset", "update", "candidate", "hidden")
GATES = ("reset", "update", "candidate")


def penalty(rows: dict[str, Tensor]) -> Tensor:
    """A loss on gates, pre-activations and states that weighs every element differently."""
    terms = []
    for number, (name, values) in enumerate(sorted(rows.items())):
        weights = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)
        terms.append(((values + 0.1 * number).square() * weights).sum())
        assert name
    return torch.stack(terms).sum()


def names(suffixes: list[str]) -> list[tuple[str, str]]:
    return [(suffix, name) for suffix in suffixes for name in QUANTITIES]


@pytest.mark.parametrize("kind", LATTICE, ids=str)
@pytest.mark.parametrize("with_task", [False, True], ids=["gates only", "gates and task"])
def test_a_loss_on_gates_has_autograds_gradients(kind: Kind, with_task: bool) -> None:
    problem = Problem(kind)
    with grutrace.trace(problem.layer, differentiable=True, check="raise") as trace:
        task, inputs, initial = problem.run()
    rows = {
        f"{suffix} {name}": trace[suffix].rows(name) for suffix, name in names(problem.suffixes)
    }
    rows |= {
        f"{suffix} {name} before": trace[suffix].preactivation(name)
        for suffix in problem.suffixes
        for name in GATES
    }
    (penalty(rows) + (task if with_task else 0)).backward()

    expected_task, expected_inputs, expected_initial, loops, layer = problem.loop()
    expected_rows = {
        f"{suffix} {name}": joined(loops[suffix], name) for suffix, name in names(problem.suffixes)
    }
    expected_rows |= {
        f"{suffix} {name} before": joined(loops[suffix], f"{name}_preactivation")
        for suffix in problem.suffixes
        for name in GATES
    }
    (penalty(expected_rows) + (expected_task if with_task else 0)).backward()

    assert largest_difference([*rows.values()], [*expected_rows.values()]) < TOLERANCE
    found = leaf_gradients(problem.layer, inputs, initial)
    expected = leaf_gradients(layer, expected_inputs, expected_initial)
    assert largest_difference(found, expected) < TOLERANCE
    # The control: another loss has other gradients.
    assert largest_difference(found, [2 * gradient for gradient in expected]) > 1e-3


@pytest.mark.parametrize("kind", LATTICE, ids=str)
@pytest.mark.parametrize("uses", ["both", "output", "final"])
def test_the_gradient_of_a_loss_equals_autograds(kind: Kind, uses: str) -> None:
    problem = Problem(kind)
    with grutrace.trace(problem.layer, differentiable=True) as trace:
        loss, *_ = problem.run(uses=uses)
    expected_loss, *_, loops, _ = problem.loop(uses=uses)
    assert loss.allclose(expected_loss)
    expected_loss.backward()
    for suffix in problem.suffixes:
        site, of_site = trace[suffix], loops[suffix]
        for name in (*QUANTITIES, "input"):
            found = site.gradient(name, of=loss)
            assert not found.requires_grad
            assert largest_difference([found], [joined_gradients(of_site, name)]) < TOLERANCE
        for name in GATES:
            found = site.gradient(name, of=loss, preactivation=True)
            expected = joined_gradients(of_site, f"{name}_preactivation")
            assert largest_difference([found], [expected]) < TOLERANCE
    # The graph is kept, so the user's own backward follows.
    loss.backward()


def test_control_the_gradient_of_another_loss_differs() -> None:
    problem = Problem(Kind("padded", 3, True))
    with grutrace.trace(problem.layer, differentiable=True) as trace:
        loss, *_ = problem.run()
    *_, loops, _ = problem.loop()
    expected_loss, *_, loops, _ = problem.loop(uses="final")
    expected_loss.backward()
    found = trace["l0"].gradient("update", of=loss)
    assert largest_difference([found], [joined_gradients(loops["l0"], "update")]) > 1e-3


@pytest.mark.parametrize("kind", LATTICE, ids=str)
def test_the_models_own_gradients_are_the_same_bits(kind: Kind) -> None:
    problem = Problem(kind, dtype=torch.float32)
    untouched = copy.deepcopy(problem.layer)
    expected, inputs, initial = problem.run(untouched)
    expected.backward()
    expected_gradients = leaf_gradients(untouched, inputs, initial)
    with grutrace.trace(problem.layer, differentiable=True) as trace:
        loss, inputs, initial = problem.run()
        for suffix in problem.suffixes:
            assert trace[suffix].update.requires_grad
            trace[suffix].gradient("update", of=loss)
        loss.backward()
    found = [gradient.clone() for gradient in leaf_gradients(problem.layer, inputs, initial)]
    problem.layer.zero_grad()
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, found, expected_gradients))
    # The control: a loss on a gate changes them.
    with grutrace.trace(problem.layer, differentiable=True) as trace:
        loss, inputs, initial = problem.run()
        (loss + 1e-3 * trace[problem.suffixes[0]].update.sum()).backward()
    found = leaf_gradients(problem.layer, inputs, initial)
    assert not all(map(torch.equal, found, expected_gradients))


def test_gradcheck() -> None:
    """PyTorch's own numerical check of the gate as a function of input, state and weights."""
    torch.manual_seed(0)
    layer = nn.GRU(2, 2, 2, bidirectional=True).double()
    input = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    trace = grutrace.trace(layer, differentiable=True, keep="last")

    def gates(input: Tensor, initial: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        layer(input, initial)
        sites = [trace[name] for name in trace.sites]
        return tuple(site.rows(name) for site in sites for name in GATES)

    with trace:
        assert torch.autograd.gradcheck(gates, (input, initial, *parameters))
        # Second derivatives, where the kernel's own backward has them: on a CPU.
        assert torch.autograd.gradgradcheck(gates, (input, initial))


class Decoder(nn.Module):
    """Feeds its own output back, step by step, through a cell or a layer of one step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rnn: Any = nn.GRUCell(3, 3) if kind == "cell" else nn.GRU(3, 3, 2)

    def forward(self, x: Tensor, h: Tensor, steps: int, *, detach: bool) -> list[Tensor]:
        states = []
        for _ in range(steps):
            if detach:
                h = h.detach()
            if self.kind == "cell":
                x = h = self.rnn(x, h)
            else:
                output, h = self.rnn(x[None], h)
                x = output[0]
            states.append(h)
        return states


def make_decoder(kind: str) -> tuple[Decoder, int, Tensor, Tensor]:
    """Return a decoder in float64, its number of layers, its first input and its initial state."""
    torch.manual_seed(0)
    model = Decoder(kind).double()
    layers = 1 if kind == "cell" else 2
    x = torch.randn(2, 3, dtype=torch.float64)
    h = torch.randn(*(() if kind == "cell" else (2,)), 2, 3, dtype=torch.float64)
    return model, layers, x, h


@pytest.mark.parametrize("kind", ["cell", "layer"])
@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_a_decoder_step_by_step(kind: str, detach: bool) -> None:
    model, layers, x, h = make_decoder(kind)
    with grutrace.trace(model, differentiable=True, check="raise") as trace:
        loss = torch.stack([state.pow(3).sum() for state in model(x, h, 5, detach=detach)]).sum()
    expected_loss, steps = decoder_loop(model, x, h, 5, layers, detach=detach)
    expected_loss.backward()
    for layer in range(layers):
        site = trace["rnn.cell" if kind == "cell" else f"rnn.l{layer}"]
        assert (len(site), site.lengths.tolist()) == (2, [5, 5])
        for name in (*QUANTITIES, "input"):
            found = site.gradient(name, of=loss)
            # Rows are in the order of the calls, and in each by sequence.
            expected = torch.cat([gradient_of(step[layer][name]) for step in steps])
            assert largest_difference([found], [expected]) < TOLERANCE
        values = torch.stack([step[layer]["update"][1] for step in steps])
        assert largest_difference([site.sequence(1).update], [values]) < TOLERANCE
        padded, lengths = site.padded("update")
        assert torch.equal(padded[1], site.sequence(1).update)
        assert lengths.tolist() == [5, 5]


def test_control_attached_and_detached_decoders_differ() -> None:
    torch.manual_seed(0)
    model = Decoder("cell").double()
    x, h = torch.randn(2, 2, 3, dtype=torch.float64)
    gradients = []
    for detach in (False, True):
        with grutrace.trace(model, differentiable=True) as trace:
            states = model(x, h, 5, detach=detach)
        gradients.append(trace["rnn.cell"].gradient("update", of=states[-1].sum()))
    assert largest_difference(gradients[:1], gradients[1:]) > 1e-3


def gradient_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def decoder_loop(
    model: Decoder, x: Tensor, h: Tensor, count: int, layers: int, *, detach: bool
) -> tuple[Tensor, list[list[dict[str, Tensor]]]]:
    """The decoder by the equations: its loss, and the tensors of each step and layer."""
    from tests.gradients.oracle import step

    states = [h] if layers == 1 else list(h)
    loss, steps = torch.zeros((), dtype=x.dtype), []
    for _ in range(count):
        of_step = []
        for layer in range(layers):
            x = x.clone().requires_grad_() if not x.requires_grad else x.clone()
            x.retain_grad()
            suffix = "" if layers == 1 else f"_l{layer}"
            state = states[layer].detach() if detach else states[layer]
            tensors = step(model.rnn, x, state, suffix)
            tensors["input"] = x
            x = states[layer] = tensors["hidden"]
            loss = loss + states[layer].pow(3).sum()
            of_step.append(tensors)
        steps.append(of_step)
    return loss, steps
