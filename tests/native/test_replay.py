"""Compiled gates, residuals and copies, against float64 NumPy and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from grutrace.gru import gate_copies, kernel_gates
from grutrace.gru.cell import Products
from grutrace.gru.compiled_replay import Grouping, replay_products
from grutrace.gru.gate_copies import CallShape, CompiledCopies, TorchCopies
from grutrace.gru.residual import copy_states, max_residual
from grutrace.records import GATES
from tests.instruction_sets import INSTRUCTION_SETS

COMPILED = [name for name in INSTRUCTION_SETS if name != "none"]
pytestmark = pytest.mark.skipif(not COMPILED, reason="there is no compiled library")


def each_set(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with each instruction set."""
    use = pytest.mark.parametrize("instruction_set", COMPILED, indirect=True)
    return pytest.mark.usefixtures("instruction_set")(use(test))


#: Smallest normal float32. Below it an ulp says nothing of the relative error.
TINY = float(np.finfo(np.float32).tiny)


def ulps(values: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact float32."""
    normal = np.abs(exact) >= TINY
    spacing = np.spacing(np.abs(exact[normal]).astype(np.float32)).astype(np.float64)
    return float((np.abs(values[normal] - exact[normal]) / spacing).max())


def replayed(input, hidden, previous, states, grouping=Grouping.ALL):
    gates = {name: torch.empty_like(states) for name in GATES}
    checks = replay_products(Products(input, hidden), previous, states, gates, grouping)
    assert checks is not None
    return gates, checks


@each_set
def test_sigmoid_and_tanh_are_within_two_ulps() -> None:
    rng = np.random.default_rng(0)
    parts = [
        np.linspace(-100, 100, 300_000),
        np.linspace(-9, 9, 400_000),
        rng.choice([-1, 1], 99_996) * 10.0 ** rng.uniform(-37, 1.9, 99_996),
    ]
    values = torch.from_numpy(np.concatenate(parts).astype(np.float32)).reshape(-1, 4)
    products = values.repeat(1, 3)
    zeros = torch.zeros_like(values)
    gates, _ = replayed(products, torch.zeros_like(products), zeros, zeros)
    exact = values.double().numpy()
    with np.errstate(over="ignore"):
        assert ulps(gates["reset"].numpy(), 1 / (1 + np.exp(-exact))) <= 2
    assert torch.equal(gates["reset"], gates["update"])
    assert ulps(gates["candidate"].numpy(), np.tanh(exact)) <= 2
    # The control: one more ulp is noticed.
    off = np.nextafter(np.nextafter(gates["reset"].numpy(), 9), np.float32(9))
    with np.errstate(over="ignore"):
        assert ulps(off, 1 / (1 + np.exp(-exact))) > 2


def test_every_instruction_set_and_position_gives_the_same_bits(monkeypatch, request) -> None:
    from grutrace.native import library

    torch.manual_seed(0)
    products = Products(torch.randn(40, 3 * 37), torch.randn(40, 3 * 37))
    previous, states = torch.randn(2, 40, 37)
    found = []
    for name in COMPILED:
        monkeypatch.setenv(library.VARIABLE, name)
        library.load.cache_clear()
        found.append(replayed(*products, previous, states)[0])
        # One unit, which is the rest of a row, has the same bits as within it.
        column = Products(*(product[:, 5::37].contiguous() for product in products))
        alone, _ = replayed(*column, previous[:, 5:6], states[:, 5:6])
        assert all(torch.equal(alone[gate][:, 0], found[-1][gate][:, 5]) for gate in GATES)
    monkeypatch.undo()
    library.load.cache_clear()
    assert all(torch.equal(other[gate], found[0][gate]) for other in found for gate in GATES)


@each_set
@pytest.mark.parametrize("units", [1, 4, 16, 21, 64])
@pytest.mark.parametrize("grouping", list(Grouping))
def test_gates_and_checks_equal_the_equations(units, grouping) -> None:
    torch.manual_seed(0)
    steps, batch = 4, 3
    # The states are those of a batch-first layer, whose steps lie one after another.
    input, hidden = 3 * torch.randn(2, steps, batch, 3 * units)
    previous, states = torch.randn(2, batch, steps, units).transpose(1, 2)
    gates, checks = replayed(input, hidden, previous, states, grouping)
    (ir, iz, i_n), (hr, hz, hn) = (np.split(p.double().numpy(), 3, -1) for p in (input, hidden))
    reset, update = 1 / (1 + np.exp(-ir - hr)), 1 / (1 + np.exp(-iz - hz))
    candidate = np.tanh(i_n + reset * hn)
    for name, exact in zip(GATES, (reset, update, candidate), strict=True):
        np.testing.assert_allclose(gates[name].numpy(), exact, rtol=0, atol=4e-6)
    off = np.abs((1 - update) * candidate + update * previous.numpy() - states.numpy())
    axes = {Grouping.ALL: (0, 1, 2), Grouping.STEP: (1, 2), Grouping.ROW: (2,)}[grouping]
    products = torch.maximum(input.abs(), hidden.abs()).amax(-1, keepdim=True).numpy()
    for values, expected in (
        (checks.residual, off),
        (checks.product, products),
        (checks.recurrent, np.abs(hn)),
    ):
        np.testing.assert_allclose(values, expected.max(axes).reshape(-1), rtol=1e-5, atol=1e-5)


@each_set
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_a_value_that_is_not_finite_is_noticed(value, where) -> None:
    tensors = [torch.randn(3, 2, size) for size in (15, 15, 5, 5)]
    tensors[where][1, 1, -1] = value
    _, checks = replayed(*tensors, Grouping.STEP)
    assert np.isnan(checks.residual).tolist() == [False, True, False]


@each_set
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 8), (4, 2, 37)])
def test_copied_states_and_their_residual(shape, dtype, reverse) -> None:
    steps, batch, units = shape
    rng = np.random.default_rng(0)
    update, candidate = rng.random((2, batch * steps, units)).astype(dtype)
    hidden = torch.from_numpy(rng.random((batch, steps, units)).astype(dtype)).transpose(0, 1)
    initial = torch.from_numpy(rng.random((batch, units)).astype(dtype))
    rows = np.empty_like(update)
    residual = copy_states(update, candidate, hidden, initial, rows, reverse=reverse)
    expected = hidden.transpose(0, 1).reshape(-1, units).numpy()
    np.testing.assert_array_equal(rows, expected)
    lengths = np.full(batch, steps)
    oracle = max_residual(update, candidate, expected, initial, lengths, reverse=reverse)
    assert residual == oracle > 0
    hidden[steps // 2, 0, units // 2] = math.nan
    assert copy_states(update, candidate, hidden, initial, rows, reverse=reverse) is None
    assert np.isnan(rows).sum() == 1


@each_set
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [[3] * 5, [3, 3, 2, 1, 1]])
@pytest.mark.parametrize("columns", [range(24), range(8, 16), range(1, 20, 3)])
def test_copied_gates_are_the_same_bits_as_copied_by_torch(
    columns, sizes, bidirectional, monkeypatch
) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(6, 24, bidirectional=bidirectional)
    directions = [False, True] if bidirectional else [False]
    weights = [weight.detach() for weight in layer._flat_weights]
    initial = torch.zeros(len(directions), 3, 24)
    options = (True, 1, 0.0, False, bidirectional)
    padded = sizes[-1] == sizes[0]
    input = torch.randn(*((5, 3, 6) if padded else (sum(sizes), 6)))
    assert kernel_gates.kernel_supported()

    def kernel() -> torch.Tensor:
        if padded:
            return torch.gru(input, initial, weights, *options, batch_first=False)[0]
        return torch.gru(input, torch.tensor(sizes), initial, weights, *options)[0]

    shape = CallShape(sizes, padded, 24, torch.float32)
    wanted = {"reset": columns, "update": columns, "candidate": range(24)}
    made = []
    make = gate_copies.make_copies
    monkeypatch.setattr(
        kernel_gates, "make_copies", lambda *given: made.append(make(*given)) or made[-1]
    )
    _, compiled = kernel_gates.copy_kernel_gates(kernel, shape, directions, wanted)
    monkeypatch.setattr(gate_copies, "load", lambda: None)
    _, plain = kernel_gates.copy_kernel_gates(kernel, shape, directions, wanted)
    assert [type(copies) for copies in made] == [CompiledCopies, TorchCopies]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert all(torch.equal(ours.gates[name], theirs.gates[name]) for name in GATES)
        assert ours.gates["reset"].abs().min() > 0
