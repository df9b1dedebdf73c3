"""Everything that must hold of a traced call, in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import grutrace
from tests import oracles
from tests.strategies import Case

EVERYTHING = ("reset", "update", "candidate", "hidden", "input")


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a layer's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value if part is not None for each in tensors(part)]


def same_result(a: Any, b: Any) -> bool:
    """Whether two results are the same, bit for bit and in their layout in memory."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(
        x.dtype == y.dtype
        and x.stride() == y.stride()
        and x.requires_grad == y.requires_grad
        and torch.equal(x, y)
        for x, y in pairs
    )


def check_untouched_and_exact(case: Case, **options: Any) -> None:
    """Trace a call; the result is the untouched one, and every gate is the oracle's."""
    untouched = case.untouched()
    expected = case.run(untouched)
    generator = torch.get_rng_state()
    with grutrace.trace(case.layer, record=EVERYTHING, check="raise", **options) as trace:
        result = case.run()
    assert torch.equal(torch.get_rng_state(), generator)
    assert same_result(expected, result)
    assert not case.layer._forward_hooks
    assert not case.layer._forward_pre_hooks
    check_gates(case, expected, trace)


def check_gates(case: Case, result: Any, trace: Any) -> None:
    """Compare every site of a trace of one call with the oracles."""
    layer = case.layer
    is_cell = isinstance(layer, nn.GRUCell)
    directions = 2 if not is_cell and layer.bidirectional else 1
    layers = 1 if is_cell else layer.num_layers
    input = case.args[0] if case.args else case.kwargs["input"]
    output = result if is_cell else result[0]
    expected_inputs = oracles.as_sequences(layer, input, layer.input_size)
    top = oracles.as_sequences(layer, output, directions * layer.hidden_size)
    initial = _initial_states(case, len(top), layers * directions)
    drops = layer.training and not is_cell and layer.dropout > 0
    suffixes = [[f"l{n}", f"l{n}_reverse"][:directions] for n in range(layers)]
    if is_cell:
        suffixes = [["cell"]]
    assert list(trace.sites) == [suffix for both in suffixes for suffix in both]
    for number, both in enumerate(suffixes):
        for reverse, suffix in enumerate(both):
            site = trace[suffix]
            assert len(site) == len(top)
            assert site.reset.shape == (sum(map(len, top)), layer.hidden_size)
            for b, sequence in enumerate(site):
                if number == 0:
                    np.testing.assert_array_equal(sequence.input, expected_inputs[b])
                else:
                    below = _below(trace, number, directions, b)
                    _check_input_of_layer(sequence.input, below, layer.dropout if drops else 0.0)
                if number == layers - 1:
                    own = np.split(top[b], directions, axis=1)[reverse]
                    np.testing.assert_array_equal(sequence.hidden, own)
                np.testing.assert_array_equal(
                    sequence.initial, initial[number * directions + reverse, b]
                )
                previous = oracles.previous_states(sequence.hidden, sequence.initial, bool(reverse))
                np.testing.assert_array_equal(sequence.previous, previous)
                check_sequence(sequence, oracles.weights_of(layer, suffix), previous)
        check_against_kernel(case, trace, both)


def check_sequence(sequence: Any, weights: oracles.Weights, previous: np.ndarray) -> None:
    """Compare the gates and states of one sequence with the float64 oracle."""
    eps = float(np.finfo(sequence.hidden.dtype).eps)
    expected = oracles.gates(weights, sequence.input, previous, eps)
    for quantity in ("reset", "update", "candidate", "hidden"):
        off = np.abs(getattr(sequence, quantity).astype(np.float64) - expected.values[quantity])
        assert (off <= expected.bounds[quantity]).all(), (quantity, off.max())


def check_against_kernel(case: Case, trace: Any, suffixes: list[str]) -> None:
    """Compare the gates of one layer, both directions, with those that the kernel used.

    The layer is run once more on its own, on the recorded inputs, from the recorded states. That
    must give the recorded states bit for bit, so the gates are those of the traced run.
    """
    sites = [trace[suffix] for suffix in suffixes]
    if not len(sites[0]):
        return
    alone, result, kernel = _run_alone(case.layer, sites)
    for quantity, used in (("hidden", result), *kernel.items()):
        sequences = oracles.as_sequences(alone, used, len(sites) * case.layer.hidden_size)
        for b, both in enumerate(sequences):
            for site, suffix, own in zip(
                sites, suffixes, np.split(both, len(sites), axis=1), strict=True
            ):
                recorded = site.sequence(b)
                if quantity == "hidden":
                    np.testing.assert_array_equal(recorded.hidden, own)
                    continue
                weights = oracles.weights_of(case.layer, suffix)
                eps = float(np.finfo(own.dtype).eps)
                bound = oracles.gates(weights, recorded.input, recorded.previous, eps).bounds
                off = np.abs(getattr(recorded, quantity) - own)
                assert (off <= 2 * bound[quantity]).all(), (quantity, off.max())


def _run_alone(
    layer: nn.GRU | nn.GRUCell, sites: list[Any]
) -> tuple[nn.GRU | nn.GRUCell, Any, dict[str, Any]]:
    """Run one layer on what its sites recorded: the layer, its output, and the kernel's gates."""
    inputs = [torch.tensor(sequence.input) for sequence in sites[0]]
    initial = torch.stack([torch.tensor(np.asarray(site.initial)) for site in sites])
    if isinstance(layer, nn.GRUCell):
        output = layer(torch.cat(inputs), initial[0])
        return layer, output, oracles.harvest(output.grad_fn)
    alone = nn.GRU(
        inputs[0].shape[1], layer.hidden_size, 1, layer.bias, False, 0.0, len(sites) == 2
    )
    alone.to(inputs[0].dtype)
    with torch.no_grad():
        for site in sites:
            ending = site.name.replace(f"l{site.site.layer}", "l0")
            for name, weight in oracles.weights_of(layer, site.name).items():
                getattr(alone, f"{name}_{ending}").copy_(torch.from_numpy(weight))
    if len({len(each) for each in inputs}) == 1:
        output, _ = alone(torch.stack(inputs, 1), initial)
        return alone, output, oracles.harvest(output.grad_fn)
    packed, _ = alone(pack_sequence(inputs, enforce_sorted=False), initial)
    gates = oracles.harvest(packed.data.grad_fn)
    return alone, packed, {name: packed._replace(data=value) for name, value in gates.items()}


def _initial_states(case: Case, batch: int, states: int) -> np.ndarray:
    """(L * D, B, H): what was given as hx, or zeros."""
    if case.initial is None:
        dtype = next(case.layer.parameters()).dtype
        return torch.zeros(states, batch, case.layer.hidden_size, dtype=dtype).numpy()
    return case.initial.numpy().reshape(states, batch, case.layer.hidden_size)


def _below(trace: Any, layer: int, directions: int, sequence: int) -> np.ndarray:
    """What the layer below made of a sequence, forward direction first."""
    suffixes = [f"l{layer - 1}", f"l{layer - 1}_reverse"][:directions]
    return np.concatenate([trace[each].sequence(sequence).hidden for each in suffixes], axis=1)


def _check_input_of_layer(input: np.ndarray, below: np.ndarray, dropout: float) -> None:
    """Check that a layer read what the one below made, dropped out element by element."""
    if not dropout:
        np.testing.assert_array_equal(input, below)
        return
    dropped = input == 0
    eps = float(np.finfo(input.dtype).eps)
    kept = np.abs(input - below / (1 - dropout)) <= 4 * eps * np.abs(input)
    assert (dropped | kept).all()
