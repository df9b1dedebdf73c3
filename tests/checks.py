"""Check everything that must hold for a traced call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import grutrace
from tests import oracles
from tests.strategies import Case

EVERYTHING = ("reset", "update", "candidate", "hidden", "input")


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a layer's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in tensors(part)]


def rounding(*sites: Any) -> np.ndarray:
    """(rows, 1) by how much gates of the same rows may differ that were computed apart.

    It is the largest of the tolerances that the traces keep with the call of each row: a harvested
    call has none for products, and a deferred one has none at all.
    """
    results = [site.row_checks()["tolerance"] for site in sites]
    return np.asarray(np.fmax.reduce(results)[:, np.newaxis])


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
    """Trace a call; the result is unchanged, and every gate equals the oracle's."""
    expected, trace = check_untouched(case, **options)
    check_gates(case, expected, trace)


def check_untouched(case: Case, **options: Any) -> tuple[Any, Any]:
    """Trace a call; check that its result is unchanged, and return the result and the trace."""
    untouched = case.untouched()
    expected = case.run(untouched)
    generator = torch.get_rng_state()
    with grutrace.trace(case.layer, record=EVERYTHING, check="raise", **options) as trace:
        result = case.run()
    assert torch.equal(torch.get_rng_state(), generator)
    assert same_result(expected, result)
    assert not case.layer._forward_hooks
    assert not case.layer._forward_pre_hooks
    return expected, trace


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
    check_against_kernel(case, result, trace)


def check_sequence(sequence: Any, weights: oracles.Weights, previous: np.ndarray) -> None:
    """Compare the gates and states of one sequence with the float64 oracle."""
    eps = float(np.finfo(sequence.hidden.dtype).eps)
    expected = oracles.gates(weights, sequence.input, previous, eps)
    for quantity in ("reset", "update", "candidate", "hidden"):
        off = np.abs(getattr(sequence, quantity).astype(np.float64) - expected.values[quantity])
        assert (off <= expected.bounds[quantity]).all(), (quantity, off.max())


def check_against_kernel(case: Case, result: Any, trace: Any) -> None:
    """Compare every gate with the one that the kernel used in the untraced run."""
    layer = case.layer
    output = result if isinstance(layer, nn.GRUCell) else result[0]
    data = output.data if isinstance(output, PackedSequence) else output
    if not data.numel():
        return
    directions = 2 if isinstance(layer, nn.GRU) and layer.bidirectional else 1
    width = directions * layer.hidden_size
    kernel = oracles.harvest_layers(data.grad_fn, width)
    in_kernel_layout = layer if isinstance(layer, nn.GRUCell) else nn.GRU(1, 1)
    suffixes = list(trace.sites)
    assert len(kernel) * directions == len(suffixes)
    for index, suffix in enumerate(suffixes):
        number, reverse = divmod(index, directions)
        for quantity, used in kernel[number].items():
            half = used.dtype in (torch.float16, torch.bfloat16)
            used = used.float() if half else used
            whole = output._replace(data=used) if isinstance(output, PackedSequence) else used
            sequences = oracles.as_sequences(in_kernel_layout, whole, width)
            for b, both in enumerate(sequences):
                own = np.split(both, directions, axis=1)[reverse]
                sequence = trace[suffix].sequence(b)
                off = np.abs(getattr(sequence, quantity).astype(own.dtype) - own)
                if half:
                    # The oracle's bound is for sums that are made in the same type.
                    assert off.max() <= trace[suffix].checks["tolerance"].max()
                    continue
                weights = oracles.weights_of(layer, suffix)
                eps = float(np.finfo(own.dtype).eps)
                expected = oracles.gates(weights, sequence.input, sequence.previous, eps)
                assert (off <= 2 * expected.bounds[quantity]).all(), (quantity, off.max())


def _initial_states(case: Case, batch: int, states: int) -> np.ndarray:
    """(L * D, B, H): the hx of the call, or zeros."""
    if case.initial is None:
        dtype = next(case.layer.parameters()).dtype
        return torch.zeros(states, batch, case.layer.hidden_size, dtype=dtype).numpy()
    return case.initial.numpy().reshape(states, batch, case.layer.hidden_size)


def _below(trace: Any, layer: int, directions: int, sequence: int) -> np.ndarray:
    """The output of the layer below for a sequence, forward direction first."""
    suffixes = [f"l{layer - 1}", f"l{layer - 1}_reverse"][:directions]
    return np.concatenate([trace[suffix].sequence(sequence).hidden for suffix in suffixes], axis=1)


def _check_input_of_layer(input: np.ndarray, below: np.ndarray, dropout: float) -> None:
    """Check that a layer's input is the output of the one below, after dropout."""
    if not dropout:
        np.testing.assert_array_equal(input, below)
        return
    dropped = input == 0
    eps = float(np.finfo(input.dtype).eps)
    unchanged = np.abs(input - below / (1 - dropout)) <= 4 * eps * np.abs(input)
    assert (dropped | unchanged).all()
