"""Tests of `convert` against each library's published equations, and of its errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from grutrace.conversion.conventions import CONVENTIONS, RESET_AFTER, RESET_BEFORE
from tests import oracles
from tests.conversion import published
from tests.conversion.published import LIBRARIES

INPUT, HIDDEN, BATCH, STEPS = 3, 4, 5, 200
OPTIONS: dict[str, dict[str, Any]] = {"onnx": {"reset_after": True}}
ROOT = Path(__file__).parents[2]


def drawing(seed: int, dtype: type = np.float64) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.uniform(-0.7, 0.7, shape).astype(dtype)


def as_float64(arrays: Any) -> Any:
    if isinstance(arrays, dict):
        return {name: as_float64(value) for name, value in arrays.items()}
    if isinstance(arrays, list):
        return [as_float64(value) for value in arrays]
    return arrays.astype(np.float64) if isinstance(arrays, np.ndarray) else arrays


def states(layer: nn.GRU, inputs: np.ndarray, initial: np.ndarray) -> np.ndarray:
    dtype = layer.weight_ih_l0.dtype
    with torch.no_grad():
        output, _ = layer(torch.tensor(inputs, dtype=dtype), torch.tensor(initial, dtype=dtype))
    return output.double().numpy()


@pytest.mark.parametrize(("dtype", "allowed"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("convention", LIBRARIES)
def test_states_are_those_of_the_published_equations(
    convention: str, dtype: type, allowed: float
) -> None:
    step, make = LIBRARIES[convention]
    arrays = make(drawing(1, dtype), INPUT, HIDDEN)
    inputs = drawing(2, dtype)(STEPS, BATCH, INPUT)
    initial = drawing(3, dtype)(1, BATCH, HIDDEN)
    layer = grutrace.convert(arrays, convention, **OPTIONS.get(convention, {}))
    assert type(layer) is nn.GRU
    expected = published.run(step, as_float64(arrays), inputs, initial[0].astype(np.float64))
    found = states(layer, inputs, initial)
    assert abs(found - expected).max() < allowed
    # The control: two blocks exchanged.
    with torch.no_grad():
        layer.weight_hh_l0[: 2 * HIDDEN] = layer.weight_hh_l0[: 2 * HIDDEN].roll(HIDDEN, 0)
    assert abs(states(layer, inputs, initial) - expected).max() > 1e-2


def without_bias(convention: str, arrays: Any) -> Any:
    if convention == "keras":
        return arrays[:2]
    drop = {"B", "bias", "bias_n", "b", "bhn", "biases", "bias_ih_l0", "bias_hh_l0"}
    return {
        name: {inner: part for inner, part in value.items() if inner not in drop}
        if isinstance(value, dict)
        else value
        for name, value in arrays.items()
        if name not in drop
    }


@pytest.mark.parametrize("convention", LIBRARIES)
def test_without_biases(convention: str) -> None:
    arrays = LIBRARIES[convention][1](drawing(1), INPUT, HIDDEN)
    options = OPTIONS.get(convention, {})
    layer = grutrace.convert(without_bias(convention, arrays), convention, **options)
    assert not layer.bias
    full = grutrace.convert(arrays, convention, **options)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
    x = torch.randn(7, 2, INPUT, dtype=torch.float64)
    assert torch.equal(full(x)[0], layer(x)[0])


@pytest.mark.parametrize("convention", sorted(set(LIBRARIES) - {"pytorch", "paddle"}))
def test_stacks_of_two_directions(convention: str) -> None:
    """Each layer is a loop forward and a loop backward, joined along the units."""
    step, make = LIBRARIES[convention]
    draw = drawing(1)
    sizes = (INPUT, 2 * HIDDEN)
    stack = [
        {"forward": make(draw, size, HIDDEN), "backward": make(draw, size, HIDDEN)}
        for size in sizes
    ]
    layer = grutrace.convert(stack, convention, **OPTIONS.get(convention, {}))
    assert (layer.num_layers, layer.bidirectional) == (2, True)
    inputs = drawing(2)(20, BATCH, INPUT)
    below, zeros = inputs, np.zeros((BATCH, HIDDEN))
    for parts in stack:
        forward = published.run(step, parts["forward"], below, zeros)
        backward = published.run(step, parts["backward"], below[::-1], zeros)[::-1]
        below = np.concatenate([forward, backward], axis=2)
    assert abs(states(layer, inputs, np.zeros((4, BATCH, HIDDEN))) - below).max() < 1e-12


def test_two_directions_as_keras_and_onnx_have_them() -> None:
    make_keras, make_onnx = LIBRARIES["keras"][1], LIBRARIES["onnx"][1]
    forward, backward = (make_keras(drawing(seed), INPUT, HIDDEN) for seed in (1, 2))
    joined = grutrace.convert([*forward, *backward], "keras")
    parts = grutrace.convert({"forward": forward, "backward": backward}, "keras")
    assert_equal(joined, parts)
    assert_equal(
        grutrace.convert([*forward[:2], *backward[:2]], "keras"),
        grutrace.convert({"forward": forward[:2], "backward": backward[:2]}, "keras"),
    )
    forward, backward = (make_onnx(drawing(seed), INPUT, HIDDEN) for seed in (1, 2))
    both = {name: np.concatenate([forward[name], backward[name]]) for name in forward}
    joined = grutrace.convert(both, "onnx", reset_after=True)
    parts = grutrace.convert({"forward": forward, "backward": backward}, "onnx", reset_after=True)
    assert joined.bidirectional
    assert_equal(joined, parts)


def assert_equal(one: nn.GRU, other: nn.GRU) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("convention", ["pytorch", "paddle"])
def test_pytorchs_names(convention: str) -> None:
    theirs = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    ours = grutrace.convert(theirs.state_dict(), convention, batch_first=True)
    x = torch.randn(5, 6, 3)
    assert torch.equal(ours(x)[0], theirs(x)[0])
    cell = nn.GRUCell(3, 4)
    ours = grutrace.convert(cell.state_dict(), convention)
    assert torch.allclose(ours(x[:, :1].transpose(0, 1))[0][0], cell(x[:, 0]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_is_that_of_the_arrays(dtype: torch.dtype) -> None:
    theirs = nn.GRU(3, 4, dtype=dtype)
    assert_equal(grutrace.convert(theirs.state_dict(), "pytorch"), theirs)


def test_the_layer_is_ready_to_train_and_trace_and_draws_no_numbers() -> None:
    arrays = LIBRARIES["keras"][1](drawing(1), INPUT, HIDDEN)
    before = torch.get_rng_state()
    layer = grutrace.convert(arrays, "keras")
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.training
    assert all(parameter.requires_grad for parameter in layer.parameters())
    with grutrace.trace(layer) as trace:
        layer(torch.randn(4, 2, INPUT, dtype=torch.float64))
    assert trace["l0"].residual < 1e-14
    first = arrays[0].copy()
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
    assert (arrays[0] == first).all()


#: What is refused: the convention, its step, arrays and options.
REFUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "haiku": (
        "haiku",
        {"w_i": np.ones((3, 12)), "w_h": np.ones((4, 12)), "b": np.ones(12)},
        {},
    ),
    "haiku, whatever is said": ("haiku", {}, {}),
    "keras, by its bias": ("keras", [np.ones((3, 12)), np.ones((4, 12)), np.ones(12)], {}),
    "keras, by name": (
        "keras",
        [np.ones((3, 12)), np.ones((4, 12))],
        {"reset_after": False},
    ),
    "onnx": ("onnx", LIBRARIES["onnx"][1](drawing(1), 3, 4), {"reset_after": False}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reset_gate_inside_the_product_is_refused(case: str) -> None:
    convention, arrays, options = REFUSED[case]
    with pytest.raises(grutrace.UnsupportedError) as caught:
        grutrace.convert(arrays, convention, **options)
    assert str(caught.value).startswith(f"{convention}: ")
    assert RESET_BEFORE in str(caught.value)
    assert RESET_AFTER in str(caught.value)


def test_control_the_two_candidates_differ() -> None:
    """The refused equations, and a layer of the same weights: other states from the second step."""
    draw = drawing(1)
    kernel, recurrent, bias = draw(INPUT, 12), draw(HIDDEN, 12), draw(12)
    inputs, zeros = drawing(2)(10, BATCH, INPUT), np.zeros((BATCH, HIDDEN))
    expected = published.run(published.keras_reset_before, [kernel, recurrent, bias], inputs, zeros)
    layer = grutrace.convert([kernel, recurrent, np.stack([bias, 0 * bias])], "keras")
    found = states(layer, inputs, zeros[None])
    assert abs(found[0] - expected[0]).max() < 1e-12, "h' is 0: nothing to reset"
    assert abs(found[1:] - expected[1:]).max() > 1e-2


def test_the_equations_of_the_message_are_those_of_the_libraries() -> None:
    """Both candidates as the message writes them, evaluated, against PyTorch and Keras."""
    rng = np.random.default_rng(0)
    names = {"W_in": (4, 3), "W_hn": (4, 4), "x": (3,), "b_in": (4,), "b_hn": (4,), "b_n": (4,)}
    values = {name: rng.normal(size=shape) for name, shape in names.items()}
    values |= {"r": rng.uniform(size=4), "h": rng.normal(size=4)}

    def evaluate(equation: str) -> np.ndarray:
        text = equation.partition("= ")[2].replace("h'", "h")
        text = re.sub(r"(W_\w+) ", r"\1 @ ", text)
        return eval(text, {"tanh": np.tanh, **values})

    w_in, w_hn, x, b_in, b_hn, b_n, r, h = values.values()
    assert (
        abs(evaluate(RESET_AFTER) - np.tanh(w_in @ x + b_in + r * (w_hn @ h + b_hn))).max() < 1e-14
    )
    assert abs(evaluate(RESET_BEFORE) - np.tanh(w_in @ x + w_hn @ (r * h) + b_n)).max() < 1e-14


KERNEL, RECURRENT, BIAS = np.ones((3, 12)), np.ones((4, 12)), np.ones((2, 12))
STATE_DICT = nn.GRU(3, 4, num_layers=2).state_dict()

WRONG: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "a convention": ([], "keas", {}, r"convention: .*'keas' \(did you mean 'keras'\?\)"),
    "an option": ([], "keras", {"reset_befor": 1}, r"reset_befor: unknown option"),
    "reset_after": ([], "keras", {"reset_after": 1}, r"reset_after: expected True, False or None"),
    "reset_after of Flax": ({}, "flax_nnx", {"reset_after": False}, r"always True in Flax"),
    "ONNX without it": ({}, "onnx", {}, r"reset_after: expected True .*linear_before_reset"),
    "a missing name": ({"W": 1}, "onnx", {"reset_after": True}, r"arrays: expected 'R' .*found W"),
    "no arrays": (None, "mlx", {}, r"arrays: expected 'Wh' in it; found None"),
    "a number of arrays": ([KERNEL], "keras", {}, r"layer.get_weights\(\).*found \["),
    "a shape": (
        [np.ones((3, 11)), RECURRENT, BIAS],
        "keras",
        {},
        r"arrays\[0\]: expected shape \(I, 3H\) with H = 4; found \(3, 11\)",
    ),
    "weights of an LSTM": (
        nn.LSTM(3, 4).state_dict(),
        "pytorch",
        {},
        r"arrays\['weight_hh_l0'\]: expected shape \(3H, H\); found \(16, 4\)",
    ),
    "integers": (
        [KERNEL.astype(int), RECURRENT, BIAS],
        "keras",
        {},
        r"arrays\[0\]: expected an array of floating-point numbers",
    ),
    "texts": (["a", "b", "c"], "keras", {}, r"arrays\[\d\]: expected an array; found 'c'"),
    "two types": (
        [KERNEL, RECURRENT.astype(np.float32), BIAS],
        "keras",
        {},
        r"expected one type of numbers; found float32, float64",
    ),
    "layers that do not fit": (
        [[KERNEL, RECURRENT, BIAS]] * 2,
        "keras",
        {},
        r"expected I = 4 and H = 4 in layer 1.*found I = 3 and H = 4",
    ),
    "directions that differ": (
        [[KERNEL, RECURRENT], [RECURRENT, RECURRENT, RECURRENT, RECURRENT]],
        "keras",
        {},
        r"expected 1 directions in every layer.*found 2 in layer 1",
    ),
    "three directions": (
        {"W": np.ones((3, 12, 3)), "R": np.ones((3, 12, 4))},
        "onnx",
        {"reset_after": True},
        r"expected 1 or 2 directions; found 3",
    ),
    "a whole model": (
        nn.Sequential(nn.GRU(3, 4)).state_dict(),
        "pytorch",
        {},
        r"expected 'weight_hh_l0' in it; found 0.weight_ih_l0, .*\(did you mean",
    ),
    "weights of something else too": (
        {**STATE_DICT, "out.weight": torch.ones(2)},
        "pytorch",
        {},
        r"expected only the weights of one GRU; found also out.weight",
    ),
    "a layer without its states": (
        {name: value for name, value in STATE_DICT.items() if name != "weight_hh_l1"},
        "pytorch",
        {},
        r"expected 'weight_hh_l1' in it",
    ),
    "no mapping": ([KERNEL], "pytorch", {}, r"expected a mapping with PyTorch's names"),
    "five matrices": (
        {"matrices": [np.ones((4, 4))] * 5},
        "cudnn",
        {},
        r"arrays\['matrices'\]: expected a list of 6 arrays; found 5",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case: str) -> None:
    arrays, convention, options, message = WRONG[case]
    with pytest.raises(grutrace.OptionError, match=message) as caught:
        grutrace.convert(arrays, convention, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_page_lists_every_convention() -> None:
    page = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    named = set(re.findall(r'^\| `"(\w+)"`', page, re.M))
    assert named == set(CONVENTIONS)


def test_the_oracle_of_pytorch_is_the_oracle_of_the_other_tests() -> None:
    arrays = LIBRARIES["pytorch"][1](drawing(1), INPUT, HIDDEN)
    x, h = drawing(2)(BATCH, INPUT), drawing(3)(BATCH, HIDDEN)
    weights = {name.removesuffix("_l0"): value for name, value in arrays.items()}
    expected = oracles.gates(weights, x, h, 2**-52).values["hidden"]
    assert abs(published.pytorch(arrays, x, h) - expected).max() < 1e-15
