"""Constants without gradients, in float32: compiled steps, and steps of PyTorch's operations."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import grutrace
from grutrace.intervention.recurrence import held_steps, shadow
from tests.intervention.loops import run_loop


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which code ran."""
    ran: list[str] = []

    def spy_on(name: str) -> None:
        run = getattr(shadow, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(shadow, name, spy)

    for name in ("run_held_steps", "run_in_place", "run_step"):
        spy_on(name)
    return ran


@pytest.mark.parametrize("steps", [None, slice(2, None), [0, 3, 4]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [3, 16, 37])
@pytest.mark.parametrize("quantity", ["reset", "update", "candidate", "hidden"])
def test_against_a_loop(
    quantity: str, size: int, packed: bool, steps: Any, instruction_set: str, runs: list[str]
) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(4, size, 2, bidirectional=True, bias=size != 16)
    x, initial = torch.randn(6, 3, 4), torch.randn(4, 3, size)
    lengths = [4, 6, 2] if packed else [6, 6, 6]
    covered = (
        set(range(6))
        if steps is None
        else {*range(6)[steps]}
        if isinstance(steps, slice)
        else set(steps)
    )
    given: Any = x
    if packed:
        given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    units = [0, size - 1]

    def edit(site: str, name: str, step: int, sequence: int, values: np.ndarray) -> np.ndarray:
        if name == quantity and step in covered and site in ("l0", "l0_reverse"):
            values = values.copy()
            values[units] = 0.4
        return values

    settings = {"l0": {quantity: 0.4}, "l0_reverse": {quantity: 0.4}}
    with torch.no_grad(), grutrace.intervene(layer, settings, units=units, steps=steps):
        output, final = layer(given, initial)
    if instruction_set != "none" and (steps is None or not packed):
        assert set(runs) == {"run_held_steps"}
    else:
        assert set(runs) == {"run_in_place"}
    inputs = [x[:length, b].numpy() for b, length in enumerate(lengths)]
    expected, last = run_loop(layer, inputs, initial.numpy(), edit)
    if packed:
        output, _ = pad_packed_sequence(output)
    for b, length in enumerate(lengths):
        assert np.allclose(output[:length, b].numpy(), expected[b], rtol=0, atol=2e-6)
    assert np.allclose(final.numpy(), last, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("start", ["zeros", "one sequence", "others"])
@pytest.mark.parametrize("steps", [None, slice(1, None)])
def test_a_step_from_zeros_multiplies_one_row(
    steps: Any, start: str, bias: bool, instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(4, 16, bias=bias), torch.randn(3, 5, 4)
    initial = torch.zeros(1, 5, 16) if start != "others" else torch.randn(1, 5, 16)
    if start == "one sequence":
        initial[0, 4, 15] = 1e-30
    rows: list[int] = []
    name = "addmm" if bias else "mm"
    product, one_row = getattr(torch, name), held_steps.linear

    def spy(*tensors: Any, out: Any) -> Any:
        rows.append(len(out))
        return product(*tensors, out=out)

    def spy_on_one_row(*tensors: Any) -> Any:
        rows.append(len(tensors[0]))
        return one_row(*tensors)

    def run() -> Any:
        rows.clear()
        with torch.no_grad(), grutrace.intervene(layer, "l0", update=0.2, units=1, steps=steps):
            return layer(x, initial)

    # The rows of a product have other last digits if there are others beside them, except zeros.
    expected = run()
    monkeypatch.setattr(held_steps, "MIN_PRODUCT", 1)
    monkeypatch.setattr(torch, name, spy)
    monkeypatch.setattr(held_steps, "linear", spy_on_one_row)
    output = run()
    is_short = start == "zeros" and steps is None and instruction_set != "none"
    first = 1 if is_short else 5
    assert rows == [first, *([5] * (2 if steps is None else 1))]
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    # A weight that is not finite makes the product of zeros NaN, as in the kernel.
    with torch.no_grad():
        layer.weight_hh_l0[3, 0] = torch.inf
        assert torch.equal(run()[0].isnan(), layer(x, initial)[0].isnan())


def test_a_trace_changes_no_bit(instruction_set: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(4, 37), torch.randn(6, 3, 4)
    settings = {"l0": {"update": 0.2, "hidden": 0.1}}
    with torch.no_grad(), grutrace.intervene(layer, settings, units=[1, 5]):
        expected, _ = layer(x)
        with grutrace.trace(layer, check="raise") as trace:
            output, _ = layer(x)
    assert torch.equal(output, expected)
    assert np.array_equal(trace["l0"].padded("hidden")[0].transpose(1, 0, 2), expected.numpy())
    assert (trace["l0"].update[:, [1, 5]] == np.float32(0.2)).all()
    assert (trace["l0"].hidden[:, [1, 5]] == np.float32(0.1)).all()
    assert instruction_set


def test_what_the_library_does_not_run(runs: list[str]) -> None:
    layer, x = nn.GRU(4, 8), torch.randn(6, 3, 4)
    cases: list[tuple[nn.GRU, dict[str, Any]]] = [
        (layer, {"update": lambda gate, _: gate * 0.5}),
        (layer, {"update_preactivation": 0.0}),
        (layer, {"update": 0.0, "sequences": [1]}),
        (nn.GRU(4, 8).double(), {"update": 0.0}),
    ]
    for module, options in cases:
        with torch.no_grad(), grutrace.intervene(module, "l0", **options):
            module(x.to(module.weight_ih_l0.dtype))
    assert runs == ["run_in_place"] * 4
    with grutrace.intervene(layer, "l0", update=0.0):
        layer(x)
    assert runs[4:] == ["run_step"] * 6


def test_control_the_settings_of_the_library_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.GRU(4, 8), torch.randn(6, 3, 4)
    monkeypatch.setattr(held_steps, "_addresses", lambda _: (ctypes.c_void_p * 4)())
    with torch.no_grad():
        expected, _ = layer(x)
        with grutrace.intervene(layer, "l0", update=0.0):
            output, _ = layer(x)
    if held_steps.load() is not None:
        assert torch.allclose(output, expected, atol=1e-6)
