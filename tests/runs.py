"""Check everything that must hold for a model that is traced while it runs.

The model is run four times from the same seed: left alone; left alone with its kernel calls noted
by a spy; traced in memory; traced to a file. All four must agree bit for bit, the trace must hold
just what the spy noted, and every gate must be the float64 oracle's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import grutrace
from grutrace.analysis.verification.verify import verify
from tests import oracles
from tests.checks import EVERYTHING, tensors
from tests.test_both_sinks import assert_same

#: Runs a model and returns what it made: tensors, or tuples and lists of them.
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class KernelCall:
    """Inputs and outputs of one call of torch.gru or torch.gru_cell, as NumPy arrays.

    Attributes:
        inputs: The bottom layer's input, one (T, I) array a sequence, in the kernel's order.
        outputs: The top layer's states, one (T, D * H) array a sequence, likewise.
        initial: (L * D, B, H).
        weights: Flat, as the kernel took them.
    """

    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    initial: np.ndarray
    weights: list[np.ndarray]


class Spy(TorchFunctionMode):
    """Records every kernel call without changing it. Written from torch.gru's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[KernelCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.gru, torch.gru_cell):
            return func(*args, **(kwargs or {}))
        arguments = [_numpy(argument) for argument in args]
        result = func(*args, **(kwargs or {}))
        self.calls.append((_cell if func is torch.gru_cell else _layer)(arguments, _numpy(result)))
        return result


def _numpy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().numpy()
    return [_numpy(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cell(arguments: list[Any], output: np.ndarray) -> KernelCall:
    input, initial, *weights = arguments
    weights = [weight for weight in weights if weight is not None]
    rows = [row[np.newaxis] for row in input], [row[np.newaxis] for row in output]
    return KernelCall(*rows, initial[np.newaxis], weights)


def _layer(arguments: list[Any], result: list[Any]) -> KernelCall:
    output = result[0]
    if isinstance(arguments[2], np.ndarray):
        data, batch_sizes, initial, weights = arguments[:4]
        both = [_unpack(data, batch_sizes), _unpack(output, batch_sizes)]
        return KernelCall(*both, initial, weights)
    input, initial, weights = arguments[:3]
    if arguments[-1]:
        return KernelCall(list(input), list(output), initial, weights)
    return KernelCall(list(input.swapaxes(0, 1)), list(output.swapaxes(0, 1)), initial, weights)


def _unpack(data: np.ndarray, batch_sizes: np.ndarray) -> list[np.ndarray]:
    """Split the rows of a packed batch: those of step t begin where those of t - 1 end."""
    starts = np.concatenate([[0], np.cumsum(batch_sizes)[:-1]])
    lengths = [(batch_sizes > b).sum() for b in range(batch_sizes[0])]
    return [data[starts[:length] + b] for b, length in enumerate(lengths)]


@dataclass(frozen=True)
class Outcome:
    """Results of a run, and the state of the process afterwards."""

    result: list[Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]
    generator: Tensor

    def assert_same(self, other: Outcome) -> None:
        """Compare bit for bit."""
        for a, b in zip(self.result, other.result, strict=True):
            assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
            assert torch.equal(a, b)
        _assert_same_tensors(self.gradients, other.gradients)
        _assert_same_tensors(self.state, other.state)
        assert torch.equal(self.generator, other.generator)


def _assert_same_tensors(
    mine: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None]
) -> None:
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        other = others[name]
        assert (value is None) == (other is None), name
        assert value is None or other is None or torch.equal(value, other), name


def _hooks(model: nn.Module) -> list[tuple[list[Any], list[Any]]]:
    return [
        (list(module._forward_hooks.values()), list(module._forward_pre_hooks.values()))
        for module in model.modules()
    ]


def run_once(model: nn.Module, run: Run, seed: int = 0) -> Outcome:
    """Run a model from a fixed state of the generator."""
    torch.manual_seed(seed)
    result = tensors(run(model))
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    values = model.state_dict().items()
    state = {name: value.clone() for name, value in values if isinstance(value, Tensor)}
    return Outcome(result, gradients, state, torch.get_rng_state())


def rebuilt(build: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Return a way to copy a model that copy.deepcopy cannot: build it anew and load its state."""

    def duplicate(model: nn.Module) -> nn.Module:
        other = build()
        other.load_state_dict(model.state_dict())
        return other.train(model.training)

    return duplicate


def check_run(
    model: nn.Module, run: Run, folder: Path, duplicate: Callable[[Any], Any] = copy.deepcopy
) -> grutrace.Tracer:
    """Check a model in all ways above, and return the trace in memory.

    Args:
        model: The model.
        run: Calls it as its users do.
        folder: Where the file goes.
        duplicate: Makes a copy of the model that shares nothing with it.
    """
    copies = [duplicate(model) for _ in range(3)]
    expected = run_once(copies[0], run)
    with Spy() as spy:
        expected.assert_same(run_once(copies[1], run))
    hooks = _hooks(model)
    with grutrace.trace(model, record=EVERYTHING, check="raise") as trace:
        outcome = run_once(model, run)
    expected.assert_same(outcome)
    assert _hooks(model) == hooks

    path = folder / "run.h5"
    with grutrace.trace(copies[2], path, record=EVERYTHING, check="raise"):
        expected.assert_same(run_once(copies[2], run))
    with grutrace.open(path) as stored:
        assert_same(trace, stored)
        result = verify(stored)
    assert [verified.site for verified in result] == list(trace.sites)
    assert all(verified.holds and verified.check == "gates" for verified in result)

    check_calls(trace, spy.calls)
    check_gates(trace)
    check_that_it_can_fail(trace)
    return trace


def check_calls(trace: Any, calls: list[KernelCall]) -> None:
    """Compare each recorded call with the kernel's inputs and outputs."""
    assert len(trace.calls) == len(calls) > 0
    modules = {module.path: module for module in trace.modules}
    for number, (row, call) in enumerate(zip(trace.calls, calls, strict=True)):
        module = modules[row["module"]]
        sites = [trace[site.name] for site in module.sites]
        assert row["batch"] == len(call.inputs)
        assert row["steps"] == sum(map(len, call.inputs))
        per_cell = len(call.weights) // len(sites)
        for cell, site in enumerate(sites):
            stored = site.weights(row["weights"])
            for name, used in zip(stored, call.weights[per_cell * cell :], strict=False):
                np.testing.assert_array_equal(stored[name], used)
        _check_rows_of_call(sites, number, call)


def _check_rows_of_call(sites: list[Any], number: int, call: KernelCall) -> None:
    """Each recorded sequence is one of the kernel's: same input, states and initial states."""
    directions = 2 if any(site.site.reverse for site in sites) else 1
    recorded = [pieces_of_call(site, number) for site in sites]
    top = recorded[-directions:]
    expected = sorted(
        (input.tobytes(), output.tobytes(), call.initial[:, b].tobytes())
        for b, (input, output) in enumerate(zip(call.inputs, call.outputs, strict=True))
    )
    result = sorted(
        (
            recorded[0][b].input.tobytes(),
            np.concatenate([steps[b].hidden for steps in top], 1).tobytes(),
            np.stack([steps[b].start for steps in recorded]).tobytes(),
        )
        for b in range(len(recorded[0]))
    )
    assert result == expected


@dataclass(frozen=True)
class Piece:
    """The rows of one sequence in one call at one site: (T, H) or (T, I) each.

    ``start`` (H,) is the state before the first step that was made, ``previous`` that before each.
    """

    input: np.ndarray
    reset: np.ndarray
    update: np.ndarray
    candidate: np.ndarray
    hidden: np.ndarray
    previous: np.ndarray
    start: np.ndarray


def pieces_of_call(site: Any, number: int) -> list[Piece]:
    """The rows of a call at a site, one piece per sequence, in the order of the batch."""
    rows = np.flatnonzero(site.row_calls() == number)
    sequences = [site.locate(int(row))[0] for row in rows]
    splits = np.flatnonzero(np.diff(sequences)) + 1
    before = site.previous()
    pieces = []
    for of_sequence in np.split(rows, splits):
        values = {name: site.rows(name)[of_sequence] for name in EVERYTHING}
        start = before[of_sequence[-1 if site.site.reverse else 0]]
        previous = oracles.previous_states(values["hidden"], start, site.site.reverse)
        np.testing.assert_array_equal(before[of_sequence], previous)
        pieces.append(Piece(**values, previous=previous, start=start))
    return pieces


def check_gates(trace: Any) -> None:
    """Compare every gate and state of every site, call and sequence with the float64 oracle."""
    checked = 0
    for site, weights, piece in every_piece(trace):
        check_piece(piece, weights)
        checked += len(piece.hidden)
        assert np.isfinite(piece.hidden).all(), site
    assert checked == sum(int(trace[name].lengths.sum()) for name in trace.sites) > 0


def every_piece(trace: Any) -> Iterator[tuple[str, oracles.Weights, Piece]]:
    """Name of site, weights that the call used, and rows, of every sequence of every call."""
    for name in trace.sites:
        site = trace[name]
        for number in np.unique(site.row_calls()):
            weights = site.weights(trace.calls["weights"][number])
            for piece in pieces_of_call(site, number):
                yield name, weights, piece


def check_piece(piece: Piece, weights: oracles.Weights) -> None:
    """Compare with the oracle, teacher-forced from the states that the kernel returned."""
    eps = float(np.finfo(piece.hidden.dtype).eps)
    expected = oracles.gates(weights, piece.input, piece.previous, eps)
    for quantity in ("reset", "update", "candidate", "hidden"):
        off = np.abs(getattr(piece, quantity).astype(np.float64) - expected.values[quantity])
        assert (off <= expected.bounds[quantity]).all(), (quantity, off.max())


def check_that_it_can_fail(trace: Any) -> None:
    """Controls: a small error is detected at every site, in at least one sequence."""
    unnoticed = {(name, control) for name in trace.sites for control in CONTROLS}
    for name, weights, piece in every_piece(trace):
        for control, spoil in CONTROLS.items():
            if (name, control) in unnoticed and not _holds(*spoil(piece, weights)):
                unnoticed.remove((name, control))
    assert not unnoticed, unnoticed


def _swap_gates(piece: Piece, weights: oracles.Weights) -> tuple[Piece, oracles.Weights]:
    return replace(piece, reset=piece.update, update=piece.reset), weights


def _perturb_weights(piece: Piece, weights: oracles.Weights) -> tuple[Piece, oracles.Weights]:
    return piece, weights | {"weight_hh": weights["weight_hh"] * 1.01 + 1e-3}


def _shift_states(piece: Piece, weights: oracles.Weights) -> tuple[Piece, oracles.Weights]:
    return replace(piece, previous=np.roll(piece.previous, 1, axis=1)), weights


#: Ways to be wrong: each spoils the rows of a sequence, or its weights.
CONTROLS = {"swapped": _swap_gates, "weights": _perturb_weights, "states": _shift_states}


def _holds(piece: Piece, weights: oracles.Weights) -> bool:
    try:
        check_piece(piece, weights)
    except AssertionError:
        return False
    return True
