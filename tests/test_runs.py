"""Tests of the checks in tests/runs.py: each detects its kind of error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import grutrace
from tests.checks import EVERYTHING
from tests.leaks import kernels_are_overridden
from tests.runs import KernelCall, Spy, check_calls, check_run, run_once


@pytest.fixture
def model() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(4, 6, 2, bidirectional=True)


@pytest.fixture
def packed() -> PackedSequence:
    torch.manual_seed(0)
    return pack_sequence([torch.randn(steps, 4) for steps in (2, 5, 3)], enforce_sorted=False)


@pytest.fixture
def calls(model: nn.GRU, packed: PackedSequence) -> list[KernelCall]:
    with Spy() as spy:
        model(packed)
        model(packed.data[:4], torch.randn(4, 6))
    return spy.calls


@pytest.fixture
def trace(model: nn.GRU, packed: PackedSequence, calls: list[KernelCall]) -> Any:
    with grutrace.trace(model, record=EVERYTHING) as trace:
        model(packed)
        model(packed.data[:4], torch.tensor(calls[1].initial[:, 0]))
    return trace


def test_the_spy_records_the_kernels_inputs_and_outputs(
    model: nn.GRU, packed: PackedSequence, calls: list[KernelCall]
) -> None:
    output, _ = model(packed)
    assert [len(input_) for input_ in calls[0].inputs] == [5, 3, 2]
    rows = [input_[0] for input_ in calls[0].inputs]
    np.testing.assert_array_equal(rows, packed.data[:3].numpy())
    rows = [output[-1] for output in calls[0].outputs]
    ends = output.data[[9, 7, 5]].detach().numpy()
    np.testing.assert_array_equal(rows, ends)
    for used, weight in zip(calls[0].weights, model.parameters(), strict=True):
        np.testing.assert_array_equal(used, weight.detach().numpy())


def test_calls_are_compared(trace: Any, calls: list[KernelCall]) -> None:
    check_calls(trace, calls)


def swapped(arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [arrays[0][::-1], *arrays[1:]]


WRONG: dict[str, Callable[[list[KernelCall]], list[KernelCall]]] = {
    "a call too few": lambda calls: calls[:1],
    "order": lambda calls: calls[::-1],
    "input": lambda calls: [replace(calls[0], inputs=swapped(calls[0].inputs)), calls[1]],
    "states": lambda calls: [replace(calls[0], outputs=swapped(calls[0].outputs)), calls[1]],
    "initial": lambda calls: [calls[0], replace(calls[1], initial=calls[1].initial + 1e-7)],
    "weights": lambda calls: [calls[0], replace(calls[1], weights=swapped(calls[1].weights))],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_control_wrong_calls_are_detected(wrong: str, trace: Any, calls: list[KernelCall]) -> None:
    with pytest.raises(AssertionError):
        check_calls(trace, WRONG[wrong](calls))


class Peeking(nn.Module):
    """Behaves differently while it is traced."""

    def __init__(self, changes: str) -> None:
        super().__init__()
        self.changes = changes
        self.rnn = nn.GRU(4, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.rnn(input)[0]
        if kernels_are_overridden():
            if self.changes == "output":
                output = output + 1e-7
            if self.changes == "generator":
                torch.rand(1)
            if self.changes == "gradient":
                output.register_hook(lambda gradient: 2 * gradient)
            if self.changes == "state":
                self.count += 1
        return output


@pytest.mark.parametrize("changes", ["output", "generator", "gradient", "state"])
def test_control_a_changed_model_is_detected(changes: str, tmp_path: Path) -> None:
    input = torch.randn(5, 3, 4)

    def run(model: Peeking) -> Tensor:
        output = model(input)
        output.square().mean().backward()
        return output

    with pytest.raises(AssertionError):
        check_run(Peeking(changes), run, tmp_path)
    check_run(Peeking("nothing"), run, tmp_path)


def test_control_another_seed_gives_other_results() -> None:
    model = nn.Dropout(0.5)
    with pytest.raises(AssertionError):
        run_once(model, lambda model: model(torch.ones(50))).assert_same(
            run_once(model, lambda model: model(torch.ones(50)), seed=1)
        )
